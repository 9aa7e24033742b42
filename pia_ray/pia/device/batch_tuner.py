"""The number of UNet evaluations in a forward: found by timing forwards of two sizes by turns, now and then again.

Larger forwards pay until the device is busy; beyond that they only take memory. Knows no torch.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Final

SAMPLES: Final = 3
"""Timed forwards of one size in succession, after a first one that may compile or choose kernels."""

ROUNDS: Final = 3
"""Comparisons of two sizes that decide where all of them agree."""

MOST_ROUNDS: Final = 7
"""Comparisons of two sizes after which the median decides."""

LEAST_GAIN: Final = 0.03
"""A doubling that saves less time per evaluation than this share is not worth its memory and its latency."""

START: Final = 2
"""The evaluations of one row with guidance."""

REMEASURE_S: Final = 1800.0
"""Time after which a size is compared with its half and its double again: the load of a shared device changes."""

RETRY_S: Final = 300.0
"""Time without an out-of-memory after which twice the size is allowed again."""

MOST_RETRY_S: Final = 7200.0
"""Most of that time, which doubles with each size that was allowed again too soon."""


class ForwardTuner:
    """Doubles the size of forwards while that pays. Not for several threads.

    `most` bounds the size. `limit` is the largest forward to run now; the caller times forwards of exactly that size
    and calls `record`, until `settled`. The first size is `start`; where that is `most`, nothing is timed. Only
    `reconsider` and `shrink` look at the `clock`, in seconds.
    """

    def __init__(self, *, most: int, start: int = START, clock: Callable[[], float] = time.monotonic) -> None:
        self._most = self._bound = max(1, most)
        self._start = self._best = min(start, self._most)
        self._clock = clock
        self._settled_at = clock()
        self._raised_at: float | None = None
        self._retry_at: float | None = None
        self._retry_s = RETRY_S
        self._comparison = self._compare(self._best)
        self.room: int | None = None
        """Evaluations that fit in the memory that is free now; None: any number."""

    @property
    def settled(self) -> bool:
        """Whether the size has been found, or the next one does not fit in the memory that is free now."""
        return self._comparison is None or (self.room is not None and self._comparison.size > self.room)

    @property
    def limit(self) -> int:
        """Most evaluations of the coming forwards, at least 1."""
        return self._bounded(self._best if self.settled or self._comparison is None else self._comparison.size)

    @property
    def largest(self) -> int:
        """Most evaluations of a forward until the size is found; after that `limit`."""
        return self._bounded(self._best if self.settled or self._comparison is None else self._comparison.larger)

    def reconsider(self) -> None:
        """Allows twice the size some time after memory ran out, and compares sizes again after `REMEASURE_S`."""
        now = self._clock()
        if self._retry_at is not None and now >= self._retry_at:
            self._bound = min(2 * self._bound, self._most)
            self._raised_at = now
            self._retry_at = now + self._retry_s if self._bound < self._most else None
            self._comparison = self._comparison or self._compare(self._best)
        elif self._comparison is None and now - self._settled_at >= REMEASURE_S:
            self._settled_at = now
            self._comparison = self._compare(max(self._start, self._best // 2))

    def record(self, size: int, seconds: float) -> None:
        """Records the time of a forward; those of another size than `limit` are ignored."""
        comparison = self._comparison
        if comparison is None or self.settled or size != comparison.size:
            return
        pays = comparison.record(seconds)
        if pays is None:
            return
        self._best = comparison.larger if pays else comparison.smaller
        self._comparison = self._compare(self._best) if pays else None
        self._settled_at = self._clock()

    def shrink(self, most: int) -> float:
        """Bounds the size, because memory ran out with a larger one; returns for how many seconds."""
        now = self._clock()
        if self._raised_at is not None and now - self._raised_at < self._retry_s:
            self._retry_s = min(2 * self._retry_s, MOST_RETRY_S)
        elif self._retry_at is None:
            self._retry_s = RETRY_S
        self._raised_at = None
        self._bound = max(1, most)
        self._retry_at, self._settled_at = now + self._retry_s, now
        self._comparison = None
        return self._retry_s

    def _compare(self, smaller: int) -> _Comparison | None:
        """A comparison of this size with its double; None where the double is not allowed."""
        return _Comparison(smaller) if 2 * smaller <= self._bound else None

    def _bounded(self, size: int) -> int:
        return max(1, min(size, self._bound, self._most if self.room is None else self.room))


class _Comparison:
    """Times a size and its double by turns, so that work of others on the device meets both.

    The gains of single rounds differ by what else runs. Where all agree on `LEAST_GAIN`, a few rounds decide.
    """

    def __init__(self, smaller: int) -> None:
        self.smaller = self.size = smaller
        self.larger = 2 * smaller
        self._seconds: list[float] = []
        self._smaller_s = 0.0
        self._gains: list[float] = []

    def record(self, seconds: float) -> bool | None:
        """Records a forward of `size`; returns whether the larger size pays, and None while that is not known."""
        self._seconds.append(seconds)
        if len(self._seconds) <= SAMPLES:
            return None
        each_s = statistics.median(self._seconds[1:]) / self.size
        self._seconds.clear()
        if self.size == self.smaller:
            self.size, self._smaller_s = self.larger, each_s
            return None
        self.size = self.smaller
        self._gains.append(1 - each_s / self._smaller_s)
        agree = len({gain >= LEAST_GAIN for gain in self._gains}) == 1
        if len(self._gains) < ROUNDS or not (agree or len(self._gains) == MOST_ROUNDS):
            return None
        return statistics.median(self._gains) >= LEAST_GAIN
