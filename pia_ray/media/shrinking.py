"""Very large pictures made smaller by whole numbers while they are decoded, before copies of them are made.

What is left is more than any video shows: a row's frames are scaled from it by a filter that cannot tell the two apart.
"""

from __future__ import annotations

import math
from typing import Final

from PIL import Image, JpegImagePlugin

from pia_ray.media.colour import split

FULL_SIDE: Final = 2048
"""Pixels of the shorter side down to which a picture is shrunk: the frames of a video have no more."""
PANORAMA_SIDE: Final = 1024
PANORAMA_PIXELS: Final = 16_000_000
"""The same of a picture whose longer side is more than 3 times the shorter, while it has more than these pixels."""

_STRIP_PIXELS: Final = 4_000_000


def shrink_factor(size: tuple[int, int]) -> int:
    """The whole number by which both sides of a picture of that size are divided; 1 leaves it as it is."""
    shorter, pixels = min(size), size[0] * size[1]
    factor = max(1, shorter // FULL_SIDE)
    if max(size) <= 3 * shorter:
        return factor
    return max(factor, min(math.ceil(math.sqrt(pixels / PANORAMA_PIXELS)), shorter // PANORAMA_SIDE))


def draft(image: Image.Image, factor: int) -> int:
    """Lets a JPEG that is not loaded decode at 1/2, 1/4 or 1/8 of its size; the part of the factor that is left."""
    if not isinstance(image, JpegImagePlugin.JpegImageFile) or factor < 2:
        return factor
    drafted = max(scale for scale in (2, 4, 8) if scale <= factor)
    width, height = image.size
    image.draft(None, (width // drafted, height // drafted))
    return factor // max(1, width // image.width)


def decoding_bytes(image: Image.Image, factor: int) -> int:
    """About the memory that decoding takes at its peak, of a picture not loaded yet, by its factor before `draft`."""
    pixels = image.width * image.height
    if isinstance(image, JpegImagePlugin.JpegImageFile):
        # A progressive one keeps its coefficients: 2 bytes for each of at most 3 values a pixel.
        full = 6 * pixels if image.info.get("progressive") else 0
    else:
        full = pixels * {"1": 1, "L": 1, "P": 1, "LA": 4, "I;16": 2, "I;16B": 2, "I": 4, "F": 4}.get(image.mode, 4)
    return full + _COPIES * pixels // factor**2


_COPIES: Final = 18
"""Bytes per pixel of a picture of its own size, its colour, its alpha and what is made of them."""


def shrunk(image: Image.Image, factor: int, notes: list[str], *, white_is_zero: bool) -> Image.Image:
    """The loaded image divided by the factor, in strips: L, LA, RGB, RGBA, CMYK, LAB or YCbCr, with its profile."""
    width, height = image.size
    rows = max(1, _STRIP_PIXELS // (width * factor)) * factor
    found: Image.Image | None = None
    seen: set[str] = set()
    for top in range(0, height, rows):
        own: list[str] = []
        strip = image.crop((0, top, width, min(height, top + rows)))
        colour, alpha = split(strip, own, white_is_zero=white_is_zero)
        if alpha is not None:
            colour = Image.merge("LA" if colour.mode == "L" else "RGBA", (*colour.split(), alpha))
        part = colour.reduce(factor)  # of pictures with alpha by visible colour
        if found is None:
            found = Image.new(part.mode, (part.width, math.ceil(height / factor)))
        found.paste(part, (0, top // factor))
        notes += [note for note in own if note not in seen]
        seen.update(own)
    assert found is not None
    if "icc_profile" in image.info:
        found.info["icc_profile"] = image.info["icc_profile"]
    return found
