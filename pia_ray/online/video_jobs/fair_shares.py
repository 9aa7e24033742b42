"""The order in which waiting jobs are claimed: by priority, then in turn between owners, then by age."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby

from pia_ray.online.documents.document import IndexEntry


class FairShares:
    """Start-time fair queueing between owners: an owner with twice the weight gets twice the jobs.

    An owner that has waited for nothing has saved nothing up. Owners are named by the folders of their documents.
    Source: Goyal, Vin and Cheng, Start-time Fair Queueing, 1996.
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        self._weights = weights
        self._now = 0.0
        """Start tag of the latest claim."""
        self._ends: dict[str, float] = {}
        """By owner, the end tag of its latest claim, where it is later than now."""

    def ordered(self, entries: Iterable[IndexEntry]) -> Iterator[IndexEntry]:
        """The entries, which are sorted by rank and age, in the order of claims."""
        for _, group in groupby(entries, lambda entry: entry.rank):
            queues: dict[str, deque[IndexEntry]] = {}
            for entry in group:
                queues.setdefault(entry.owner_folder, deque()).append(entry)
            tags = {owner: self._start(owner) for owner in queues}
            while queues:
                owner = min(queues, key=lambda each: (tags[each], queues[each][0].id))
                yield queues[owner].popleft()
                tags[owner] += self._cost(owner)
                if not queues[owner]:
                    del queues[owner]

    def in_turn(self, owners: Iterable[str]) -> list[str]:
        """Owners with waiting jobs in the order of their turns; those whose turn is at the same time by chance."""
        return sorted(owners, key=lambda owner: (self._start(owner), random.random()))  # noqa: S311

    def count(self, owner: str) -> None:
        """Counts a claim for this owner."""
        self._now = self._start(owner)
        self._ends[owner] = self._now + self._cost(owner)
        self._ends = {each: end for each, end in self._ends.items() if end > self._now}

    def _start(self, owner: str) -> float:
        return max(self._now, self._ends.get(owner, 0.0))

    def _cost(self, owner: str) -> float:
        return 1.0 / self._weights.get(owner, 1.0)
