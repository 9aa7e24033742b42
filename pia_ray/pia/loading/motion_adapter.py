"""PIA's motion adapter in one file, `pia.ckpt` or `pia.safetensors`, in the original's or diffusers' names.

Such a file does not state how it is built: shapes say it, and the base's UNet for the number of heads and groups.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from diffusers import MotionAdapter, UNet2DConditionModel, UNetMotionModel
from diffusers.models.embeddings import SinusoidalPositionalEmbedding

from pia_ray.errors import WeightsError
from pia_ray.pia.loading.checkpoint_tensors import read_tensors

_RENAMED: Final = {
    "module.": "",
    ".temporal_transformer": "",
    ".attention_blocks.0": ".attn1",
    ".attention_blocks.1": ".attn2",
    ".norms.0": ".norm1",
    ".norms.1": ".norm2",
    ".ff_norm": ".norm3",
    ".pos_encoder.": ".pos_embed.",
}
_POSITIONS: Final = ".pos_embed.pe"


def joined(plain: UNet2DConditionModel, adapter: MotionAdapter, *, path: Path) -> UNetMotionModel:
    """The UNet with motion modules that has the tensors of both; of conv_in those for mask and picture are the
    adapter's, the rest the plain UNet's.

    It equals diffusers' `from_unet2d`, which makes random weights first and copies into them.

    Raises:
        WeightsError: the adapter, whose `path` is named, is not for this UNet.
    """
    try:
        with torch.device("meta"):
            unet = UNetMotionModel.from_unet2d(plain, adapter, load_weights=False)
        own, added = plain.state_dict(), adapter.state_dict()
        weight = torch.cat([own["conv_in.weight"], added.pop("conv_in.weight")[:, own["conv_in.weight"].shape[1] :]], 1)
        state = added | own | {"conv_in.weight": weight}
        missing, _ = unet.load_state_dict(state, strict=False, assign=True)
    except (RuntimeError, ValueError) as error:
        raise WeightsError(f"{path} does not fit the base: {str(error).strip().splitlines()[-1].strip()}") from error
    if missing:
        raise WeightsError(f"{path} does not fit the base: neither has {missing[0]}")
    return unet


def load_motion_adapter(path: Path, unet: Mapping[str, Any]) -> MotionAdapter:
    """The adapter for a base whose UNet has this config.

    Raises:
        WeightsError: the file is not PIA's adapter, or not for this UNet.
    """
    tensors = _in_diffusers_names(read_tensors(path))
    if not any(".motion_modules." in name for name in tensors):
        raise WeightsError(f"{path} is not a motion adapter: it holds no motion_modules")
    if "conv_in.weight" not in tensors:
        raise WeightsError(f"{path} has no conv_in: it is a motion module of AnimateDiff and not PIA's adapter")
    with torch.device("meta"):  # without random weights
        adapter = MotionAdapter(**_built(tensors, unet))
    # Positions follow from the length, and not all files have them.
    positions = {name for name in adapter.state_dict() if name.endswith(_POSITIONS)}
    own = {name: tensor for name, tensor in tensors.items() if not name.endswith(_POSITIONS)}
    try:
        missing, unknown = adapter.load_state_dict(own, strict=False, assign=True)
    except RuntimeError as error:
        raise WeightsError(f"{path} does not fit the base: {str(error).strip().splitlines()[-1].strip()}") from error
    if lost := sorted(set(missing) - positions):
        raise WeightsError(f"{path} lacks {lost[0]} and {len(lost) - 1} more weights of the motion modules")
    if unknown and all(".motion_modules." in name for name in unknown):
        raise WeightsError(f"{path} does not fit the base, which has no place for {unknown[0]}")
    for module in adapter.modules():
        if isinstance(module, SinusoidalPositionalEmbedding):
            module.pe = SinusoidalPositionalEmbedding(module.pe.shape[2], module.pe.shape[1]).pe
    return adapter


def _in_diffusers_names(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The motion modules and conv_in; the original's files may hold more of the UNet, which the base replaces."""
    renamed = {}
    for name, tensor in tensors.items():
        for theirs, ours in _RENAMED.items():
            name = name.removeprefix(theirs) if theirs == "module." else name.replace(theirs, ours)
        if "motion_modules." in name or name.startswith("conv_in."):
            renamed[name] = tensor
    return renamed


def _built(tensors: Mapping[str, torch.Tensor], unet: Mapping[str, Any]) -> dict[str, Any]:
    lengths = [tensor.shape[1] for name, tensor in tensors.items() if name.endswith(_POSITIONS)]
    layers = unet["layers_per_block"]
    return {
        "block_out_channels": tuple(unet["block_out_channels"]),
        "motion_layers_per_block": layers if isinstance(layers, int) else layers[0],
        # In Stable Diffusion's configs this is the number of heads.
        "motion_num_attention_heads": int(unet["attention_head_dim"]),
        "motion_norm_num_groups": int(unet["norm_num_groups"]),
        "motion_max_seq_length": max(lengths, default=32),
        "use_motion_mid_block": any(name.startswith("mid_block.") for name in tensors),
        "conv_in_channels": tensors["conv_in.weight"].shape[1],
    }
