"""Frames on the canvas of their file: bars, or the picture itself enlarged and blurred, around them."""

from __future__ import annotations

from typing import Final

import numpy as np
from PIL import Image, ImageColor, ImageFilter

from pia_ray.config.canvas import canvas_of
from pia_ray.config.finish_knobs import FinishKnobs
from pia_ray.media.sizes import fit
from pia_ray.media.video_facts import Frames

_REDUCTION: Final = 8
"""Times that the background is smaller than the canvas while it is blurred."""

_BLUR: Final = 0.03
"""Standard deviation of the blur, in long edges of the canvas."""


def framed(frames: Frames, params: FinishKnobs) -> Frames:
    """The frames, uint8 [T, H, W, 3], in the middle of the canvas that `aspect` asks for; themselves without one."""
    height, width = frames.shape[1:3]
    canvas = canvas_of((width, height), params)
    if canvas == (width, height):
        return frames
    result = np.empty((len(frames), canvas[1], canvas[0], 3), np.uint8)
    if params.fit == "pad":
        result[:] = ImageColor.getrgb(params.pad_colour)
    else:
        for index, frame in enumerate(frames):
            result[index] = np.asarray(_blurred(Image.fromarray(frame), canvas))
    left, top = (canvas[0] - width) // 2, (canvas[1] - height) // 2
    result[:, top : top + height, left : left + width] = frames
    return result


def _blurred(picture: Image.Image, canvas: tuple[int, int]) -> Image.Image:
    """The middle of the picture over the whole canvas, blurred."""
    small = (max(1, canvas[0] // _REDUCTION), max(1, canvas[1] // _REDUCTION))
    blur = ImageFilter.GaussianBlur(_BLUR * max(small))
    return fit(picture, small).filter(blur).resize(canvas, Image.Resampling.BICUBIC)
