"""IP-Adapter: a picture as further tokens of the cross-attention, with tokens and scale for each row.

Loads the published files (plain, plus and full) into a UNet, and encodes pictures. Rows without a picture may share a
forward with rows that have one, at no cost. Source: arXiv 2308.06721.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from PIL import Image
from transformers import CLIPVisionModelWithProjection

from pia_ray.errors import BadParameter, WeightsError
from pia_ray.formatting import first_line
from pia_ray.pia.components import IPAdapter
from pia_ray.pia.evaluation import ImageTokens, Text
from pia_ray.pia.loading.checkpoint_tensors import read_tensors
from pia_ray.pia.transfers import to_device
from pia_ray.pia.unet.image_attention import ImageCrossAttention

CLIP_MEAN: Final = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD: Final = (0.26862954, 0.26130258, 0.27577711)
"""Mean and standard deviation of red, green and blue, for CLIP's image encoders. Source: CLIP, arXiv 2103.00020, its
code."""


def install_ip_adapter(
    unet: Any, path: Path, *, image_encoder: CLIPVisionModelWithProjection | None, device: torch.device
) -> IPAdapter:
    """Adds the adapter's attention to the UNet, which without pictures works as before; returns the other parts.

    Raises:
        WeightsError: the file is not an IP-Adapter, of an unsupported kind, or made for another model.
    """
    projection_weights, attention_weights = _read(path)
    if {"norm.weight", "proj.0.weight"} <= projection_weights.keys() or (
        "perceiver_resampler.proj_in.weight" in projection_weights
    ):
        raise WeightsError(f"{path} is an IP-Adapter for face ids, which needs a face recogniser: take another kind")
    _install_attention(unet, attention_weights, path)
    try:
        # diffusers' own conversion of the file's layouts; it has no public name.
        projection = unet._convert_ip_adapter_image_proj_to_diffusers(projection_weights, low_cpu_mem_usage=False)
    except (KeyError, IndexError, RuntimeError) as error:
        raise WeightsError(f"{path}: its image projection has no known layout ({first_line(error)})") from error
    projection.requires_grad_(False).eval().to(device, unet.dtype)
    adapter = IPAdapter(projection, _embed_width(projection_weights), image_encoder)
    if image_encoder is not None:
        config = image_encoder.config
        width = config.hidden_size if adapter.reads_patches else config.projection_dim
        if width != adapter.embed_width:
            raise WeightsError(
                f"{path} reads embeddings {adapter.embed_width} wide, and those of image_encoder are {width} wide: "
                "take the image encoder that the adapter was trained with"
            )
    return adapter


def encode_picture(adapter: IPAdapter, image: Image.Image) -> torch.Tensor:
    """The picture's embedding, [D] or for adapters that read patches [S, D]."""
    assert adapter.image_encoder is not None
    size = int(adapter.image_encoder.config.image_size)
    return _encode(adapter, torch.from_numpy(_pixels(image, size)))


def image_tokens(adapter: IPAdapter, embeds: torch.Tensor, *, scale: float) -> dict[Text, ImageTokens]:
    """The tokens for each guidance branch, by its text, from embeddings in any of the usual layouts.

    These are: one picture's embedding; several, with one more axis in front; or diffusers' own, with yet another axis
    in front, of one (the positive) or two (the negative first). Where there is no negative, it is that of diffusers:
    zeros, or where the adapter reads patches, the image encoder's output for zeros (an even grey).

    Raises:
        BadParameter: another layout, or a negative is needed and cannot be made.
    """
    own = 2 if adapter.reads_patches else 1
    shape = tuple(embeds.shape)
    if not own <= len(shape) <= own + 2 or shape[-1] != adapter.embed_width or (len(shape) == own + 2 and shape[0] > 2):
        one = f"patches x {adapter.embed_width}" if adapter.reads_patches else str(adapter.embed_width)
        raise BadParameter(
            f"ip_adapter_image_embeds must be [{one}], [pictures x {one}] or [2 x pictures x {one}] with the negative "
            f"first (got {list(shape)})",
            "ip_adapter_image_embeds",
        )
    branches = embeds[(None,) * (own + 2 - len(shape))]  # [1 or 2, pictures, (S,) D]
    positive = branches[-1]
    negative = branches[0] if len(branches) == 2 else _no_picture(adapter, positive)
    return {
        "negative_prompt": ImageTokens(_project(adapter, negative), scale),
        "prompt": ImageTokens(_project(adapter, positive), scale),
    }


