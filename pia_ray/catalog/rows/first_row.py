"""`FirstRow`: the row that a worker's engine begins with."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class FirstRow:
    """The first row that comes to a worker's engine; with `alone` it has the engine to itself.

    A run's first video is there sooner then. On a CPU four rows at once take four times as long as one, to a tenth.
    """

    def __init__(self, *, alone: bool) -> None:
        self._lock = threading.Lock()
        self._turn = threading.Lock()
        """Held while the first row is submitted."""
        self._is_free = alone
        self._is_running = False

    def room(self, places: int) -> int:
        """The number of rows that an engine of so many places may have: one before the first row, none beside it."""
        with self._lock:
            if self._is_running:
                return 0
            return 1 if self._is_free else places

    @contextmanager
    def turn(self) -> Iterator[bool]:
        """Whether the row that is submitted in the block is the first one and is to be alone; true once.

        Others wait for the first one's block: one that came to the engine before it would run with its likes.
        """
        with self._turn:
            if self._claim():
                yield True
                return
        yield False

    def _claim(self) -> bool:
        with self._lock:
            is_first, self._is_free = self._is_free, False
            self._is_running = self._is_running or is_first
            return is_first

    def end(self) -> None:
        """Says that the first row has left the engine."""
        self._is_running = False
