"""Rewrites of the UNet and the VAE that compute the same in less: equal to float tolerance, over the same parameters.

Names and shapes of parameters stay, so checkpoints, LoRAs and state dicts do not notice. What is done twice is done
once: a copy of a rewritten model with other parameters is rewritten anew. tests/pia/unet/test_rewrites.py counts the
operations.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, UNetMotionModel

from pia_ray.pia.unet.attention_kernels import Kernels, choose_kernels, chosen_kernels
from pia_ray.pia.unet.cross_attention import CrossAttention
from pia_ray.pia.unet.guidance_prefix import Prefix, share_prefix
from pia_ray.pia.unet.motion_modules import TemporalTransformer, most_positions
from pia_ray.pia.unet.upsample import SubpixelUpsample

__all__ = [
    "CrossAttention",
    "Kernels",
    "Prefix",
    "choose_kernels",
    "chosen_kernels",
    "most_positions",
    "restructure_unet",
    "restructure_vae",
]


def restructure_unet(unet: UNetMotionModel) -> Prefix | None:
    """Rewrites the UNet in place; gives what its forwards are told of equal entries, if its first layers suit."""
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
