"""The order in which waiting rows are admitted to the batch. Plain code; knows neither models nor requests."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Container, Iterator
from typing import Final, Generic, TypeVar

PATIENCE: Final = 32
"""Rows of models in memory that may go before one whose model is not: a model is loaded at most once per so many."""

PRIORITY_STEP: Final = 64
"""Rows of the next more urgent priority that may arrive later and still go first, so that no row waits for ever."""

_Row = TypeVar("_Row")
"""The type of the rows that the caller queues."""


def rank(arrival: int, priority: float) -> float:
    """The sort key of a waiting row, the smallest first: its arrival, plus `PRIORITY_STEP` for each priority.

    Parts of a priority let some rows of the same priority go first.
    """
    return arrival + priority * PRIORITY_STEP


class AdmissionQueue(Generic[_Row]):
    """Waiting rows by rank: first come, first served, and urgent ones sooner.

    Rows whose model is in memory go before rows whose model is not, but at most `PATIENCE` times in succession.
    """

    def __init__(self) -> None:
        self._waiting: dict[str, list[tuple[float, float, _Row]]] = {}  # heaps; no two ranks of one priority are equal
        self._num_added = 0
        self._num_passed = 0

    def add(self, model: str, row: _Row, *, priority: float = 0) -> None:
        """Adds a row that needs this model; 0 is the most urgent priority."""
        self._num_added += 1
        waiting = self._waiting.setdefault(model, [])
        heapq.heappush(waiting, (rank(self._num_added, priority), priority, row))

    def remove(self, gone: Callable[[_Row], bool]) -> list[_Row]:
        """The rows for which `gone` is true, which are removed."""
        removed = [row for row in self if gone(row)]
        for model, waiting in list(self._waiting.items()) if removed else ():
            waiting[:] = [item for item in waiting if not any(item[2] is row for row in removed)]
            heapq.heapify(waiting)
            if not waiting:
                del self._waiting[model]
        return removed

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def __iter__(self) -> Iterator[_Row]:
        for waiting in self._waiting.values():
            for _, _, row in waiting:
                yield row

    @property
    def models(self) -> list[str]:
        """The models that rows wait for, the model of the first row first."""
        return sorted(self._waiting, key=lambda model: self._waiting[model][0][:2])

    @property
    def first_may_wait(self) -> bool:
        """Whether others may still go before the first row, whose model is missing."""
        return self._num_passed < PATIENCE

    def next(
        self, *, ready: Container[str], loading: Container[str], fits: Callable[[_Row], bool] | None = None
    ) -> _Row | None:
        """The row to admit next, where models are in memory (`ready`) or being loaded (`loading`).

        Rows that `fits` may go before one that does not, as rows whose model is in memory. None if no row can be
        admitted: none waits, or running rows must end before the first one's model can be loaded, or before it fits.
        """
        for model in (models := self.models):
            if model in ready:
                first = self._waiting[model][0][2]
                if fits is None or fits(first):
                    return first
                others = heapq.nsmallest(PATIENCE, self._waiting[model])[1:] if self.first_may_wait else []
                return next((row for *_, row in others if fits(row)), None)
            if model == models[0] and model not in loading and not self.first_may_wait:
                return None
        return None

    def pop(self, model: str, row: _Row | None = None) -> _Row:
        """A row of that model, the first one unless one is named, which is removed."""
        waiting = self._waiting[model]
        taken = waiting[0] if row is None else next(item for item in waiting if item[2] is row)
        self._num_passed = 0 if model == self.models[0] and taken is waiting[0] else self._num_passed + 1
        waiting.remove(taken)
        heapq.heapify(waiting)
        if not waiting:
            del self._waiting[model]
        return taken[2]
