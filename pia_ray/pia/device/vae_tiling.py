"""The VAE in tiles, for pictures too large to encode or decode whole. Tiles are equal, evenly spread, blended linearly.

diffusers' own tiling steps by a fixed stride, which can leave slivers of a few pixels at the edges whose GroupNorm
statistics are their own; equal tiles have no slivers.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Final

import torch

TILE_PIXELS: Final = 512
"""Side of a tile in px: at least that of the pictures that Stable Diffusion 1.5's VAE was trained on."""

WHOLE_PIXELS: Final = 1024 * 1024
"""Pixels up to which `auto` keeps a picture whole, at 1.5 GiB of activations a frame in float16."""

_OVERLAP: Final = 0.25
"""Least share of a tile that the next one covers too."""


def is_tiled(vae_tiling: str, *, height: int, width: int) -> bool:
    """Whether a picture of this size in px is encoded and decoded in tiles."""
    if vae_tiling == "off" or max(height, width) <= TILE_PIXELS:
        return False
    return vae_tiling == "on" or height * width > WHOLE_PIXELS


def tiled(
    run: Callable[[torch.Tensor], torch.Tensor], values: torch.Tensor, *, tile: int, scale: float
) -> torch.Tensor:
    """The result of `run` for values [N, C, H, W], float32, made of tiles of at most `tile` a side.

    Tiles are blended where they overlap. `scale` is the side of the result per side of the values: 8 when decoding
    with a factor of 8, 1/8 when encoding. `tile` and the values' sides, times `scale`, are whole numbers.
    """
    step = max(1, round(1 / scale))
    rows, columns = (_starts(size, tile, step) for size in values.shape[-2:])
    total = weights = None
    for top, left in itertools.product(rows, columns):
        part = run(values[..., top : top + tile, left : left + tile]).float()
        if total is None or weights is None:
            size = [round(side * scale) for side in values.shape[-2:]]
            total = part.new_zeros(*part.shape[:-2], *size)  # [N, C', H * scale, W * scale]
            weights = part.new_zeros(*size)
        down, across = (
            _ramps(starts, start, tile, scale, part.device) for starts, start in ((rows, top), (columns, left))
        )
        y, x = round(top * scale), round(left * scale)
        height, width = part.shape[-2:]
        weight = down[:height, None] * across[None, :width]
        total[..., y : y + height, x : x + width] += part * weight
        weights[y : y + height, x : x + width] += weight
    assert total is not None
    assert weights is not None
    return total / weights


def _starts(size: int, tile: int, step: int) -> list[int]:
    """The starts of the tiles along a side: evenly spread on multiples of `step`, the last tile ends with the side."""
    if size <= tile:
        return [0]
    num = -(-(size - int(tile * _OVERLAP)) // (tile - int(tile * _OVERLAP)))
    return [step * round(index * (size - tile) / step / (num - 1)) for index in range(num)]


def _ramps(starts: list[int], start: int, tile: int, scale: float, device: torch.device) -> torch.Tensor:
    """The weights along one side of a tile: they rise where it overlaps the tile before, and fall where it overlaps
    the next one."""
    index = starts.index(start)
    weights = torch.ones(round(tile * scale), device=device)
    if index > 0:
        weights *= _rise(starts[index - 1] + tile - start, tile, scale, device)
    if index + 1 < len(starts):
        weights *= 1 - _rise(tile - (starts[index + 1] - start), tile, scale, device, late=True)
    return weights


def _rise(overlap: int, tile: int, scale: float, device: torch.device, *, late: bool = False) -> torch.Tensor:
    size, length = round(tile * scale), round(overlap * scale)
    along = torch.arange(size, device=device, dtype=torch.float32)
    return ((along - (size - length) if late else along) / length).clamp(0, 1)
