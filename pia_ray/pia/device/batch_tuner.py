"""The number of UNet evaluations in a forward. It is found by timing the first forwards of each shape, and then kept.

Larger forwards pay until the device is busy; beyond that they only take memory. Knows no torch.
"""

from __future__ import annotations

import statistics
from typing import Final

SAMPLES: Final = 3
"""Timed forwards of one size, after a first one that may compile or choose kernels."""

LEAST_GAIN: Final = 0.03
"""A doubling that saves less time per evaluation than this share is not worth its memory and its latency."""

START: Final = 2
"""The evaluations of one row with guidance."""


class ForwardTuner:
    """Doubles the size of forwards while that pays. Not for several threads.

    `most` bounds the size. `limit` is the largest forward to run now; the caller times forwards of exactly that size
    and calls `record`, until `settled`. The first size is `start`; where that is `most`, nothing is timed.
    """

    def __init__(self, *, most: int, start: int = START) -> None:
        self._most = max(1, most)
        self._best = self._trying = min(start, self._most)
        self._best_s = float("inf")
        self._seconds: list[float] = []
        self._found = self._trying == self._most
        self.room: int | None = None
        """Evaluations that fit in the memory that is free now; None: any number."""

    @property
    def settled(self) -> bool:
        """Whether the size has been found, or a larger one does not fit in the memory that is free now."""
        return self._found or (self.room is not None and self._trying > self.room)

    @property
    def limit(self) -> int:
        """Most evaluations of the coming forwards, at least 1."""
        most = self._best if self.settled else self._trying
        return most if self.room is None else max(1, min(most, self.room))

    def record(self, size: int, seconds: float) -> None:
        """Records the time of a forward; those of another size than `limit` are ignored."""
        if self.settled or size != self._trying:
            return
        self._seconds.append(seconds)
        if len(self._seconds) <= SAMPLES:
            return
        each_s = statistics.median(self._seconds[1:]) / size
        self._seconds.clear()
        if each_s > self._best_s * (1 - LEAST_GAIN):
            self._found = True
            return
        self._best, self._best_s = size, each_s
        if 2 * size > self._most:
            self._found = True
        else:
            self._trying = 2 * size

    def shrink(self, most: int) -> None:
        """Bounds the size for good, because memory ran out with a larger one."""
        self._most = max(1, most)
        self._best = min(self._best, self._most)
        self._trying = min(self._trying, self._most)
        self._found = True