def _read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The file's image projection and its attention, each by name."""
    parts: dict[str, dict[str, torch.Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    for name, weight in read_tensors(path).items():
        part, _, rest = name.partition(".")
        if part in parts:
            parts[part][rest] = weight
    if not parts["image_proj"] or not parts["ip_adapter"]:
        raise WeightsError(f"{path} is not an IP-Adapter: it has no image_proj.* and ip_adapter.* weights")
    return parts["image_proj"], parts["ip_adapter"]


def _install_attention(unet: Any, weights: dict[str, torch.Tensor], path: Path) -> None:
    names = [
        name.removesuffix(".processor")
        for name in unet.attn_processors
        if name.endswith("attn2.processor") and "motion_modules" not in name
    ]
    # Numbered through all attentions of a plain UNet, of which every second one reads the prompt.
    numbers = [2 * index + 1 for index in range(len(names))]
    wanted = {f"{number}.{layer}.weight" for number in numbers for layer in ("to_k_ip", "to_v_ip")}
    if not wanted <= (found := {name for name in weights if ".to_k_ip." in name or ".to_v_ip." in name}) or (
        len(found) > len(wanted)
    ):
        raise WeightsError(
            f"{path} is an IP-Adapter for another model: it has weights for {len(found) // 2} cross-attentions, and "
            f"this UNet has {len(names)}"
        )
    for number, name in zip(numbers, names, strict=True):
        attention = unet.get_submodule(name)
        layers = [weights[f"{number}.{layer}.weight"] for layer in ("to_k_ip", "to_v_ip")]
        for layer in layers:
            if layer.shape != attention.to_k.weight.shape:
                raise WeightsError(
                    f"{path} is an IP-Adapter for another model: its attention {number} is {list(layer.shape)}, "
                    f"that of this UNet {list(attention.to_k.weight.shape)}"
                )
        attention.set_processor(ImageCrossAttention(*layers).to(unet.device, unet.dtype).eval())


def _embed_width(projection: dict[str, torch.Tensor]) -> int:
    for name in ("proj.weight", "proj_in.weight", "proj.0.weight"):
        if name in projection:
            return int(projection[name].shape[1])
    raise AssertionError("diffusers knew the layout")


def _encode(adapter: IPAdapter, pixels: torch.Tensor) -> torch.Tensor:
    encoder = adapter.image_encoder
    assert encoder is not None
    # Not the encoder's own device, because an offloaded encoder runs on another.
    device = next(adapter.projection.parameters()).device
    batch = to_device(pixels[None], device).to(encoder.dtype)  # [1, 3, size, size]
    if adapter.reads_patches:
        return encoder(batch, output_hidden_states=True).hidden_states[-2][0]
    return encoder(batch).image_embeds[0]


def _no_picture(adapter: IPAdapter, positive: torch.Tensor) -> torch.Tensor:
    if not adapter.reads_patches:
        return torch.zeros_like(positive)
    if adapter.image_encoder is None:
        raise BadParameter(
            "ip_adapter_image_embeds must hold the negative embedding too, on a first axis of 2: this adapter reads "
            "patches, and the model has no image_encoder to make it",
            "ip_adapter_image_embeds",
        )
    size = int(adapter.image_encoder.config.image_size)
    return _encode(adapter, torch.zeros(3, size, size))[None].expand_as(positive)


def _project(adapter: IPAdapter, embeds: torch.Tensor) -> torch.Tensor:
    """Tokens [pictures x tokens, C] of embeddings [pictures, (S,) D]."""
    weight = next(adapter.projection.parameters())
    return adapter.projection(to_device(embeds, weight.device).to(weight.dtype)).flatten(0, 1)


def _pixels(image: Image.Image, size: int) -> np.ndarray[Any, Any]:
    """CLIP's input, float32 [3, size, size]: the short side scaled to `size`, the long one cropped, normalised."""
    width, height = image.size
    fitted = (size, int(size * height / width)) if width <= height else (int(size * width / height), size)
    left, top = (fitted[0] - size) // 2, (fitted[1] - size) // 2
    square = image.resize(fitted, Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))
    values = np.asarray(square, dtype=np.float32) / 255
    normal = (values - np.array(CLIP_MEAN, dtype=np.float32)) / np.array(CLIP_STD, dtype=np.float32)
    return np.ascontiguousarray(normal.transpose(2, 0, 1))
