"""GroupNorm of channels-last pictures in Triton: three kernels over tiles of positions and channels.

Statistics are float32: mean and squared deviations of each tile, merged as by Chan et al., so that values far from zero
lose nothing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

POSITIONS: tl.constexpr = tl.constexpr(64)
"""Of a tile. With 64 channels, a tile is 32 values for each thread of four warps."""

CHANNELS: tl.constexpr = tl.constexpr(64)
"""Of a tile."""

FOLDED: tl.constexpr = tl.constexpr(4096)
"""Tiles times channels that one step of `_fold` reads."""


def group_norm(
    pictures: torch.Tensor, *, groups: int, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> torch.Tensor:
    """[N, C, h, w] -> the same shape, both channels-last; as `torch.nn.functional.group_norm`."""
    num, channels, height, width = pictures.shape
    positions = height * width
    tiles, blocks = triton.cdiv(positions, POSITIONS.value), triton.cdiv(channels, CHANNELS.value)
    moments = pictures.new_empty(2, num, tiles, channels, dtype=torch.float32)
    scales = pictures.new_empty(2, num, channels, dtype=torch.float32)
    normal = torch.empty_like(pictures)
    _moments[tiles, num, blocks](pictures, moments[0], moments[1], positions, channels, tiles)
    in_group = channels // groups
    _fold[groups, num](
        *(moments[0], moments[1], weight, bias, scales[0], scales[1], positions, channels, tiles, in_group, eps),
        block=max(16, triton.next_power_of_2(in_group)),
    )
    _scale[tiles, num, blocks](pictures, scales[0], scales[1], normal, positions, channels)
    return normal


@triton.jit  # type: ignore[untyped-decorator]
def _moments(
    pictures: tl.tensor,
    means: tl.tensor,
    spreads: tl.tensor,
    positions: tl.tensor,
    channels: tl.tensor,
    tiles: tl.tensor,
) -> None:
    """Mean and sum of squared deviations of each channel over one tile."""
    tile, picture = tl.program_id(0), tl.program_id(1).to(tl.int64)
    rows = tile * POSITIONS + tl.arange(0, POSITIONS)
    columns = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    inside = (rows < positions)[:, None] & (columns < channels)[None, :]
    places = (picture * positions + rows)[:, None] * channels + columns[None, :]
    values = tl.load(pictures + places, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(values, 0) / tl.minimum(positions - tile * POSITIONS, POSITIONS)
    gaps = tl.where(inside, values - mean[None, :], 0.0)
    to = (picture * tiles + tile) * channels + columns
    tl.store(means + to, mean, mask=columns < channels)
    tl.store(spreads + to, tl.sum(gaps * gaps, 0), mask=columns < channels)


@triton.jit  # type: ignore[untyped-decorator]
def _fold(
    means: tl.tensor,
    spreads: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    factors: tl.tensor,
    shifts: tl.tensor,
    positions: tl.tensor,
    channels: tl.tensor,
    tiles: tl.tensor,
    in_group: tl.tensor,
    eps: tl.tensor,
    block: tl.constexpr,
) -> None:
    """Factor and shift of each channel of one group, by the moments of its tiles."""
    group, picture = tl.program_id(0), tl.program_id(1).to(tl.int64)
    step: tl.constexpr = FOLDED // block
    columns = tl.arange(0, block)
    channel = group * in_group + columns
    total = tl.zeros([step, block], tl.float32)
    for start in range(0, tiles, step):
        rows = start + tl.arange(0, step)
        inside = (rows < tiles)[:, None] & (columns < in_group)[None, :]
        places = (picture * tiles + rows)[:, None] * channels + channel[None, :]
        counts = tl.minimum(positions - rows * POSITIONS, POSITIONS)[:, None]
        total += tl.load(means + places, mask=inside, other=0.0) * counts
    mean = tl.sum(tl.sum(total, 1), 0) / (positions * in_group)
    total = tl.zeros([step, block], tl.float32)
    for start in range(0, tiles, step):
        rows = start + tl.arange(0, step)
        inside = (rows < tiles)[:, None] & (columns < in_group)[None, :]
        places = (picture * tiles + rows)[:, None] * channels + channel[None, :]
        counts = tl.minimum(positions - rows * POSITIONS, POSITIONS)[:, None]
        gaps = tl.load(means + places, mask=inside, other=0.0) - mean
        spread = tl.load(spreads + places, mask=inside, other=0.0) + gaps * gaps * counts
        total += tl.where(inside, spread, 0.0)
    variance = tl.sum(tl.sum(total, 1), 0) / (positions * in_group)
    inside = columns < in_group
    factor = tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32) / tl.sqrt(variance + eps)
    shift = tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32) - mean * factor
    tl.store(factors + picture * channels + channel, factor, mask=inside)
    tl.store(shifts + picture * channels + channel, shift, mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _scale(
    pictures: tl.tensor,
    factors: tl.tensor,
    shifts: tl.tensor,
    normal: tl.tensor,
    positions: tl.tensor,
    channels: tl.tensor,
) -> None:
    """One tile of the result."""
    tile, picture = tl.program_id(0), tl.program_id(1).to(tl.int64)
    rows = tile * POSITIONS + tl.arange(0, POSITIONS)
    columns = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    inside = (rows < positions)[:, None] & (columns < channels)[None, :]
    places = (picture * positions + rows)[:, None] * channels + columns[None, :]
    values = tl.load(pictures + places, mask=inside, other=0.0).to(tl.float32)
    factor = tl.load(factors + picture * channels + columns, mask=columns < channels, other=0.0)
    shift = tl.load(shifts + picture * channels + columns, mask=columns < channels, other=0.0)
    values = values * factor[None, :] + shift[None, :]
    tl.store(normal + places, values.to(normal.dtype.element_ty), mask=inside)
