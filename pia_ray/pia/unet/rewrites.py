"""Rewrites of the UNet and the VAE that compute the same with fewer operations: equal to float tolerance, over the
same parameters.

Names and shapes of parameters stay, so checkpoints, LoRAs and state dicts fit as before. A module that has been
rewritten is not rewritten again, because it may have several owners: a model and its variant with a LoRA of the text
encoder have the same UNet. tests/pia/unet/test_rewrites.py counts the operations.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, UNetMotionModel

from pia_ray.pia.unet.attention_kernels import attend_by
from pia_ray.pia.unet.attention_products import Products
from pia_ray.pia.unet.choices import Choices
from pia_ray.pia.unet.convolutions import Copies, choose_weights
from pia_ray.pia.unet.feed_forward import choose_gates
from pia_ray.pia.unet.group_norms import choose_group_norms
from pia_ray.pia.unet.guidance_prefix import Prefix, share_prefix
from pia_ray.pia.unet.linear_layers import choose_libraries
from pia_ray.pia.unet.motion_modules import TemporalTransformer, time_kernels
from pia_ray.pia.unet.resnets import rewrite_resnets
from pia_ray.pia.unet.spatial_transformers import rewrite_transformers
from pia_ray.pia.unet.upsample import SubpixelUpsample, make_transposed_weights


class RewrittenUNet(UNetMotionModel):
    """A UNet whose precision is that of its first layer, over the same parameters.

    diffusers' own `dtype`, which each forward asks for, goes through all modules: 4 ms of the full size's 1,317.
    """

    @property
    def dtype(self) -> torch.dtype:
        """That of the weights."""
        return self.conv_in.weight.dtype


def restructure_unet(
    unet: UNetMotionModel, choices: Choices | None = None, copies: Copies | None = None
) -> Prefix | None:
    """Rewrites the UNet in place; returns its `Prefix`, or None where its first layers have another structure.

    With `choices` operators run by the way that is fastest on the device, else all by the way of fewest operations.
    With `copies`, which is for a CPU, some weights are copied for that.
    """
    if type(unet) is UNetMotionModel:
        unet.__class__ = RewrittenUNet
    for module in unet.modules():
        if TemporalTransformer.suits(module):
            module.__class__ = TemporalTransformer
    rewrite_transformers(unet)
    _rewrite(unet, choices, copies)
    prefix = share_prefix(unet)
    _choose(unet, choices, copies)
    return prefix


def restructure_vae(vae: AutoencoderKL, choices: Choices | None = None, copies: Copies | None = None) -> None:
    """Rewrites the VAE in place; `choices` and `copies` as for the UNet."""
    _rewrite(vae, choices, copies)
    _choose(vae, choices, copies)


def _rewrite(model: torch.nn.Module, choices: Choices | None, copies: Copies | None) -> None:
    rewrite_resnets(model)
    for module in model.modules():
        if SubpixelUpsample.suits(module):
            module.__class__ = SubpixelUpsample
        if isinstance(module, SubpixelUpsample):
            module.choices, module.copies = choices, copies


def _choose(model: torch.nn.Module, choices: Choices | None, copies: Copies | None) -> None:
    """On a GPU torch has one library for each product and convolution, and cuDNN chooses its kernels itself.

    A CPU's GroupNorm leaves pictures channels-last. A GPU's memory is planned once all weights are there.
    """
    devices = {weight.device.type for weight in model.parameters()}
    if devices != {"cpu"}:
        make_transposed_weights(model)
    if choices is not None and devices == {"cuda"}:
        choose_group_norms(model, choices)
    if choices is not None and devices == {"cpu"}:
        products = Products(choices)
        attend_by(model, products)
        time_kernels(model, products)
        choose_gates(model, choices)
        choose_libraries(model, choices)
        if copies is not None:
            choose_weights(model, choices, copies)
