"""The frames of finished video files, for tests that compare them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import imageio.v3 as iio
import numpy as np


def decode_frames(video: bytes | Path) -> np.ndarray[Any, Any]:
    """All frames of an mp4, webm, gif or webp: uint8 [T, H, W, 3], RGB."""
    content = video if isinstance(video, bytes) else video.read_bytes()
    of_pictures = content.startswith((b"GIF8", b"RIFF"))
    plugin, mode = ("pillow", {"mode": "RGB"}) if of_pictures else ("pyav", {})
    return np.stack(list(iio.imiter(content, plugin=plugin, **mode)))
