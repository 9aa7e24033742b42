"""Flags of a suspicious video: frames that are black, or that all are the same. Reads no files."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from PIL import Image

BLACK_FRAMES: Final = "black_frames"
FROZEN: Final = "frozen"

BLACK_LEVEL: Final = 4.0
"""Mean of the 8-bit values of a frame below which it counts as black."""

BLACK_PICTURE_LEVEL: Final = 8.0
"""Mean of a picture from which on its video should have no black frame; a video of a darker picture may have some."""

FROZEN_LEVELS: Final = 0.5
"""Mean difference from the first frame, in 8-bit levels, that no frame of a frozen video exceeds: rounding alone."""


def flags_of(frames: np.ndarray[Any, Any], picture: Image.Image) -> tuple[str, ...]:
    """Any of `black_frames` and `frozen`, for frames (uint8 [T, H, W, 3]) that were made of an RGB picture.

    A black frame counts only where the picture is not black itself; a video of one frame is never frozen.
    """
    flags = []
    # Its mean needs no full size: a box filter keeps it.
    small = picture.convert("RGB").resize((64, 64), Image.Resampling.BOX, reducing_gap=2.0)
    is_dark = float(np.asarray(small).mean()) < BLACK_PICTURE_LEVEL
    if not is_dark and any(float(frame.mean()) < BLACK_LEVEL for frame in frames):
        flags.append(BLACK_FRAMES)
    first = frames[0].astype(np.int16) if len(frames) > 1 else None
    if first is not None and all(float(np.abs(frame - first).mean()) <= FROZEN_LEVELS for frame in frames[1:]):
        flags.append(FROZEN)
    return tuple(flags)
