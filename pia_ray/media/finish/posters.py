"""A frame as a picture file of full size."""

from __future__ import annotations

import io
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final, Literal

from PIL import Image

from pia_ray.media.marking.xmp import mark_packet
from pia_ray.media.video_facts import Frames

MIME: Final[Mapping[str, str]] = MappingProxyType({"jpg": "image/jpeg", "webp": "image/webp"})
"""Content type of each kind of poster."""


def write_poster(frame: Frames, kind: Literal["jpg", "webp"]) -> bytes:
    """The frame, uint8 [H, W, 3], RGB, as a JPEG or WebP file that says that it is generated."""
    file = io.BytesIO()
    picture = Image.fromarray(frame)
    if kind == "jpg":
        picture.save(file, "JPEG", quality=92, subsampling=0, optimize=True, xmp=mark_packet())
    else:
        picture.save(file, "WEBP", quality=90, method=4, xmp=mark_packet())
    return file.getvalue()
