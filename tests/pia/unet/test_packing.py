"""The forwards of groups of evaluations: pairs stay together, and few kinds occur where forwards are compiled."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Final

import pytest
import torch

from pia_ray.pia.device.placement import forward_sizes
from pia_ray.pia.evaluation import Branch, Evaluation
from pia_ray.pia.unet.forward import BatchEntry
from pia_ray.pia.unet.packing import packed

CPU, GPU = torch.device("cpu"), torch.device("cuda")
SIZES: Final = ((4, 4), (4, 6), (6, 4))


def row(*, sides: int, size: tuple[int, int] = (4, 4)) -> list[BatchEntry]:
    """The evaluations of a row without guidance, with guidance, or with guidance by the picture too."""
    latents = torch.zeros(4, 2, *size)
    plain = Branch(torch.zeros(7, 8), torch.zeros(1, 2, 1, 1), torch.zeros(4, 1, *size))
    blind = Branch(torch.zeros(7, 8), torch.zeros(1, 2, 1, 1), torch.zeros(4, 1, *size))
    branches = {1: (plain,), 2: (replace(plain), plain), 3: (blind, replace(plain), plain)}[sides]
    evaluation = Evaluation(latents, 1.0, branches, step=0, num_steps=1)
    return [BatchEntry(evaluation, branch) for branch in branches]


def entries_of(*rows: list[BatchEntry]) -> list[BatchEntry]:
    return [entry for each in rows for entry in each]


def num_beginnings(entries: list[BatchEntry]) -> int:
    return len({entry.prefix_key for entry in entries})


def num_split(entries: list[BatchEntry], forwards: list[list[int]]) -> int:
    return sum(num_beginnings([entries[index] for index in each]) for each in forwards) - num_beginnings(entries)


@pytest.mark.parametrize("device", [CPU, GPU])
@pytest.mark.parametrize("few_kinds", [False, True])
@pytest.mark.parametrize("limit", [1, 2, 3, 4, 8])
def test_each_evaluation_is_in_one_forward_and_none_exceeds_the_limit(
    limit: int, few_kinds: bool, device: torch.device
) -> None:
    entries = entries_of(*[row(sides=1 + number % 3) for number in range(7)])
    forwards = packed(entries, limit, device=device, few_kinds=few_kinds)
    assert sorted(index for forward in forwards for index in forward) == list(range(len(entries)))
    assert max(map(len, forwards)) <= limit
    sizes = forward_sizes(len(entries), limit, device=device, powers_of_two=few_kinds)
    assert [len(forward) for forward in forwards] == sizes
    assert not few_kinds or all(size.bit_count() == 1 for size in sizes)


@pytest.mark.parametrize("few_kinds", [False, True])
def test_pairs_are_not_split_between_forwards(few_kinds: bool) -> None:
    entries = entries_of(row(sides=1), row(sides=2), row(sides=1), row(sides=3), row(sides=2))
    forwards = packed(entries, 2, device=GPU, few_kinds=few_kinds)
    assert num_split(entries, forwards) == 0
    in_order = [list(range(start, min(start + 2, len(entries)))) for start in range(0, len(entries), 2)]
    assert num_split(entries, in_order) == 3, "as they come, three rows lose what their sides share"


def kinds_of_a_mix(*, limit: int, as_they_come: bool = False) -> tuple[int, int, int]:
    """The kinds of compiled forward, the forwards and the beginnings computed, of a mixed catalogue.

    8 of 200 rows run at a time: three sizes, half of them with guidance, a third of either with a preset that skips
    every other step. `as_they_come`: evaluations are cut as they were before `packed`.
    """
    dice, num, beginnings = random.Random(0), 0, 0
    kinds: set[tuple[object, ...]] = set()
    kinds_of_row = [(size, sides, skips) for size in SIZES for sides in (1, 2) for skips in (1, 1, 2)]
    waiting = [dice.choice(kinds_of_row) for _ in range(200)]
    rows: list[tuple[list[BatchEntry], int, list[int]]] = []
    while waiting or rows:
        while waiting and len(rows) < 8:
            size, sides, skips = waiting.pop()
            rows.append((row(sides=sides, size=size), skips, [dice.randint(4, 8)]))
        groups: dict[object, list[BatchEntry]] = {}
        for entries, _, _ in rows:
            groups.setdefault(entries[0].evaluation.shape, []).extend(entries)
        for entries in groups.values():
            if as_they_come:
                sizes = forward_sizes(len(entries), limit, device=GPU)
                starts = [sum(sizes[:number]) for number in range(len(sizes))]
                forwards = [list(range(start, start + size)) for start, size in zip(starts, sizes, strict=True)]
            else:
                forwards = packed(entries, limit, device=GPU, few_kinds=True)
            num += len(forwards)
            for forward in forwards:
                kinds.add((entries[0].evaluation.shape, len(forward)))
                beginnings += num_beginnings([entries[index] for index in forward])
        for _, skips, left in rows:
            left[0] -= skips  # a step that is skipped is extrapolated at once: it has no forward
        rows = [each for each in rows if each[2][0] > 0]
    return len(kinds), num, beginnings


@pytest.mark.parametrize(
    ("limit", "kinds", "forwards", "beginnings"),
    [(2, 6, 845, (1174, 990)), (4, 9, 602, (1117, 990)), (8, 12, 574, (1100, 990))],
)
def test_a_mixed_catalogue_has_few_kinds_of_forward_and_no_more_forwards(
    limit: int, kinds: int, forwards: int, beginnings: tuple[int, int]
) -> None:
    """By size and beginnings, as kinds were before, they are 9, 17 and 24."""
    assert kinds_of_a_mix(limit=limit, as_they_come=True) == (kinds, forwards, beginnings[0])
    assert kinds_of_a_mix(limit=limit) == (kinds, forwards, beginnings[1])
