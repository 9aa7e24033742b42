"""Frames enlarged by Lanczos, where the caller has no network for it."""

from __future__ import annotations

import logging
from functools import cache
from typing import Final

import numpy as np
from PIL import Image

from pia_ray.media.video_facts import Frames

LANCZOS: Final = "upscaled_lanczos"
"""Among the flags of a video that was enlarged without a network."""

_log = logging.getLogger(__name__)


def enlarge(frames: Frames, factor: int) -> Frames:
    """Frames uint8 [T, H, W, 3], RGB -> [T, factor H, factor W, 3]; themselves where the factor is 1."""
    if factor == 1:
        return frames
    _say_once()
    count, height, width = frames.shape[:3]
    enlarged = np.empty((count, factor * height, factor * width, 3), np.uint8)
    for source, target in zip(frames, enlarged, strict=True):
        size = (factor * width, factor * height)
        target[:] = np.asarray(Image.fromarray(source).resize(size, Image.Resampling.LANCZOS))
    return enlarged


@cache
def _say_once() -> None:
    """Logs it once in a process."""
    _log.warning("videos are enlarged by Lanczos, because their model has no upscaler")
