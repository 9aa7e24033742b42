"""Rewrites of the UNet and the VAE that compute the same in less: equal to float tolerance, over the same parameters.

`restructure` applies all that suit a model. Names and shapes of parameters stay, so checkpoints, LoRAs and state dicts
do not notice. Counts: benchmarks, and the FLOP tests.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, UNetMotionModel

from pia_ray.pia.exact.prefix import Prefix, share_prefix
from pia_ray.pia.exact.temporal import TemporalTransformer
from pia_ray.pia.exact.upsample import SubpixelUpsample

__all__ = ["Prefix", "refresh", "restructure_unet", "restructure_vae"]


def restructure_unet(unet: UNetMotionModel) -> Prefix | None:
    """Rewrites the UNet in place; returns what its forwards are told about equal entries, if its first layers suit."""
    _subpixel(unet)
    for module in unet.modules():
        if TemporalTransformer.suits(module):
            module.__class__ = TemporalTransformer
    return share_prefix(unet)


def restructure_vae(vae: AutoencoderKL) -> None:
    """Rewrites the VAE in place."""
    _subpixel(vae)


def refresh(model: torch.nn.Module) -> None:
    """Takes over parameters that were changed after the rewrite."""
    for module in model.modules():
        if isinstance(module, SubpixelUpsample):
            module.refresh()


def _subpixel(model: torch.nn.Module) -> None:
    for module in model.modules():
        if SubpixelUpsample.suits(module):
            module.__class__ = SubpixelUpsample
            assert isinstance(module, SubpixelUpsample)
            module.refresh()
