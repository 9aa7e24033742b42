"""Rewrites of the UNet and the VAE that compute the same with fewer operations: equal to float tolerance, over the
same parameters.

Names and shapes of parameters stay, so checkpoints, LoRAs and state dicts fit as before. A module that has been
rewritten is not rewritten again, because it may have several owners: a model and its variant with a LoRA of the text
encoder have the same UNet. tests/pia/unet/test_rewrites.py counts the operations.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, UNetMotionModel

from pia_ray.pia.unet.guidance_prefix import Prefix, share_prefix
from pia_ray.pia.unet.motion_modules import TemporalTransformer
from pia_ray.pia.unet.upsample import SubpixelUpsample


def restructure_unet(unet: UNetMotionModel) -> Prefix | None:
    """Rewrites the UNet in place; returns its `Prefix`, or None where its first layers have another structure."""
    _subpixel(unet)
    for module in unet.modules():
        if TemporalTransformer.suits(module):
            module.__class__ = TemporalTransformer
    return share_prefix(unet)


def restructure_vae(vae: AutoencoderKL) -> None:
    """Rewrites the VAE in place."""
    _subpixel(vae)


def _subpixel(model: torch.nn.Module) -> None:
    for module in model.modules():
        if SubpixelUpsample.suits(module):
            module.__class__ = SubpixelUpsample
        if isinstance(module, SubpixelUpsample):
            module.refresh()
