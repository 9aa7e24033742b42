"""Latents -> uint8 frames, in chunks that fit in memory, with a guard against NaN."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np
import torch

from pia_ray.errors import NonFiniteFrames
from pia_ray.pia.assemble import Components
from pia_ray.pia.faults import is_out_of_memory
from pia_ray.pia.memory import frames_at_once
from pia_ray.pia.tiling import TILE_PIXELS, is_tiled, tiled


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
    scaled = (latents / components.latent_scale).permute(1, 0, 2, 3).to(components.vae_dtype)  # [T, 4, h, w]
    height, width = (side * components.spatial_factor for side in scaled.shape[-2:])
    chunk = min(len(scaled), frames_at_once(components, height=height, width=width))
    while True:
        try:
            return torch.cat([finish(_decode_chunk(components, part)) for part in scaled.split(chunk)])
        except (RuntimeError, MemoryError) as error:
            if chunk == 1 or not is_out_of_memory(error):
                raise
        chunk //= 2
        torch.cuda.empty_cache()


def to_numpy(frames: torch.Tensor) -> np.ndarray[Any, Any]:
    """The same frames in host memory."""
    return np.ascontiguousarray(frames.cpu().numpy())


_NOT_FINITE: Final = (
    "the model produced NaN or infinite values for this row: try another seed, or dtype float32 or bfloat16"
)
_VAE_NOT_FINITE: Final = (
    "the VAE produced NaN or infinite values for this row: try the model with vae_dtype float32 or bfloat16"
)


def _decode_chunk(components: Components, latents: torch.Tensor) -> torch.Tensor:
    values = _run_vae(components, latents)  # [t, 3, H, W]
    if not bool(torch.isfinite(values).all()):
        raise NonFiniteFrames(_VAE_NOT_FINITE)
    return (values / 2 + 0.5).clamp(0, 1)


def _run_vae(components: Components, latents: torch.Tensor) -> torch.Tensor:
    vae, factor = components.vae, components.spatial_factor
    height, width = (side * factor for side in latents.shape[-2:])
    if not is_tiled(components.vae_tiling, height=height, width=width):
        return vae.decode(latents, return_dict=False)[0].float()
    return tiled(lambda tile: vae.decode(tile, return_dict=False)[0], latents, tile=TILE_PIXELS // factor, scale=factor)
