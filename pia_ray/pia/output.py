"""Denoised latents -> what a request asks for: 8-bit frames, and beside them pictures, floats or the latents."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image

from pia_ray.params import AnimationRequest
from pia_ray.pia.assemble import Components
from pia_ray.pia.decode import decode, decode_exactly, quantised, require_finite, to_numpy
from pia_ray.pia.motion import measure_motion


@torch.inference_mode()
def finished(
    components: Components, latents: torch.Tensor, request: AnimationRequest
) -> tuple[np.ndarray[Any, Any], float, Any]:
    """Frames (uint8 [T, H, W, 3]), how much they move, and the output of the type that the request asks for.

    Latents that are asked for are not decoded: no frames, no motion.

    Raises:
        NonFiniteFrames: the latents or the decoded values hold NaN or infinity.
        torch.OutOfMemoryError: not even one frame fits.
    """
    kind, params = request.output_type, request.params
    if kind == "latent":
        require_finite(latents)
        frames = np.empty((0, params.height or 0, params.width or 0, 3), np.uint8)
        return frames, 0.0, _ordinary(latents.float().cpu())
    if kind in ("np", "pt"):
        values = decode_exactly(components, latents)  # [T, 3, H, W]
        pixels = quantised(values)
        output: Any = _ordinary(values)
        if kind == "np":
            output = np.ascontiguousarray(values.permute(0, 2, 3, 1).numpy())  # [T, H, W, 3]
        return to_numpy(pixels), measure_motion(pixels, params.condition_frame), output
    pixels = decode(components, latents)
    frames = to_numpy(pixels)
    return (
        frames,
        measure_motion(pixels, params.condition_frame),
        [Image.fromarray(frame) for frame in frames] if kind == "pil" else frames,
    )


def _ordinary(tensor: torch.Tensor) -> torch.Tensor:
    """A copy that callers may write to and use with autograd, as they may not what is made in inference mode."""
    with torch.inference_mode(False):
        return tensor.clone()
