"""Latents -> frames, in chunks that fit in memory, with a check for NaN. Starting a decode does not wait for a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch

from pia_ray.errors import NonFiniteFrames
from pia_ray.pia.components import Components
from pia_ray.pia.decoding.vae_decoder import VaeDecoder, decoder_of
from pia_ray.pia.device.errors import is_out_of_memory
from pia_ray.pia.device.memory import frames_at_once
from pia_ray.pia.device.timing import DeviceEvent, record_event
from pia_ray.pia.device.vae_tiling import TILE_PIXELS, is_tiled, tiled


@dataclass(frozen=True)
class PendingFrames:
    """Frames in chunks; the device may still be decoding them."""

    chunks: tuple[torch.Tensor, ...]
    """The frames on the device, or in host memory where only exact values are wanted."""
    on_host: tuple[torch.Tensor, ...]
    """The same frames in host memory; those of a GPU in pinned memory."""
    latents_finite: torch.Tensor
    values_finite: torch.Tensor
    """bool, in host memory: for the latents, and for each chunk."""
    end: DeviceEvent | None
    """The device reaches it when all tensors may be read."""

    def wait(self) -> None:
        """Waits for the device.

        Raises:
            NonFiniteFrames: the latents or the decoded values hold NaN or infinity.
        """
        if self.end is not None:
            self.end.synchronize()
        if not bool(self.latents_finite.all()):
            raise NonFiniteFrames(_NOT_FINITE)
        if not bool(self.values_finite.all()):
            raise NonFiniteFrames(_VAE_NOT_FINITE)

    def to_host(self) -> torch.Tensor:
        """All frames in host memory, after `wait`."""
        if len(self.on_host) == 1 and self.end is None:
            return self.on_host[0]
        return torch.cat(self.on_host)  # a copy, so that pinned memory is free again at once


def begin_decode(components: Components, latents: torch.Tensor) -> PendingFrames:
    """Frames of latents [4, T, h, w]: uint8 [T, H, W, 3] on the model's device and on the host.

    Raises:
        torch.OutOfMemoryError: not even one frame fits.
    """
    return _decode(components, latents, quantised, keep=True)


def begin_decode_exactly(components: Components, latents: torch.Tensor) -> PendingFrames:
    """Frames of latents [4, T, h, w] without rounding: float32 [T, 3, H, W], 0 to 1, in host memory.

    Raises:
        torch.OutOfMemoryError: not even one frame fits.
    """
    return _decode(components, latents, lambda values: values, keep=False)


def decode(components: Components, latents: torch.Tensor) -> torch.Tensor:
    """Frames of latents [4, T, h, w]: uint8 [T, H, W, 3] on the model's device, after it has made them.

    Raises:
        NonFiniteFrames: the latents or the decoded values hold NaN or infinity.
        torch.OutOfMemoryError: not even one frame fits.
    """
    decoded = begin_decode(components, latents)
    decoded.wait()
    return torch.cat(decoded.chunks)


def quantised(values: torch.Tensor) -> torch.Tensor:
    """Frames of 8 bits, uint8 [T, H, W, 3], of values [T, 3, H, W] from 0 to 1."""
    return (values * 255).round().to(torch.uint8).permute(0, 2, 3, 1)


def require_finite(latents: torch.Tensor) -> None:
    """Checks that latents can be decoded.

    Raises:
        NonFiniteFrames: they hold NaN or infinity.
    """
    if not bool(torch.isfinite(latents).all()):
        raise NonFiniteFrames(_NOT_FINITE)


def to_numpy(frames: torch.Tensor) -> np.ndarray[Any, Any]:
    """The same frames in host memory."""
    return np.ascontiguousarray(frames.cpu().numpy())


_NOT_FINITE: Final = (
    "the model produced NaN or infinite values for this row: try another seed, or dtype float32 or bfloat16"
)
_VAE_NOT_FINITE: Final = (
    "the VAE produced NaN or infinite values for this row: try the model with vae_dtype float32 or bfloat16"
)


@torch.inference_mode()
def _decode(
    components: Components,
    latents: torch.Tensor,
    finish: Callable[[torch.Tensor], torch.Tensor],
    *,
    keep: bool,
) -> PendingFrames:
    latents_finite = torch.isfinite(latents).all()
    scaled = (latents / components.latent_scale).permute(1, 0, 2, 3).to(components.vae_dtype)  # [T, 4, h, w]
    height, width = (side * components.spatial_factor for side in scaled.shape[-2:])
    decoder = decoder_of(components)
    most = decoder.most_frames or len(scaled)
    chunk = min(len(scaled), most, frames_at_once(components, height=height, width=width))
    while True:
        chunks, on_host, finite = [], [], []
        try:
            for part in scaled.split(chunk):
                values = _run_vae(components, decoder, part)  # [t, 3, H, W]
                finite.append(torch.isfinite(values).all())
                made = finish((values / 2 + 0.5).clamp(0, 1)).contiguous()
                on_host.append(_sent(made))
                if keep:
                    chunks.append(made)
        except (RuntimeError, MemoryError) as error:
            if chunk == 1 or not is_out_of_memory(error):
                raise
        else:
            flags = _sent(latents_finite), _sent(torch.stack(finite))
            kept = chunks if keep else on_host
            return PendingFrames(tuple(kept), tuple(on_host), *flags, end=record_event(components.device))
        chunk //= 2
        torch.cuda.empty_cache()


def _sent(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in host memory; from a GPU by a copy to pinned memory that may still be running."""
    return tensor.to("cpu", non_blocking=True)


def _run_vae(components: Components, decoder: VaeDecoder, latents: torch.Tensor) -> torch.Tensor:
    factor = components.spatial_factor
    height, width = (side * factor for side in latents.shape[-2:])
    if not is_tiled(components.vae_tiling, height=height, width=width):
        return decoder(latents).float()
    return tiled(decoder, latents, tile=TILE_PIXELS // factor, scale=factor)
