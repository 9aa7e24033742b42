"""Latents -> uint8 frames, in chunks that fit in memory, with a guard against NaN; and how much a video moves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np
import torch

from pia_ray.errors import NonFiniteFrames
from pia_ray.pia.assemble import Components

CHUNK_PIXELS: Final = 16 * 512 * 512
"""Pixels decoded at once: 16 frames of 512 x 512, some 6 GiB of activations in float16."""


def decode(components: Components, latents: torch.Tensor) -> torch.Tensor:
    """Frames of latents [4, T, h, w]: uint8 [T, H, W, 3] on the model's device.

    Raises:
        NonFiniteFrames: the latents or the decoded values hold NaN or infinity.
        torch.OutOfMemoryError: not even one frame fits.
    """
    return _decode(components, latents, quantised)


def decode_exactly(components: Components, latents: torch.Tensor) -> torch.Tensor:
    """Frames of latents [4, T, h, w] as they leave the decoder: float32 [T, 3, H, W], 0 to 1, in host memory.

    Raises:
        NonFiniteFrames, torch.OutOfMemoryError: as `decode`.
    """
    return _decode(components, latents, torch.Tensor.cpu)


def quantised(values: torch.Tensor) -> torch.Tensor:
    """Frames of 8 bits, uint8 [T, H, W, 3], of values [T, 3, H, W] from 0 to 1."""
    return (values * 255).round().to(torch.uint8).permute(0, 2, 3, 1)


def require_finite(latents: torch.Tensor) -> None:
    """Refuses latents that no decoder can make a picture of.

    Raises:
        NonFiniteFrames: they hold NaN or infinity.
    """
    if not bool(torch.isfinite(latents).all()):
        raise NonFiniteFrames(_NOT_FINITE)


@torch.inference_mode()
def _decode(
    components: Components, latents: torch.Tensor, finish: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    require_finite(latents)
    scaled = (latents / components.latent_scale).permute(1, 0, 2, 3).to(components.dtype)  # [T, 4, h, w]
    pixels = scaled.shape[-1] * scaled.shape[-2] * components.spatial_factor**2
    chunk = max(1, CHUNK_PIXELS // pixels)
    while True:
        try:
            return torch.cat([finish(_decode_chunk(components, part)) for part in scaled.split(chunk)])
        except torch.OutOfMemoryError:
            if chunk == 1:
                raise
        chunk //= 2
        torch.cuda.empty_cache()


@torch.inference_mode()
def measure_motion(frames: torch.Tensor) -> float:
    """Mean L1 distance of each frame from the first over hue, saturation, value and an edge channel, 0 to 1.

    `frames` is uint8 [T, H, W, 3]. Source: the motion score of PIA's training, arXiv 2312.13964, section 4; the edge
    channel here is the gradient of the value, which needs no threshold.
    """
    if len(frames) < 2:
        return 0.0
    first = _motion_channels(frames[0])  # [4, H, W]
    total = 0.0
    for frame in frames[1:]:  # one at a time bounds memory
        other = _motion_channels(frame)
        distance = (other - first).abs()
        # Hue is a circle: 0.95 and 0.05 are near.
        distance[0] = torch.minimum(distance[0], 1 - distance[0]) * 2 * torch.minimum(other[1], first[1])
        total += float(distance.mean())
    return total / (len(frames) - 1)


def to_numpy(frames: torch.Tensor) -> np.ndarray[Any, Any]:
    """The same frames in host memory."""
    return np.ascontiguousarray(frames.cpu().numpy())


_NOT_FINITE: Final = (
    "the model produced NaN or infinite values for this row: try another seed, or dtype float32 or bfloat16"
)


def _decode_chunk(components: Components, latents: torch.Tensor) -> torch.Tensor:
    values = components.vae.decode(latents, return_dict=False)[0].float()  # [t, 3, H, W]
    if not bool(torch.isfinite(values).all()):
        raise NonFiniteFrames(_NOT_FINITE)
    return (values / 2 + 0.5).clamp(0, 1)


def _motion_channels(frame: torch.Tensor) -> torch.Tensor:
    values = frame.permute(2, 0, 1).float() / 255
    red, green, blue = values
    value, _ = values.max(0)
    spread = value - values.min(0).values
    safe = spread.clamp_min(1e-6)
    hue = torch.where(
        value == red,
        (green - blue) / safe,
        torch.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    hue = (hue / 6) % 1
    saturation = spread / value.clamp_min(1e-6)
    edge = torch.zeros_like(value)
    edge[:-1] += (value[1:] - value[:-1]).abs()
    edge[:, :-1] += (value[:, 1:] - value[:, :-1]).abs()
    return torch.stack([hue, saturation, value, edge.clamp_max(1)])
