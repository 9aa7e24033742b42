"""`PrefetchTuner`: the number of rows that a worker has at once, by what its engine waits for."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final

from pia_ray.catalog.rows.in_flight import InFlightRows

IDLE: Final = 0.02
"""Share of the engine's time without rows from which it has to have more of them ahead."""

FULL: Final = 0.005
"""Share below which it has more of them than it needs, where two wait for it all the time."""

WINDOW_S: Final = 0.5
"""Seconds between two changes at least."""

WINDOW_ROWS: Final = 4
"""Rows between two changes at least."""

MOST_PICTURE_BYTES: Final = 256 * 2**20
"""Memory of the decoded pictures of a worker's rows, beyond which it has no more of them at once than at first."""


class PrefetchTuner:
    """Grows the number of rows while the engine idles although rows wait, and shrinks it back where it does not help.

    The engine has `batch_size` rows at once. The number stays between `least` and `most`.
    """

    def __init__(
        self,
        rows: InFlightRows,
        *,
        batch_size: Callable[[], int],
        least: int,
        most: int,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._rows = rows
        self._batch_size = batch_size
        self._least = least
        self._most = most
        self._now = now
        self._lock = threading.Lock()
        self._begun_at: float | None = None
        self._rows_s = 0.0
        self._ended = 0
        self._queued = most
        self._starved = True

    def __call__(self, limit: int, waiting: int) -> int:
        """The new number, after a row has ended while so many others wait to begin."""
        with self._lock:
            if self._begun_at is None:  # the engine's wait for its first row says nothing of later ones
                self._begin()
                return limit
            self._ended += 1
            self._queued = min(self._queued, self._rows.num_queued)
            self._starved = self._starved and waiting > 0
            span_s = self._now() - self._begun_at
            if self._ended < max(limit, WINDOW_ROWS) or span_s < WINDOW_S:
                return limit
            rows_s = self._rows.engine.rows_s - self._rows_s
            limit = self._next(limit, 1.0 - rows_s / (span_s * self._batch_size()))
            self._begin()
            return limit

    def _next(self, limit: int, idle: float) -> int:
        if self._starved and idle > IDLE:
            limit += max(1, (limit - self._least) // 2)
        elif idle < FULL and self._queued >= 2:
            limit -= 1
        largest = self._rows.largest_picture_bytes
        room = MOST_PICTURE_BYTES // largest if largest else limit
        return max(self._least, min(limit, self._most, room))

    def _begin(self) -> None:
        self._begun_at = self._now()
        self._rows_s = self._rows.engine.rows_s
        self._ended = 0
        self._queued = self._most
        self._starved = True
