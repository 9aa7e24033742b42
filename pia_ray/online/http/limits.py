"""Limits of HTTP requests: calls a minute, open requests of a caller, headers. `bodies` has those of bodies."""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from cachetools import LRUCache

from pia_ray.errors import Busy, HeadersTooLarge, RateLimited

MAX_HEADERS: Final = 200
MAX_HEADER_BYTES: Final = 65_536
"""All headers of a request together. Servers that parse with httptools have no limit of their own."""

_MAX_CALLERS: Final = 10_000


STATUS_COST: Final = 0.1
"""Share of a call that a read of a job's or batch's status counts as, because clients poll."""


@dataclass(frozen=True)
class Allowance:
    """The state of a caller's calls a minute."""

    limit: int
    left: int
    full_in_s: float
    """Seconds until all calls of a minute are there again, if no more are made."""

    @property
    def headers(self) -> dict[str, str]:
        """The headers in which OpenAI's API says the same."""
        return {
            "x-ratelimit-limit-requests": str(self.limit),
            "x-ratelimit-remaining-requests": str(self.left),
            "x-ratelimit-reset-requests": _duration(self.full_in_s),
        }


class RateLimit:
    """A token bucket per caller, which holds a minute's calls and fills steadily. Safe in threads."""

    def __init__(self, per_minute: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_minute = per_minute
        self._clock = clock
        self._lock = threading.Lock()
        # Who falls out has not called for the longest time: its bucket is full again, or nearly.
        self._buckets: LRUCache[str, tuple[float, float]] = LRUCache(_MAX_CALLERS)

    def take(self, caller: str, *, cost: float = 1.0) -> None:
        """Counts one call, or the share `cost` of one.

        Raises:
            RateLimited: the bucket is empty.
        """
        now, per_s = self._clock(), self._per_minute / 60
        with self._lock:
            left = self._left(caller, now)
            allowed = left >= cost
            self._buckets[caller] = (left - cost if allowed else left, now)
        if not allowed:
            raise RateLimited(
                f"More than {self._per_minute} calls a minute: slow down, and try again after `retry-after` seconds.",
                (cost - left) / per_s,
            )

    def allowance(self, caller: str) -> Allowance:
        """The calls that a caller has left."""
        with self._lock:
            left = round(self._left(caller, self._clock()), 6)  # tenths do not add up exactly
        return Allowance(self._per_minute, int(left), (self._per_minute - left) * 60 / self._per_minute)

    def _left(self, caller: str, now: float) -> float:
        left, since = self._buckets.get(caller, (float(self._per_minute), now))
        return min(float(self._per_minute), left + (now - since) * self._per_minute / 60)


class OpenRequests:
    """The requests of each caller that have no answer yet. For one event loop.

    A caller that sends slowly or does not read its answers holds no more than its share of an ingress.
    """

    def __init__(self, per_caller: int) -> None:
        self._per_caller = per_caller
        self._open: Counter[str] = Counter()

    @contextmanager
    def hold(self, caller: str) -> Iterator[None]:
        """Counts a request until it has been answered.

        Raises:
            Busy: the caller has the maximum of open requests.
        """
        if self._open[caller] >= self._per_caller:
            raise Busy(f"{self._per_caller} requests of yours are being answered: wait until some have ended.", 2.0)
        self._open[caller] += 1
        try:
            yield
        finally:
            self._open[caller] -= 1
            if not self._open[caller]:
                del self._open[caller]


def check_headers(headers: Sequence[tuple[bytes, bytes]]) -> None:
    """Refuses a request with too many headers.

    Raises:
        HeadersTooLarge: they are over `MAX_HEADERS` or `MAX_HEADER_BYTES`.
    """
    if len(headers) > MAX_HEADERS or sum(len(name) + len(value) for name, value in headers) > MAX_HEADER_BYTES:
        raise HeadersTooLarge(f"A request may have {MAX_HEADERS} headers of {MAX_HEADER_BYTES:,} bytes together.")


def _duration(seconds: float) -> str:
    """A duration as OpenAI's headers have it, such as "120ms", "1s" and "6m0s"."""
    milliseconds = math.ceil(round(seconds * 1000, 3))
    if milliseconds < 1000:
        return f"{milliseconds}ms"
    minutes, rest = divmod(math.ceil(milliseconds / 1000), 60)
    return f"{minutes}m{rest}s" if minutes else f"{rest}s"
