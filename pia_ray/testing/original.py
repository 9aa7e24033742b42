"""Weights in diffusers' names -> names and shapes of the original Stable Diffusion code, as in single-file checkpoints.

Source: the published model code, CompVis/stable-diffusion, ldm/modules.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import torch

_UNET_ENDS: Final = {
    "conv_in.": "input_blocks.0.0.",
    "time_embedding.linear_1.": "time_embed.0.",
    "time_embedding.linear_2.": "time_embed.2.",
    "conv_norm_out.": "out.0.",
    "conv_out.": "out.2.",
}
_UNET_RESNET: Final = {
    "norm1.": "in_layers.0.",
    "conv1.": "in_layers.2.",
    "time_emb_proj.": "emb_layers.1.",
    "norm2.": "out_layers.0.",
    "conv2.": "out_layers.3.",
    "conv_shortcut.": "skip_connection.",
}
_VAE_ATTENTION: Final = {
    "group_norm.": "norm.",
    "to_q.": "q.",
    "to_k.": "k.",
    "to_v.": "v.",
    "to_out.0.": "proj_out.",
}


def original_unet(tensors: Mapping[str, torch.Tensor], *, layers_per_block: int) -> dict[str, torch.Tensor]:
    """A `UNet2DConditionModel`'s weights as the original names them, below `model.diffusion_model.`."""
    per_block = layers_per_block + 1
    with_attention = {int(name.split(".")[1]) for name in tensors if re.match(r"up_blocks\.\d+\.attentions", name)}

    def renamed(name: str) -> str:
        for ours, theirs in _UNET_ENDS.items():
            if name.startswith(ours):
                return theirs + name.removeprefix(ours)
        side, rest = name.split("_block", 1)
        if side == "mid":
            _, kind, layer, tail = rest.split(".", 3)
            return f"middle_block.{1 if kind == 'attentions' else 2 * int(layer)}.{_inner(kind, tail)}"
        _, block, kind, layer, tail = rest.split(".", 4)
        if side == "down":
            if kind == "downsamplers":
                return f"input_blocks.{(int(block) + 1) * per_block}.0.op.{tail.removeprefix('conv.')}"
            return f"input_blocks.{1 + int(block) * per_block + int(layer)}.{_place(kind)}.{_inner(kind, tail)}"
        if kind == "upsamplers":
            place = 2 if int(block) in with_attention else 1
            return f"output_blocks.{int(block) * per_block + layers_per_block}.{place}.{tail}"
        return f"output_blocks.{int(block) * per_block + int(layer)}.{_place(kind)}.{_inner(kind, tail)}"

    return {f"model.diffusion_model.{renamed(name)}": tensor for name, tensor in tensors.items()}


def original_vae(tensors: Mapping[str, torch.Tensor], *, prefix: str = "") -> dict[str, torch.Tensor]:
    """An `AutoencoderKL`'s weights as the original names and shapes them, below `prefix`."""
    blocks = 1 + max(int(name.split(".")[2]) for name in tensors if name.startswith("decoder.up_blocks."))
    renamed = {}
    for name, tensor in tensors.items():
        value, new = tensor, name.replace("conv_norm_out.", "norm_out.").replace("conv_shortcut.", "nin_shortcut.")
        new = re.sub(r"down_blocks\.(\d+)\.resnets\.", r"down.\1.block.", new)
        new = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0\.", r"down.\1.downsample.", new)
        new = re.sub(r"up_blocks\.(\d+)", lambda found: f"up.{blocks - 1 - int(found[1])}", new)
        new = new.replace("upsamplers.0.", "upsample.")
        new = re.sub(r"mid_block\.resnets\.(\d)", lambda found: f"mid.block_{int(found[1]) + 1}", new)
        if "mid_block.attentions.0." in new:
            head, tail = new.split("mid_block.attentions.0.")
            new = f"{head}mid.attn_1.{_renamed(tail, _VAE_ATTENTION)}"
            value = tensor[:, :, None, None] if tensor.ndim == 2 else tensor  # 1 x 1 convolutions there
        renamed[prefix + new.replace("resnets.", "block.")] = value.contiguous()
    return renamed


def original_text_encoder(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A `CLIPTextModel`'s weights as the original names them."""
    return {
        f"cond_stage_model.transformer.text_model.{name.removeprefix('text_model.')}": tensor
        for name, tensor in tensors.items()
    }


def _place(kind: str) -> int:
    return 1 if kind == "attentions" else 0


def _inner(kind: str, tail: str) -> str:
    return tail if kind == "attentions" else _renamed(tail, _UNET_RESNET)


def _renamed(tail: str, names: Mapping[str, str]) -> str:
    for ours, theirs in names.items():
        if tail.startswith(ours):
            return theirs + tail.removeprefix(ours)
    raise ValueError(f"no original name for {tail}")
