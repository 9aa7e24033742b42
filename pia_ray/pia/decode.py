"""Latents -> uint8 frames, in chunks that fit in memory, with a guard against NaN."""

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
