"""The forwards that run a group of UNet evaluations: how many each, and which together.

Entries that share the beginning of the UNet, as both sides of guidance do, go together: split, each would compute it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pia_ray.pia.device.placement import forward_sizes
from pia_ray.pia.unet.forward import BatchEntry


def packed(entries: Sequence[BatchEntry], limit: int, *, device: torch.device, few_kinds: bool) -> list[list[int]]:
    """The entries of each forward, by index, at most `limit`.

    Without `few_kinds` these are as many forwards as the number of entries needs, in which pairs are rarely split. With
    it, pairs and lone entries have forwards of their own, each of a power of two of them: at most 2 log2(n) + 1 kinds
    of a shape for a limit of n. In a mix of three sizes, with and without guidance, 14 kinds occur for a limit of 4 and
    17 for 8, in place of 17 and 24, in 10 and 14 % more forwards (tests/pia/unet/test_packing.py).
    """
    sharing: dict[tuple[object, ...], list[int]] = {}
    for index, entry in enumerate(entries):
        sharing.setdefault(entry.prefix_key, []).append(index)
    pairs = [indices for indices in sharing.values() if len(indices) == 2]
    lone = [[index] for indices in sharing.values() if len(indices) != 2 for index in indices]
    if not few_kinds:
        return _cut([*pairs, *lone], forward_sizes(len(entries), limit, device=device))
    if limit == 1:
        return [[index] for index in range(len(entries))]
    forwards = []
    for units, size in ((pairs, 2), (lone, 1)):
        forwards += _cut(units, [size * num for num in _powers_of_two(len(units), limit // size)])
    return forwards


def _cut(units: Sequence[Sequence[int]], sizes: Sequence[int]) -> list[list[int]]:
    indices = [index for unit in units for index in unit]
    starts = [sum(sizes[:number]) for number in range(len(sizes))]
    return [indices[start : start + size] for start, size in zip(starts, sizes, strict=True)]


def _powers_of_two(num: int, most: int) -> list[int]:
    """Powers of two up to `most` whose sum is `num`, as few as there can be."""
    sizes = []
    while num > 0:
        size = 1 << (min(num, most).bit_length() - 1)
        sizes.append(size)
        num -= size
    return sizes
