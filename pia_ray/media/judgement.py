"""Numbers that say how good a video is, from its frames and its picture alone: no weights, no files.

The fields of `Judgement` define them; `benchmarks/damage.py` measures the damages that each tells from a clean video.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
from PIL import Image

from pia_ray.errors import BadParameter
from pia_ray.media.registration import Registration, Warped, reduced, register
from pia_ray.media.sizes import fit

Array = np.ndarray[Any, Any]

LONG_EDGE: Final = 128
"""Frames are compared at this size, in px: likeness at half of it, flicker and colour at a quarter. Those that are no
larger than half of it are compared at half of it."""

MOST_FRAMES: Final = 48
"""Of a longer video so many frames, evenly spaced, are registered to the picture."""

_STEP: Final = 16
"""Sides at LONG_EDGE are multiples of it: those of colours are then whole blocks at a quarter of it."""

_SHORTEST: Final = 32
_WINDOW: Final = 7
_SSIM_FLOORS: Final = (0.01**2, 0.03**2)
_PARTS: Final = 6
"""Parts along each side."""

_SMOOTHING: Final = 5
"""Pixels: with 3 a zoom, which brings detail that the picture lacks, looks like letters that dissolve."""

_BLOCK: Final = 4
_DETAIL_FLOOR: Final = 1.0
"""8-bit levels added to both sides of `sharpness`: a flat picture has no detail to lose."""

_STILL_LEVEL: Final = 0.25 / 255
_STILL_SHARE: Final = 0.1
_EPSILON: Final = 1e-6
_LUMA: Final = np.array([0.299, 0.587, 0.114], np.float32)
_WHITE: Final = np.array([[0.9505], [1.0], [1.089]], np.float32)
_XYZ: Final = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]], np.float32)
"""Linear sRGB to XYZ; its white is D65."""


@dataclass(frozen=True)
class Judgement:
    """The numbers of one video; None where there is no loop or no scorer.

    The late third is the last third of the frames or, of a loop, which comes back, the middle one.
    """

    likeness: float
    """Mean over the frames of how much each still shows the picture: 1 where it is the picture, moved; 0 at worst."""
    likeness_min: float
    """The same of the frame that is least like the picture."""
    likeness_part: float
    """The same of the part, a thirty-sixth of the frame, that is least like the picture in the late third."""
    flicker: float
    """Mean difference of a frame from the mean of its neighbours, 0 to 1; a steady motion adds little."""
    sharpness: float
    """Fine detail of the late third over the picture's: 1 as the picture, less: blurred, more: noise or edges."""
    colour_shift: float
    """Difference of the colours of the late third from the picture's in CIELAB (Delta E 1976; 2 is visible)."""
    stillness: float
    """The longest stretch in which nothing moves, as a share of the video: 1 where all frames are the same."""
    motion: float
    """Mean distance from the condition frame, 0 to 1: PIA's training score."""
    closure: float | None
    """How well a loop closes: 1 where its seam is no larger than a usual step, 0 where its end is farthest away."""
    subject_similarity: float | None = None
    """Least cosine similarity of a frame and the picture in the scorer's features."""
    prompt_similarity: float | None = None
    """Mean cosine similarity of the frames and the prompt in the scorer's features; None where it reads no text."""

    def as_dict(self) -> dict[str, float | None]:
        """The numbers by name."""
        return asdict(self)


def judge_frames(
    frames: Array,
    *,
    image: Image.Image,
    motion: float,
    loop: bool = False,
    subject_similarity: float | None = None,
    prompt_similarity: float | None = None,
) -> Judgement:
    """The judgement of frames, uint8 [T, H, W, 3], RGB, that were made of `image`, which `fit` crops to their size.

    The numbers that need a model, `motion` and the similarities, are measured by the caller.

    Raises:
        BadParameter: `frames` is not uint8 [T, H, W, 3], or is empty.
    """
    if frames.ndim != 4 or frames.shape[3] != 3 or frames.dtype != np.uint8 or not frames.size:
        raise BadParameter(f"frames must be uint8 [T, H, W, 3] (got {frames.dtype} {list(frames.shape)})", "frames")
    height, width = frames.shape[1:3]
    picture = np.asarray(fit(image.convert("RGB"), (width, height)))
    small, small_picture = _small(frames), _small(picture[None])[0]  # [T, 3, H, W] and [3, H, W], at LONG_EDGE
    few = np.unique(np.linspace(0, len(frames) - 1, min(len(frames), MOST_FRAMES)).round().astype(int))
    late = few[_late_third(len(few), loop=loop)]
    taken, coarse = small[few], reduced(small, 4)
    placed = register(_grey(reduced(taken, 2)), _grey(reduced(small_picture, 2)))
    moved = placed.warp(_grey(small_picture)[None])
    likeness = _likeness(_grey(taken), moved)  # [T]
    places = np.searchsorted(few, late)
    placed_late = placed.of(places)
    return Judgement(
        likeness=_share(likeness.mean()),
        likeness_min=_share(likeness.min()),
        likeness_part=_share(_worst_part(_grey(small[late]), moved.of(places))),
        flicker=_share(_flicker(coarse)),
        sharpness=_rounded(_sharpness(frames[late], picture, placed_late, (coarse.shape[2], coarse.shape[3]))),
        colour_shift=_rounded(_colour(coarse[late], placed_late.warp(reduced(small_picture, 4)))),
        stillness=_share(_stillness(reduced(small, 2))),
        motion=motion,
        closure=_share(_closure(coarse)) if loop else None,
        subject_similarity=subject_similarity,
        prompt_similarity=prompt_similarity,
    )


