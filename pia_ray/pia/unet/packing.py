"""The forwards that run a group of UNet evaluations: how many each, and which together.

Entries that share the beginning of the UNet, as both sides of guidance do, go together: split, each would compute it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pia_ray.pia.device.placement import forward_sizes
from pia_ray.pia.unet.forward import BatchEntry


def packed(entries: Sequence[BatchEntry], limit: int, *, device: torch.device, few_kinds: bool) -> list[list[int]]:
    """The entries of each forward, by index, at most `limit`: as few forwards as there can be, in which pairs are
    rarely split.

    With `few_kinds` their sizes are powers of two on a CPU too. A compiled forward is of a kind by its size alone,
    because what its entries share is computed before (`guidance_prefix`). In a mix of three sizes, with and without
    guidance, 9 kinds occur for a limit of 4 and 12 for 8 (tests/pia/unet/test_packing.py).
    """
    sharing: dict[tuple[object, ...], list[int]] = {}
    for index, entry in enumerate(entries):
        sharing.setdefault(entry.prefix_key, []).append(index)
    pairs = [indices for indices in sharing.values() if len(indices) == 2]
    lone = [indices for indices in sharing.values() if len(indices) != 2]
    indices = [index for unit in (*pairs, *lone) for index in unit]
    sizes = forward_sizes(len(entries), limit, device=device, powers_of_two=few_kinds)
    starts = [sum(sizes[:number]) for number in range(len(sizes))]
    return [indices[start : start + size] for start, size in zip(starts, sizes, strict=True)]
