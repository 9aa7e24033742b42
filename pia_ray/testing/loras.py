"""Tiny LoRAs and textual inversions with random weights, in the layouts that trainers and model sites give them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from pia_ray.config.resolving import seed_from_id

if TYPE_CHECKING:
    import torch

LoraPart = Literal["unet", "motion", "convolutions", "text_encoder"]
LoraLayout = Literal["kohya", "diffusers"]

_MODULES: Final[dict[LoraPart, str]] = {
    "unet": r".*\.attentions\..*(to_[qkv]|to_out\.0|ff\.net\.0\.proj|ff\.net\.2|proj_in|proj_out)",
    "motion": r".*\.motion_modules\..*(to_[qkv]|to_out\.0)",
    "convolutions": r".*\.(conv1|conv2|conv_shortcut|time_emb_proj|downsamplers\.0\.conv|upsamplers\.0\.conv)",
    "text_encoder": r".*\.(q_proj|k_proj|v_proj|out_proj|fc1|fc2)",
}


def make_lora(
    file: Path,
    checkpoint: Path,
    *,
    parts: Sequence[LoraPart] = ("unet", "text_encoder"),
    layout: LoraLayout = "kohya",
    rank: int = 4,
    alpha: float | None = 2.0,
    strength: float = 1.0,
    seed: int = 0,
) -> Path:
    """Writes a LoRA for the checkpoint that `make_pipeline_folder` made, and returns its file.

    kohya: `lora_unet_...` names with an alpha beside each pair. diffusers: peft's names with the alpha in the header.
    `alpha` None leaves it out, which means the rank; `strength` is the size of the random numbers.
    """
    import torch
    from safetensors.torch import save_file

    tensors: dict[str, torch.Tensor] = {}
    generator = torch.Generator().manual_seed(seed_from_id(f"lora/{seed}") % 2**63)
    for side, name, weight in _weights(checkpoint, parts):
        out, inner, *kernel = weight.shape
        down = torch.randn((rank, inner, *kernel), generator=generator) / (inner * max(1, *kernel, 1)) ** 0.5
        up = torch.randn((out, rank, *[1] * len(kernel)), generator=generator) * strength / rank**0.5
        keys = _names(side, name, layout)
        tensors[keys[0]], tensors[keys[1]] = down, up
        if layout == "kohya" and alpha is not None:
            tensors[f"{keys[0].partition('.')[0]}.alpha"] = torch.tensor(alpha)
    header = {}
    if layout == "diffusers" and alpha is not None:
        sides = {key.partition(".")[0] for key in tensors}
        targets = {side: sorted({_target(key, side) for key in tensors if key.startswith(side)}) for side in sides}
        config: dict[str, object] = {f"{side}.r": rank for side in sides} | {
            f"{side}.lora_alpha": alpha for side in sides
        }
        config |= {f"{side}.target_modules": targets[side] for side in sides}
        header = {"lora_adapter_metadata": json.dumps(config, sort_keys=True)}
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, file, {"format": "pt", **header})
    return file


def make_textual_inversion(
    file: Path,
    *,
    width: int = 32,
    num_vectors: int = 1,
    layout: Literal["diffusers", "a1111"] = "diffusers",
    name: str = "<thing>",
    seed: int = 0,
) -> Path:
    """Writes a textual inversion for a text encoder of that width (the tiny ones' is 32) and returns its file.

    diffusers keeps the vectors under the token they were trained as, `name`; A1111 as emb_params.
    """
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed_from_id(f"textual-inversion/{seed}") % 2**63)
    vectors = torch.randn((num_vectors, width), generator=generator)
    whole = vectors[0] if layout == "diffusers" and num_vectors == 1 else vectors
    tensors = {name if layout == "diffusers" else "emb_params": whole}
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, file)
    return file


def _weights(checkpoint: Path, parts: Sequence[LoraPart]) -> Iterator[tuple[str, str, torch.Tensor]]:
    from safetensors.torch import load_file

    unet = load_file(checkpoint / "unet" / "diffusion_pytorch_model.safetensors")
    text = load_file(checkpoint / "text_encoder" / "model.safetensors")
    for part in parts:
        side, weights = ("text_encoder", text) if part == "text_encoder" else ("unet", unet)
        for key, weight in sorted(weights.items()):
            name = key.removesuffix(".weight").removeprefix("text_model.")
            if key.endswith(".weight") and re.fullmatch(_MODULES[part], name):
                yield side, f"text_model.{name}" if side == "text_encoder" else name, weight


def _names(side: str, name: str, layout: LoraLayout) -> tuple[str, str]:
    """Keys of the two factors."""
    if layout == "kohya":
        flat = f"lora_{'te' if side == 'text_encoder' else 'unet'}_{name.replace('.', '_')}"
        return f"{flat}.lora_down.weight", f"{flat}.lora_up.weight"
    return f"{side}.{name}.lora_A.weight", f"{side}.{name}.lora_B.weight"


def _target(key: str, side: str) -> str:
    return key.removeprefix(f"{side}.").partition(".lora_")[0].removeprefix("text_model.")