def best_frame(frames: np.ndarray[Any, Any], *, image: Image.Image) -> int:
    """The index of the frame that is most like `image` and has its detail, of frames as for `judge_frames`.

    It has the greatest product of structural similarity and share of the picture's detail, of at most 1.
    """
    height, width = frames.shape[1:3]
    picture = np.asarray(fit(image.convert("RGB"), (width, height)))
    few = np.unique(np.linspace(0, len(frames) - 1, min(len(frames), MOST_FRAMES)).round().astype(int))
    small, small_picture = _small(frames[few]), _small(picture[None])[0]
    placed = register(_grey(reduced(small, 2)), _grey(reduced(small_picture, 2)))
    likeness = _likeness(_grey(small), placed.warp(_grey(small_picture)[None]))  # [T]
    expected = _detail(picture, (1, 1)) + _DETAIL_FLOOR
    detail = np.array([_detail(frame, (1, 1)) for frame in frames[few]])[:, 0, 0] + _DETAIL_FLOOR  # [T]
    return int(few[np.argmax(likeness * np.minimum(1, detail / expected[0, 0]))])


def _likeness(frames: Array, moved: Warped) -> Array:
    """The structural similarity of each of the frames [T, H, W] and the moved picture.

    Both are halved after the move, so that its interpolation does not count as blur.
    """
    seen = (reduced(moved.seen.astype(np.float32), 2) == 1).astype(np.float32)
    windows, counted = _similarity(reduced(frames, 2), reduced(moved.values[:, 0], 2), seen)
    likeness: Array = windows.sum((1, 2)) / np.maximum(counted.sum((1, 2)), 1)
    return likeness


def _worst_part(frames: Array, moved: Warped) -> float:
    """The least structural similarity of a part of the frames [T, H, W], over all of them.

    Smoothed rather than halved, so that letters count. Parts that are mostly out of the picture do not.
    """
    windows, counted = _similarity(_smooth(frames), _smooth(moved.values[:, 0]), moved.seen.astype(np.float32))
    rows, columns = (np.linspace(0, side, _PARTS + 1).round().astype(int)[:-1] for side in windows.shape[1:])
    sums, counts = (
        np.add.reduceat(np.add.reduceat(each.sum(0), rows, axis=0), columns, axis=1) for each in (windows, counted)
    )  # [_PARTS, _PARTS]
    return float(np.min(sums / np.maximum(counts, 1), where=counts >= counts.max() / 2, initial=1.0))


def _similarity(one: Array, other: Array, seen: Array) -> tuple[Array, Array]:
    """The structural similarity of the windows of [T, H, W] that are at least half seen, else 0; and 1 there, else 0.

    Source: SSIM, Wang et al., doi:10.1109/TIP.2003.819861, with flat windows.
    """
    count = _box(seen, _WINDOW)
    counted = (count >= _WINDOW**2 / 2).astype(np.float32)
    count = np.maximum(count, 1)
    one_mean, other_mean, one_power, other_power, product = (
        _box(each * seen, _WINDOW) / count for each in (one, other, one * one, other * other, one * other)
    )
    spread = np.maximum(one_power - one_mean**2, 0) + np.maximum(other_power - other_mean**2, 0)
    light, structure = _SSIM_FLOORS
    alike = (2 * one_mean * other_mean + light) / (one_mean**2 + other_mean**2 + light)
    return alike * (2 * (product - one_mean * other_mean) + structure) / (spread + structure) * counted, counted


def _flicker(frames: Array) -> float:
    """The mean over time of |f(t) - (f(t - 1) + f(t + 1)) / 2| of [T, 3, H, W]; 0 for fewer than three frames."""
    if len(frames) < 3:
        return 0.0
    return float(np.abs(frames[1:-1] - (frames[:-2] + frames[2:]) / 2).mean())


def _sharpness(frames: Array, picture: Array, placed: Registration, size: tuple[int, int]) -> float:
    """The detail of the frames over that of the same places of the picture."""
    moved = placed.warp(_detail(picture, size)[None])
    detail = np.stack([_detail(frame, size) for frame in frames])
    seen = moved.seen.sum((1, 2))
    found, expected = ((each * moved.seen).sum((1, 2)) / seen for each in (detail, moved.values[:, 0]))
    return float(((found + _DETAIL_FLOOR) / (expected + _DETAIL_FLOOR)).mean())


