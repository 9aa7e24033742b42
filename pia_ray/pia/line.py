"""Rows that wait for their model and a place: which goes next. Plain code; knows neither models nor requests."""

from __future__ import annotations

from collections import deque
from collections.abc import Container, Iterator
from typing import Final, Generic, TypeVar

PATIENCE: Final = 32
"""Rows of models in memory that may go before one whose model is not: a model is loaded at most once per so many."""

Entry = TypeVar("Entry")


class Line(Generic[Entry]):
    """First come first served among rows whose model is in memory; the others wait, but not for ever."""

    def __init__(self) -> None:
        self._waiting: dict[str, deque[tuple[int, Entry]]] = {}
        self._num_added = 0
        self._num_passed = 0

    def add(self, model: str, entry: Entry) -> None:
        """Puts a row that needs this model at the end of the line."""
        self._num_added += 1
        self._waiting.setdefault(model, deque()).append((self._num_added, entry))

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def __iter__(self) -> Iterator[Entry]:
        for waiting in self._waiting.values():
            for _, entry in waiting:
                yield entry

    @property
    def models(self) -> list[str]:
        """The models that rows wait for, that of the longest wait first."""
        return sorted(self._waiting, key=lambda model: self._waiting[model][0][0])

    @property
    def first_may_wait(self) -> bool:
        """Whether others may still go before the row that has waited longest."""
        return self._num_passed < PATIENCE

    def next(self, *, ready: Container[str], coming: Container[str]) -> Entry | None:
        """The row to go next, where models are in memory (`ready`) or being loaded (`coming`).

        None if there is none, or if places must fall free for the row that has waited longest.
        """
        for model in (models := self.models):
            if model in ready:
                return self._waiting[model][0][1]
            if model == models[0] and model not in coming and not self.first_may_wait:
                return None
        return None

    def pop(self, model: str) -> Entry:
        """Takes the first row of that model out of the line."""
        self._num_passed = 0 if model == self.models[0] else self._num_passed + 1
        waiting = self._waiting[model]
        _, entry = waiting.popleft()
        if not waiting:
            del self._waiting[model]
        return entry
