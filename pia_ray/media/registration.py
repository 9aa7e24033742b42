"""Where each part of a video's frames lies in its picture: an affine map per frame and a smooth field of small shifts.

All frames are registered in one batch, in numpy. Places are (x, y) from the middle of an image, in halves of its long
edge, so that a registration holds at every size.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, Final

import numpy as np

Array = np.ndarray[Any, Any]

_NEIGHBOUR_LEVELS: Final = ((4, 4), (2, 3))
"""(reduction of the size, rounds) of the search from each frame to the next, coarse to fine."""

_PICTURE_LEVELS: Final = ((2, 4), (1, 3))
"""The same for the search from the picture to each frame, which starts from the chain of neighbours."""

_FIELD_ROUNDS: Final = 4
_NODES: Final = 8
"""Nodes of the field of shifts along each side: waves and gestures fit into it, melting does not."""

_LARGEST_SHIFT: Final = 0.2
_LEAST_OVERLAP: Final = 0.2
"""Share of a frame that must lie in the picture; a map with less is not accepted."""

_LARGEST_ZOOM: Final = 2.5
"""A map that scales a side by more, up or down, is not accepted."""

_LARGEST_COEFFICIENT: Final = 8.0
_OUTLIER: Final = 2.0
"""Differences of so many times their mean count half: parts that move on their own."""

_IDENTITY: Final = np.array([1, 0, 0, 0, 1, 0], np.float32)


@dataclass(frozen=True)
class Warped:
    """Images as the frames of a registration would show them."""

    values: Array
    """float32 [T, channels, H, W]."""
    seen: Array
    """bool [T, H, W]: whether the place lies in the image. Beyond it `values` repeat its edge."""

    def of(self, frames: Array) -> Warped:
        """Those of some of the frames, by their indices."""
        return Warped(self.values[frames], self.seen[frames])


@dataclass(frozen=True)
class Registration:
    """The places in the picture of all places of T frames."""

    maps: Array
    """float32 [T, 6]: rows (a, b, c) and (d, e, f) of each affine map."""
    shifts: Array
    """float32 [2, T, nodes]: what is added to x and y, at the nodes of a grid, bilinear between them."""

    def of(self, frames: Array) -> Registration:
        """The registration of some of the frames, by their indices."""
        return Registration(self.maps[frames], self.shifts[:, frames])

    def warp(self, images: Array) -> Warped:
        """Images float32 [channels, H, W] of the picture as the frames would show them, by bilinear interpolation."""
        height, width = images.shape[1:]
        x, y = _mapped(self.maps, height, width)
        along_x, along_y = (_spread(shifts, height, width) for shifts in self.shifts)
        values, seen = _sample(images[None], x + along_x, y + along_y)
        return Warped(values.reshape(-1, *images.shape), seen.reshape(-1, height, width))


def register(frames: Array, picture: Array) -> Registration:
    """The registration of grey frames, float32 [T, H, W], to their picture, [H, W]; sides are multiples of 4 from 16.

    Gauss-Newton on the difference less gain and offset: affine from each frame to the next and then, from the chain of
    these, from the picture to each frame; last the shifts. A frame of another picture gets a registration too, and its
    likeness says so. Sources: Lucas and Kanade, IJCAI 1981; Baker and Matthews, doi:10.1023/B:VISI.0000011205.11775.fd;
    Rueckert et al., doi:10.1109/42.796284 (shifts at the nodes of a grid).
    """
    still = np.tile(_IDENTITY, (len(frames), 1))
    before = np.concatenate([picture[None], frames[:-1]])
    chain = _chained(_refined(still, before, frames, _NEIGHBOUR_LEVELS))
    # After a cut or a black frame the chain is broken, and the place of the picture itself may be the better start.
    half_frames, half_picture = reduced(frames, 2), reduced(picture[None], 2)
    closer = _cost(chain, half_picture, half_frames) < _cost(still, half_picture, half_frames)
    maps = _refined(np.where(closer[:, None], chain, still), picture[None], frames, _PICTURE_LEVELS)
    return Registration(maps, _shifts(maps, half_picture, half_frames))


def reduced(images: Array, factor: int) -> Array:
    """The means over squares of `factor` px, a power of two, of [..., H, W], whose sides are multiples of it."""
    while factor > 1:
        rows = images[..., ::2, :] + images[..., 1::2, :]
        images = (rows[..., ::2] + rows[..., 1::2]) * np.float32(0.25)
        factor //= 2
    return images


def _refined(maps: Array, images: Array, frames: Array, levels: tuple[tuple[int, int], ...]) -> Array:
    for factor, rounds in levels:
        maps = _search(maps, reduced(images, factor), reduced(frames, factor), rounds)
    return maps


def _search(maps: Array, images: Array, frames: Array, rounds: int) -> Array:
    """The best maps of some rounds of Gauss-Newton, the start included; `images` is one for all frames or one each."""
    height, width = images.shape[1:]
    x, y, _ = _places(height, width)
    slopes = _slopes(images)
    best, least = maps, np.full(len(maps), np.inf, np.float32)
    for turn in range(rounds + 1):
        wanted = slopes if turn < rounds else slopes[:, :1]
        values, seen = _sample(wanted, *_mapped(maps, height, width))
        difference, weights, cost = _compared(values[:, 0], frames, seen)
        cost = np.where(_plausible(maps, seen), cost, np.inf)
        better = cost < least
        best, least = np.where(better[:, None], maps, best), np.where(better, cost, least)
        if turn == rounds:
            break
        along_x, along_y = values[:, 1], values[:, 2]
        slope = np.stack([along_x * x, along_x * y, along_x, along_y * x, along_y * y, along_y], 1)  # [T, 6, H * W]
        weighted = slope * weights[:, None]
        square = weighted @ slope.transpose(0, 2, 1)  # [T, 6, 6]
        ridge = (1e-3 / 6 * np.trace(square, axis1=1, axis2=2) + 1e-9)[:, None, None] * np.eye(6, dtype=np.float32)
        step = np.linalg.solve(square + ridge, weighted @ difference[..., None])[..., 0]
        maps = np.clip(maps - step, -_LARGEST_COEFFICIENT, _LARGEST_COEFFICIENT).astype(np.float32)
    return best


def _shifts(maps: Array, picture: Array, frames: Array) -> Array:
    """Shifts at the nodes that bring the mapped picture nearer to each frame: float32 [2, T, nodes]."""
    height, width = frames.shape[1:]
    slopes = _slopes(picture)
    x, y = _mapped(maps, height, width)
    shifts = np.zeros((2, len(frames), _NODES**2), np.float32)
    for _ in range(_FIELD_ROUNDS):
        values, seen = _sample(slopes, x + _spread(shifts[0], height, width), y + _spread(shifts[1], height, width))
        difference = _compared(values[:, 0], frames, seen)[0]
        along_x, along_y = values[:, 1] * seen, values[:, 2] * seen
        products = (along_x * along_x, along_x * along_y, along_y * along_y, along_x * difference, along_y * difference)
        xx, xy, yy, at_x, at_y = _gathered(np.stack(products), height, width)  # each [T, nodes]
        ridge = 0.15 * (xx + yy).mean(1, keepdims=True) + 1e-6
        area = (xx + ridge) * (yy + ridge) - xy * xy
        shifts[0] -= ((yy + ridge) * at_x - xy * at_y) / area
        shifts[1] -= ((xx + ridge) * at_y - xy * at_x) / area
        np.clip(shifts, -_LARGEST_SHIFT, _LARGEST_SHIFT, out=shifts)
    return shifts


def _compared(values: Array, frames: Array, seen: Array) -> tuple[Array, Array, Array]:
    """Per place the difference of values and frames less gain and offset, and its weight; per frame a cost, 0 if equal.

    `values` and `seen` are [T, H * W], `frames` [T, H, W].
    """
    count = seen.sum(1, keepdims=True, dtype=np.float32) + 1e-6
    one, other = values * seen, frames.reshape(len(frames), -1) * seen
    one, other = (one - one.sum(1, keepdims=True) / count) * seen, (other - other.sum(1, keepdims=True) / count) * seen
    spread, other_spread = (np.sqrt((each**2).sum(1, keepdims=True) / count) + 1e-4 for each in (one, other))
    difference = one - other * (spread / other_spread)
    size = np.abs(difference)
    outlier = _OUTLIER * size.sum(1, keepdims=True) / count + 1e-6
    weights = seen / (1 + (size / outlier) ** 2)
    cost = np.minimum(size, 2 * outlier).sum(1) / (count * spread)[:, 0]
    return difference, weights, cost


def _cost(maps: Array, picture: Array, frames: Array) -> Array:
    values, seen = _sample(picture[:, None], *_mapped(maps, *frames.shape[1:]))
    cost: Array = np.where(_plausible(maps, seen), _compared(values[:, 0], frames, seen)[2], np.inf)
    return cost


def _plausible(maps: Array, seen: Array) -> Array:
    a, b, d, e = maps[:, [0, 1, 3, 4]].T
    one, other = np.hypot(a + e, b - d) / 2, np.hypot(a - e, b + d) / 2  # of them the singular values are made
    within = (one + other < _LARGEST_ZOOM) & (np.abs(one - other) > 1 / _LARGEST_ZOOM)
    accepted: Array = within & (seen.mean(1) > _LEAST_OVERLAP)
    return accepted


def _chained(steps: Array) -> Array:
    """Maps from the picture to each frame out of those from each to the next."""
    maps, here = [], np.eye(3)
    for step in steps:
        here = here @ np.vstack([step.reshape(2, 3), [0, 0, 1]])
        maps.append(here[:2].reshape(-1))
    chain: Array = np.clip(np.stack(maps), -_LARGEST_COEFFICIENT, _LARGEST_COEFFICIENT).astype(np.float32)
    return chain


def _mapped(maps: Array, height: int, width: int) -> tuple[Array, Array]:
    """x and y in the picture of each pixel of the frames, float32 [T, H * W]."""
    mapped = maps.reshape(-1, 3) @ _places(height, width)
    return mapped[::2], mapped[1::2]


@cache
def _places(height: int, width: int) -> Array:
    """x, y and 1 of each pixel: float32 [3, H * W]."""
    rows, columns = np.mgrid[:height, :width].astype(np.float32).reshape(2, -1)
    long = max(height, width)
    return np.stack([(2 * columns + 1 - width) / long, (2 * rows + 1 - height) / long, np.ones_like(rows)])


def _sample(images: Array, x: Array, y: Array) -> tuple[Array, Array]:
    """Images [T or 1, channels, H, W] at places [T, H * W]: values [T, channels, H * W], and whether each is inside."""
    height, width = images.shape[2:]
    half = max(height, width) / 2
    column, row = x * half + (width - 1) / 2, y * half + (height - 1) / 2
    seen = (column > -0.5) & (column < width - 0.5) & (row > -0.5) & (row < height - 0.5)
    np.clip(column, 0, width - 1.001, out=column)
    np.clip(row, 0, height - 1.001, out=row)
    left, top = column.astype(np.int32), row.astype(np.int32)
    column -= left  # now the share of the pixel to the right
    row -= top
    index = (top * width + left).astype(np.intp)
    if len(images) > 1:
        index += np.arange(len(images))[:, None] * (height * width)
    low_right = row * column
    right, low = column - low_right, row - low_right
    planes = images.transpose(1, 0, 2, 3).reshape(images.shape[1], -1)
    # No index is out of bounds: to clip them is faster than to check them, and reused memory than new.
    values = planes.take(index, axis=1, mode="clip")  # [channels, T, H * W]
    values *= 1 - row - right
    corner = np.empty_like(values)
    for offset, weight in ((1, right), (width, low), (width + 1, low_right)):
        planes[:, offset:].take(index, axis=1, out=corner, mode="clip")
        corner *= weight
        values += corner
    return values.transpose(1, 0, 2), seen


def _slopes(images: Array) -> Array:
    """Images [T, H, W] with their slopes along x and y, per half long edge: float32 [T, 3, H, W]."""
    along_y, along_x = np.gradient(images, axis=(1, 2))
    half = max(images.shape[1:]) / 2
    planes = np.stack([images, along_x * half, along_y * half]).astype(np.float32)
    return planes.transpose(1, 0, 2, 3)  # channels outermost in memory, as `_sample` reads them


def _spread(shifts: Array, height: int, width: int) -> Array:
    """Shifts at the nodes [T, nodes] as those of all pixels: [T, H * W]."""
    fields = _hats(height) @ shifts.reshape(-1, _NODES, _NODES) @ _hats(width).T
    return fields.reshape(len(shifts), -1)


def _gathered(values: Array, height: int, width: int) -> Array:
    """The sums of values at all pixels [..., H * W] by their nodes' weights: [..., nodes]."""
    fields = values.reshape(*values.shape[:-1], height, width)
    sums: Array = _hats(height).T @ (fields @ _hats(width))
    return sums.reshape(*values.shape[:-1], -1)


@cache
def _hats(length: int) -> Array:
    """The weight of each node along a side at each of its pixels, for linear interpolation: float32 [length, nodes]."""
    place = (np.arange(length, dtype=np.float32) + 0.5) / length * (_NODES - 1)
    weights: Array = np.maximum(0, 1 - np.abs(place[:, None] - np.arange(_NODES, dtype=np.float32)))
    return weights
