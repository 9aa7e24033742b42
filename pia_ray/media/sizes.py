"""The size of a video and how its picture is fitted: buckets of equal area, cropping, scaling."""

from __future__ import annotations

import math

from PIL import Image

from pia_ray.config.finish_knobs import Fit

Focus = tuple[float, float]
"""A point of a picture: x and y, each 0 to 1, from the left and the top."""


def buckets(long_edge: int, size_step: int) -> tuple[tuple[int, int], ...]:
    """The sizes (width, height) a model works at: one side is `long_edge`, the other half of it or more, in steps."""
    low = math.ceil(long_edge / 2 / size_step) * size_step
    shorts = [*range(low, long_edge, size_step), long_edge]
    return tuple((long_edge, short) for short in shorts) + tuple((short, long_edge) for short in shorts[-2::-1])


def choose_size(
    original: tuple[int, int],
    *,
    long_edge: int,
    size_step: int,
    width: int | None,
    height: int | None,
    aspect_ratio: float | None = None,
    fitting: Fit = "crop",
) -> tuple[int, int]:
    """The size (width, height) at which a picture of the size `original` is animated.

    Without `width` and `height`: the bucket of the nearest aspect ratio. With one of them: the other follows the
    picture's aspect ratio, as a multiple of 8. With both: those. `aspect_ratio` is that of the file: to crop to it, it
    stands for the picture's; else the size follows the picture. There the shorter side is the nearest multiple of 8.
    """
    aspect = original[0] / original[1] if aspect_ratio is None or fitting != "crop" else aspect_ratio
    if width is not None and height is not None:
        return width, height
    if width is not None:
        return width, _eights(width / aspect)
    if height is not None:
        return _eights(height * aspect), height
    if aspect_ratio is not None:
        return (long_edge, _eights(long_edge / aspect)) if aspect >= 1 else (_eights(long_edge * aspect), long_edge)
    return min(buckets(long_edge, size_step), key=lambda size: abs(math.log(size[0] / size[1] / aspect)))


def fit(image: Image.Image, size: tuple[int, int], *, focus: Focus | None = None) -> Image.Image:
    """The part of the image around `focus` at exactly `size` (width, height): scaled to cover it, never squashed."""
    if image.size == size:
        return image
    # A gap of 3 first shrinks very large pictures by whole numbers, which the Lanczos filter cannot tell apart.
    return image.resize(size, Image.Resampling.LANCZOS, box=_part(image.size, size, focus), reducing_gap=3.0)


def fit_mask(
    mask: Image.Image, original: tuple[int, int], size: tuple[int, int], *, focus: Focus | None = None
) -> Image.Image:
    """A mask, mode L, cropped and scaled as `fit` does with a picture of the size `original`.

    A mask of another size than its picture is first stretched over it. Unlike `fit`, no filter overshoots: what is
    black or white over the reach of the filter stays so.
    """
    grey = mask.convert("L")
    if grey.size != original:
        grey = grey.resize(original, Image.Resampling.BILINEAR)
    if grey.size != size:
        grey = grey.resize(size, Image.Resampling.BILINEAR, box=_part(original, size, focus))
    return grey


def _part(original: tuple[int, int], size: tuple[int, int], focus: Focus | None) -> tuple[float, float, float, float]:
    """The part (left, top, right, bottom) of a picture that a video of `size` shows, as near to `focus` as there is."""
    scale = max(size[0] / original[0], size[1] / original[1])
    width, height = min(original[0], size[0] / scale), min(original[1], size[1] / scale)
    left, top = (original[0] - width) / 2, (original[1] - height) / 2
    if focus is not None:
        left = min(max(0.0, original[0] * focus[0] - width / 2), 2 * left)
        top = min(max(0.0, original[1] * focus[1] - height / 2), 2 * top)
    return left, top, left + width, top + height


def _eights(side: float) -> int:
    return min(2048, max(8, round(side / 8) * 8))
