"""Tiny IP-Adapters with random weights in the layouts of the published files, for any UNet in diffusers layout."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from pia_ray.config.resolving import seed_from_id

if TYPE_CHECKING:
    import torch

_IMAGE_SIDE: Final = 30
_PATCH_SIDE: Final = 10
_HIDDEN_WIDTH: Final = 16
_EMBED_WIDTH: Final = 24
_TOKENS: Final = 4
_RESAMPLER_WIDTH: Final = 32
_RESAMPLER_LAYERS: Final = 4
_HEAD_WIDTH: Final = 64  # what readers of the published files derive the number of heads from

_Shapes = dict[str, tuple[int, ...]]


def make_ip_adapter(
    folder: Path, base: Path, *, seed: int = 0, kind: Literal["plain", "plus", "full"] = "plain"
) -> tuple[Path, Path]:
    """Writes an IP-Adapter for the UNet of `base` and its image encoder; returns the file and the encoder's folder.

    `plain` reads one embedding of a picture through a linear layer, `plus` its patches through a resampler, and `full`
    its patches through a perceptron, as ip-adapter_sd15, ip-adapter-plus_sd15 and ip-adapter-full-face_sd15 do. Equal
    arguments give equal files.
    """
    from safetensors import safe_open
    from safetensors.torch import save_file
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    folder = Path(folder)
    path, encoder_folder = folder / f"ip-adapter-{kind}.safetensors", folder / "image_encoder"
    encoder = CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=_HIDDEN_WIDTH,
            intermediate_size=2 * _HIDDEN_WIDTH,
            projection_dim=_EMBED_WIDTH,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=_IMAGE_SIDE,
            patch_size=_PATCH_SIDE,
        )
    )
    sizes = {name: tuple(weight.shape) for name, weight in encoder.named_parameters()}
    encoder.load_state_dict(_draw(sizes, f"image-encoder/{seed}"), strict=False)  # all but its table of positions
    encoder.save_pretrained(encoder_folder)
    with safe_open(Path(base) / "unet" / "diffusion_pytorch_model.safetensors", framework="pt") as weights:
        names = sorted(filter(_reads_prompt, weights.keys()), key=_place)
        attentions = [tuple(weights.get_slice(name).get_shape()) for name in names]
    shapes = {f"image_proj.{name}": shape for name, shape in _projection(kind, attentions[0][1]).items()}
    for index, shape in enumerate(attentions):
        for layer in ("to_k_ip", "to_v_ip"):
            shapes[f"ip_adapter.{2 * index + 1}.{layer}.weight"] = shape
    save_file(_draw(shapes, f"ip-adapter/{seed}"), path, metadata={"format": "pt"})
    return path, encoder_folder


def _reads_prompt(name: str) -> bool:
    return name.endswith(".attn2.to_k.weight") and "motion_modules" not in name


def _place(name: str) -> tuple[int, ...]:
    """The sort key of an attention in the published files: down blocks, up blocks, the middle one last."""
    return (("down", "up_b", "mid_").index(name[:4]), *map(int, re.findall(r"\.(\d+)(?=\.)", name)))


def _projection(kind: str, width: int) -> _Shapes:
    if kind == "plain":
        return {**_layer("proj", _TOKENS * width, _EMBED_WIDTH), **_norm("norm", width)}
    if kind == "full":
        return {
            **_layer("proj.0", _HIDDEN_WIDTH, _HIDDEN_WIDTH),
            **_layer("proj.2", width, _HIDDEN_WIDTH),
            **_norm("proj.3", width),
        }
    shapes: _Shapes = {
        "latents": (1, _TOKENS, _RESAMPLER_WIDTH),
        **_layer("proj_in", _RESAMPLER_WIDTH, _HIDDEN_WIDTH),
        **_layer("proj_out", width, _RESAMPLER_WIDTH),
        **_norm("norm_out", width),
    }
    for index in range(_RESAMPLER_LAYERS):
        attention, feed = f"layers.{index}.0", f"layers.{index}.1"
        shapes |= _norm(f"{attention}.norm1", _RESAMPLER_WIDTH) | _norm(f"{attention}.norm2", _RESAMPLER_WIDTH)
        shapes[f"{attention}.to_q.weight"] = (_HEAD_WIDTH, _RESAMPLER_WIDTH)
        shapes[f"{attention}.to_kv.weight"] = (2 * _HEAD_WIDTH, _RESAMPLER_WIDTH)
        shapes[f"{attention}.to_out.weight"] = (_RESAMPLER_WIDTH, _HEAD_WIDTH)
        shapes |= _norm(f"{feed}.0", _RESAMPLER_WIDTH)
        shapes[f"{feed}.1.weight"] = (4 * _RESAMPLER_WIDTH, _RESAMPLER_WIDTH)
        shapes[f"{feed}.3.weight"] = (_RESAMPLER_WIDTH, 4 * _RESAMPLER_WIDTH)
    return shapes


def _layer(name: str, rows: int, columns: int) -> _Shapes:
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def _norm(name: str, width: int) -> _Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _draw(shapes: _Shapes, part: str) -> dict[str, torch.Tensor]:
    """Random weights that keep activations near one, of which none is zero."""
    import torch

    generator = torch.Generator().manual_seed(seed_from_id(part) % 2**63)
    weights = {}
    for name, shape in shapes.items():
        noise: torch.Tensor = torch.randn(shape, generator=generator)
        if len(shape) > 1:
            weights[name] = noise / shape[-1] ** 0.5
        else:
            weights[name] = noise * 0.1 + (1.0 if name.endswith("weight") else 0.0)
    return weights
