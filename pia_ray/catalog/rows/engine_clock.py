"""The busy time of one worker's engine: seconds in which it had at least one row."""

from __future__ import annotations

import threading
import time


class EngineClock:
    """Counts the seconds in which rows are in the engine. Threads share it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside: set[object] = set()
        self._since = 0.0
        self._busy_s = 0.0
        self._rows_s = 0.0
        self._counted_at = 0.0
        self._begun_at = time.monotonic()

    def enter(self, visit: object) -> None:
        """Says that a row has begun in the engine."""
        with self._lock:
            self._count()
            if not self._inside:
                self._since = self._counted_at
            self._inside.add(visit)

    def leave(self, visit: object) -> None:
        """Says that it has ended; without effect on one that never began."""
        with self._lock:
            if visit not in self._inside:
                return
            self._count()
            self._inside.discard(visit)
            if not self._inside:
                self._busy_s += self._counted_at - self._since

    @property
    def busy_s(self) -> float:
        """Seconds until now in which the engine had a row."""
        with self._lock:
            return self._busy_s + (time.monotonic() - self._since if self._inside else 0.0)

    @property
    def rows_s(self) -> float:
        """Seconds until now that rows were in the engine, of all rows together."""
        with self._lock:
            self._count()
            return self._rows_s

    @property
    def up_s(self) -> float:
        """Seconds since the worker came up."""
        return time.monotonic() - self._begun_at

    @property
    def busy_share(self) -> float | None:
        """Share of the time since the worker came up in which the engine had a row; None before its first one."""
        busy_s = self.busy_s
        return busy_s / self.up_s if busy_s else None

    def _count(self) -> None:
        now = time.monotonic()
        self._rows_s += len(self._inside) * (now - self._counted_at)
        self._counted_at = now