def _detail(image: Array, size: tuple[int, int]) -> Array:
    """The detail of an image uint8 [H, W, 3] in `size` (rows, columns) cells: the squared mean of sqrt(|Laplacian|).

    In 8-bit levels. The root makes it fall where detail shrinks to a few strong edges, as those of a mosaic do.
    """
    grey = np.pad(np.asarray(Image.fromarray(image).convert("L"), np.int16), 1, mode="edge")
    laplacian = 4 * grey[1:-1, 1:-1] - grey[:-2, 1:-1] - grey[2:, 1:-1] - grey[1:-1, :-2] - grey[1:-1, 2:]
    root = np.sqrt(np.abs(laplacian).astype(np.float32))
    cells = Image.fromarray(root).resize(size[::-1], Image.Resampling.BOX)
    return np.asarray(cells) ** 2


def _colour(frames: Array, moved: Warped) -> float:
    """The mean distance in CIELAB of blocks of frames [T, 3, H, W] and of the moved picture."""
    seen = moved.seen[:, None].astype(np.float32)
    share = reduced(seen, _BLOCK)
    one, other = (_lab(reduced(each * seen, _BLOCK) / np.maximum(share, _EPSILON)) for each in (frames, moved.values))
    distance = np.sqrt(((one - other) ** 2).sum(1, keepdims=True)) * share
    return float((distance.sum((1, 2, 3)) / share.sum((1, 2, 3))).mean())


def _lab(colours: Array) -> Array:
    """CIELAB of sRGB values 0 to 1, both [T, 3, H, W]. Source: CIE 15; IEC 61966-2-1."""
    linear = np.where(colours <= 0.04045, colours / 12.92, ((colours + 0.055) / 1.055) ** 2.4)
    xyz = np.einsum("dc,tchw->tdhw", _XYZ / _WHITE, linear)
    root = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    x, y, z = root[:, 0], root[:, 1], root[:, 2]
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], 1)


def _stillness(frames: Array) -> float:
    """The longest run of steps of [T, 3, H, W] that are nearly nothing, as a share of all; 0 for a single frame."""
    if len(frames) < 2:
        return 0.0
    steps = np.abs(np.diff(frames, axis=0)).mean((1, 2, 3))
    longest = run = 0
    for is_still in steps <= max(_STILL_LEVEL, _STILL_SHARE * float(np.quantile(steps, 0.9))):
        run = run + 1 if is_still else 0
        longest = max(longest, run)
    return longest / len(steps)


def _closure(frames: Array) -> float:
    """1 less how far the last of [T, 3, H, W] is from the first beyond a usual step, over how far any frame is."""
    away = np.abs(frames - frames[0]).mean((1, 2, 3))
    step = float(np.median(np.abs(np.diff(frames, axis=0)).mean((1, 2, 3)))) if len(frames) > 1 else 0.0
    reach = float(away.max()) - step
    return 1.0 if reach <= _STILL_LEVEL else 1 - max(0.0, float(away[-1]) - step) / reach


def _small(frames: Array) -> Array:
    """Frames uint8 [T, H, W, 3] at LONG_EDGE: float32 [T, 3, H, W], 0 to 1."""
    long_edge = max(frames.shape[1:3])
    scale = (LONG_EDGE if long_edge > LONG_EDGE // 2 else LONG_EDGE // 2) / long_edge
    height, width = (max(_SHORTEST, round(side * scale / _STEP) * _STEP) for side in frames.shape[1:3])
    values = np.empty((len(frames), 3, height, width), np.float32)
    for frame, value in zip(frames, values, strict=True):
        resized = Image.fromarray(frame).resize((width, height), Image.Resampling.BILINEAR, reducing_gap=1.0)
        value[:] = np.asarray(resized).transpose(2, 0, 1)
    return values / np.float32(255)


def _grey(colours: Array) -> Array:
    """[..., 3, H, W] -> [..., H, W]."""
    luma: Array = np.einsum("c,...chw->...hw", _LUMA, colours)
    return luma


def _box(values: Array, width: int) -> Array:
    """The sums over all windows of that width of [T, H, W] that lie inside."""
    height, length = (side - width + 1 for side in values.shape[1:])
    rows = values[:, :height].copy()
    for start in range(1, width):
        rows += values[:, start : start + height]
    total = rows[:, :, :length].copy()
    for start in range(1, width):
        total += rows[:, :, start : start + length]
    return total


def _smooth(values: Array) -> Array:
    """The means over squares of [T, H, W]; at the edges the nearest pixels repeat."""
    beyond = _SMOOTHING // 2
    padded = np.pad(values, ((0, 0), (beyond, beyond), (beyond, beyond)), mode="edge")
    return _box(padded, _SMOOTHING) / np.float32(_SMOOTHING**2)


def _late_third(count: int, *, loop: bool) -> slice:
    length = max(1, count // 3)
    end = count - (count - length) // 2 if loop else count
    return slice(end - length, end)


def _share(value: float) -> float:
    return _rounded(min(1.0, max(0.0, float(value))))


def _rounded(value: float) -> float:
    """Short in tables and pages; the numbers mean nothing beyond."""
    return round(float(value), 5)
