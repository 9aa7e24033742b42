"""Rows that wait for their model and a place: which goes next. Plain code; knows neither models nor requests."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Container, Iterator
from typing import Final, Generic, TypeVar

PATIENCE: Final = 32
"""Rows of models in memory that may go before one whose model is not: a model is loaded at most once per so many."""

PRIORITY_STEP: Final = 64
"""Rows of the next more urgent priority that may come later and still go first: nobody waits for ever."""

Entry = TypeVar("Entry")


def rank(arrival: int, priority: int) -> int:
    """Where a row stands in line, the smallest first: by arrival, but `PRIORITY_STEP` rows later for each priority."""
    return arrival + priority * PRIORITY_STEP


class Line(Generic[Entry]):
    """Rows whose model is in memory by rank: first come first served, urgent ones sooner. The others wait, but not for
    ever."""

    def __init__(self) -> None:
        self._waiting: dict[str, list[tuple[int, int, Entry]]] = {}  # heaps; no two ranks of one priority are equal
        self._num_added = 0
        self._num_passed = 0

    def add(self, model: str, entry: Entry, *, priority: int = 0) -> None:
        """Puts a row that needs this model in line; 0 is the most urgent priority."""
        self._num_added += 1
        waiting = self._waiting.setdefault(model, [])
        heapq.heappush(waiting, (rank(self._num_added, priority), priority, entry))

    def remove(self, gone: Callable[[Entry], bool]) -> list[Entry]:
        """Takes the rows of which `gone` is true out of the line, wherever they stand."""
        removed = [entry for entry in self if gone(entry)]
        for model, waiting in list(self._waiting.items()) if removed else ():
            waiting[:] = [place for place in waiting if not any(place[2] is entry for entry in removed)]
            heapq.heapify(waiting)
            if not waiting:
                del self._waiting[model]
        return removed

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def __iter__(self) -> Iterator[Entry]:
        for waiting in self._waiting.values():
            for _, _, entry in waiting:
                yield entry

    @property
    def models(self) -> list[str]:
        """The models that rows wait for, that of the first row in line first."""
        return sorted(self._waiting, key=lambda model: self._waiting[model][0][:2])

    @property
    def first_may_wait(self) -> bool:
        """Whether others may still go before the first row in line, whose model is missing."""
        return self._num_passed < PATIENCE

    def next(self, *, ready: Container[str], coming: Container[str]) -> Entry | None:
        """The row to go next, where models are in memory (`ready`) or being loaded (`coming`).

        None if there is none, or if places must fall free for the first row in line.
        """
        for model in (models := self.models):
            if model in ready:
                return self._waiting[model][0][2]
            if model == models[0] and model not in coming and not self.first_may_wait:
                return None
        return None

    def pop(self, model: str) -> Entry:
        """Takes the first row of that model out of the line."""
        self._num_passed = 0 if model == self.models[0] else self._num_passed + 1
        waiting = self._waiting[model]
        *_, entry = heapq.heappop(waiting)
        if not waiting:
            del self._waiting[model]
        return entry
