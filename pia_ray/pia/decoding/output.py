"""Denoised latents -> 8-bit frames, and the output type of the request: pictures, floats or the latents.

The work has two parts: the first queues it on the device, the second waits for it, on any thread, while the next
forwards run.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from pia_ray.pia.components import Components
from pia_ray.pia.decoding.decode import PendingFrames, begin_decode, begin_decode_exactly, quantised, require_finite
from pia_ray.pia.decoding.motion_score import measure_motion
from pia_ray.pia.device.errors import is_out_of_memory
from pia_ray.pia.safety_checker import SafetyChecker
from pia_ray.pia.scorer import Scorer, Similarities
from pia_ray.types import PreparedRequest


@dataclass(frozen=True)
class PendingOutput:
    """The output of a row; the device may still be making it."""

    request: PreparedRequest
    latents: torch.Tensor
    decoded: PendingFrames | None
    """None where only the latents are wanted."""
    scorer: Scorer | None = None
    safety_checker: SafetyChecker | None = None


@dataclass(frozen=True)
class FinishedOutput:
    """The output of a row, and its measurements."""

    frames: np.ndarray[Any, Any]
    """uint8 [T, H, W, 3]; empty where only the latents are wanted."""
    output: Any
    """Of the request's type."""
    motion: float = 0.0
    similarities: Similarities | None = None
    """None without a scorer."""
    nsfw: bool | None = None
    """Whether a frame is not safe; None without a safety checker."""


def begin_output(components: Components, latents: torch.Tensor, request: PreparedRequest) -> PendingOutput:
    """The row's output, queued on the device; does not wait for it.

    Raises:
        torch.OutOfMemoryError: not even one frame fits.
    """
    if request.output_type == "latent":
        return PendingOutput(request, latents, None)
    exact = request.output_type in ("np", "pt")
    begin_frames = begin_decode_exactly if exact else begin_decode
    decoded = begin_frames(components, latents)
    return PendingOutput(request, latents, decoded, components.scorer, components.safety_checker)


@torch.inference_mode()
def finish_output(pending: PendingOutput) -> FinishedOutput:
    """The frames, the output of the request's type, and the measurements that need torch.

    Waits for the device; any thread may call it. Where only latents are wanted, there are no frames and no motion.

    Raises:
        NonFiniteFrames: the latents or the decoded values hold NaN or infinity.
    """
    request, decoded = pending.request, pending.decoded
    params = request.params
    if decoded is None:
        require_finite(pending.latents)
        frames = np.empty((0, *request.size[::-1], 3), np.uint8)
        return FinishedOutput(frames, _ordinary(pending.latents.float().cpu()))
    decoded.wait()
    if request.output_type in ("np", "pt"):
        values = decoded.to_host()  # [T, 3, H, W]
        pixels = quantised(values).contiguous()
        output: Any = _ordinary(values)
        if request.output_type == "np":
            output = np.ascontiguousarray(values.permute(0, 2, 3, 1).numpy())  # [T, H, W, 3]
        motion = measure_motion(pixels, params.condition_frame)
        return FinishedOutput(pixels.numpy(), output, motion, _similarities(pending, pixels), _nsfw(pending, pixels))
    pixels = decoded.to_host()
    frames = pixels.numpy()
    motion = _motion(decoded, pixels, params.condition_frame)
    output = [Image.fromarray(frame) for frame in frames] if request.output_type == "pil" else frames
    return FinishedOutput(frames, output, motion, _similarities(pending, pixels), _nsfw(pending, pixels))


class _RowStream(threading.local):
    """A stream for each thread, so that reading a number waits for the work in it, and not for that of other rows."""

    stream: torch.cuda.Stream | None = None


_row_stream = _RowStream()


def _motion(decoded: PendingFrames, pixels: torch.Tensor, condition_frame: int) -> float:
    """The motion score, on the device of the frames, or on the CPU where the forwards leave too little memory."""
    device = decoded.chunks[0].device
    if device.type != "cuda":
        return measure_motion(pixels, condition_frame)
    stream = _stream(device)
    try:
        with torch.cuda.stream(stream):
            return measure_motion(torch.cat(decoded.chunks), condition_frame)  # reading it waits for the stream
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        stream.synchronize()
        return measure_motion(pixels, condition_frame)


def _similarities(pending: PendingOutput, pixels: torch.Tensor) -> Similarities | None:
    """The scorer's similarities of frames in host memory, measured on its own device."""
    scorer, request = pending.scorer, pending.request
    if scorer is None:
        return None
    if scorer.mean.device.type != "cuda":
        return scorer.similarities(pixels, image=request.image, prompt=request.params.prompt)
    with torch.cuda.stream(_stream(scorer.mean.device)):
        return scorer.similarities(pixels, image=request.image, prompt=request.params.prompt)


def _nsfw(pending: PendingOutput, pixels: torch.Tensor) -> bool | None:
    """The safety checker's verdict on frames in host memory, found on its own device."""
    checker = pending.safety_checker
    if checker is None:
        return None
    if checker.mean.device.type != "cuda":
        return checker.is_unsafe(pixels)
    with torch.cuda.stream(_stream(checker.mean.device)):
        return checker.is_unsafe(pixels)


def _stream(device: torch.device) -> torch.cuda.Stream:
    if _row_stream.stream is None:
        _row_stream.stream = torch.cuda.Stream(device)
    return _row_stream.stream


def _ordinary(tensor: torch.Tensor) -> torch.Tensor:
    """A copy that callers may write to and use with autograd, which tensors made in inference mode do not allow."""
    with torch.inference_mode(False):
        return tensor.clone()
