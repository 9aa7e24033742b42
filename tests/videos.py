"""The frames of finished video files, for tests that compare them."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image, ImageSequence


def decode_frames(video: bytes | Path) -> np.ndarray[Any, Any]:
    """All frames of an mp4, webm, gif or webp: uint8 [T, H, W, 3], RGB."""
    content = video if isinstance(video, bytes) else video.read_bytes()
    if content.startswith((b"GIF8", b"RIFF")):
        with Image.open(BytesIO(content)) as image:
            return np.stack([np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(image)])
    with av.open(BytesIO(content)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
