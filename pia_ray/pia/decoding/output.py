"""Denoised latents -> what a request asks for: 8-bit frames, and beside them pictures, floats or the latents.

In two parts: the first tells the device what to make, the second waits for it, on any thread, beside the next forwards.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from pia_ray.pia.components import Components
from pia_ray.pia.decoding.decode import Decoded, begin_decode, begin_decode_exactly, quantised, require_finite
from pia_ray.pia.decoding.motion_score import measure_motion
from pia_ray.pia.device.errors import is_out_of_memory
from pia_ray.types import AnimationRequest


@dataclass(frozen=True)
class Making:
    """What a device has been told to make of a row's latents."""

    request: AnimationRequest
    latents: torch.Tensor
    decoded: Decoded | None
    """None where the latents are all that is asked for."""


def begin(components: Components, latents: torch.Tensor, request: AnimationRequest) -> Making:
    """Tells the device to make what the request asks for, and does not wait for it.

    Raises:
        torch.OutOfMemoryError: not even one frame fits.
    """
    if request.output_type == "latent":
        return Making(request, latents, None)
    exact = request.output_type in ("np", "pt")
    return Making(request, latents, (begin_decode_exactly if exact else begin_decode)(components, latents))


@torch.inference_mode()
def finished(making: Making) -> tuple[np.ndarray[Any, Any], float, Any]:
    """Frames (uint8 [T, H, W, 3]), how much they move, and the output of the type that the request asks for.

    Waits for the device; for any thread. Latents that are asked for are not decoded: no frames, no motion.

    Raises:
        NonFiniteFrames: the latents or the decoded values hold NaN or infinity.
    """
    request, decoded = making.request, making.decoded
    params = request.params
    if decoded is None:
        require_finite(making.latents)
        frames = np.empty((0, params.height or 0, params.width or 0, 3), np.uint8)
        return frames, 0.0, _ordinary(making.latents.float().cpu())
    decoded.wait()
    if request.output_type in ("np", "pt"):
        values = decoded.to_host()  # [T, 3, H, W]
        pixels = quantised(values).contiguous()
        output: Any = _ordinary(values)
        if request.output_type == "np":
            output = np.ascontiguousarray(values.permute(0, 2, 3, 1).numpy())  # [T, H, W, 3]
        return pixels.numpy(), measure_motion(pixels, params.condition_frame), output
    pixels = decoded.to_host()
    frames = pixels.numpy()
    motion = _motion(decoded, pixels, params.condition_frame)
    return frames, motion, [Image.fromarray(frame) for frame in frames] if request.output_type == "pil" else frames


class _Beside(threading.local):
    """A stream of this thread's own: reading a score waits for what stands before it there, not for other rows."""

    stream: torch.cuda.Stream | None = None


_beside = _Beside()


def _motion(decoded: Decoded, pixels: torch.Tensor, condition_frame: int) -> float:
    """The score on the device of the frames, or where no memory is left beside the forwards, on the CPU."""
    device = decoded.chunks[0].device
    if device.type != "cuda":
        return measure_motion(pixels, condition_frame)
    if _beside.stream is None:
        _beside.stream = torch.cuda.Stream(device)
    try:
        with torch.cuda.stream(_beside.stream):
            return measure_motion(torch.cat(decoded.chunks), condition_frame)  # reading it waits for the stream
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        _beside.stream.synchronize()
        return measure_motion(pixels, condition_frame)


def _ordinary(tensor: torch.Tensor) -> torch.Tensor:
    """A copy that callers may write to and use with autograd, as they may not what is made in inference mode."""
    with torch.inference_mode(False):
        return tensor.clone()
