"""`HostRates`, the pace at which this process asks each host: a rate that the user sets, and what the host asks for.

A host that answers 429 is left alone for the time that it names, and is asked at half the rate afterwards.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Final

from cachetools import LRUCache

from pia_ray.errors import FetchUnavailable

FIRST_HOLD_S: Final = 1.0
LONGEST_HOLD_S: Final = 60.0
"""Pause for a host that names none; doubles with each refusal in a row."""

RECOVERY_S: Final = 60.0
"""Seconds of good answers after which a rate that was halved is back where it was."""

SLOWEST_RATE: Final = 1 / 60
"""Requests per second to which refusals bring a host at most."""

KNOWN_HOSTS: Final = 10_000
"""Hosts whose pace is kept; a host that is asked again after so many others starts anew."""

_OBSERVED: Final = 64


@dataclass
class _Host:
    """The pace of one host; times are of the monotonic clock."""

    rate: float
    """Requests per second."""
    cut_rate: float = 0.0
    """The rate after the last refusal."""
    next_at: float = 0.0
    held_until: float = 0.0
    num_refusals: int = 0
    """In a row."""
    asked_at: deque[float] = field(default_factory=lambda: deque(maxlen=_OBSERVED))


class HostRates:
    """The turns of requests to hosts; threads share it. Hosts count by name, with all their ports.

    `rate` is in requests per second to one host; without it a host is asked without pause until it refuses.
    """

    def __init__(self, rate: float | None = None) -> None:
        self._ceiling = math.inf if rate is None else rate
        self._lock = threading.Lock()
        self._hosts: LRUCache[str, _Host] = LRUCache(KNOWN_HOSTS)

    def wait(
        self, host: str, *, limit_s: float = math.inf, stopped: threading.Event, note: Callable[[bool], None]
    ) -> float:
        """The seconds waited for the host's next turn. `note` is called with true while it waits, false afterwards.

        Raises:
            FetchUnavailable: the turn comes later than in `limit_s`, or the wait was stopped.
        """
        begin = time.monotonic()
        at = self._reserve(host, begin, before=begin + limit_s)
        try:
            while (left_s := at - time.monotonic()) > 0:
                note(True)
                if stopped.wait(left_s):
                    raise FetchUnavailable(f"the wait for {host} was stopped.", left_s)
                if self._is_held(host):  # it has refused others meanwhile
                    at = self._reserve(host, time.monotonic(), before=begin + limit_s)
        finally:
            note(False)
        with self._lock:
            self._host(host).asked_at.append(time.monotonic())
        return time.monotonic() - begin

    def refused(self, host: str, *, pause_s: float) -> None:
        """Notes an answer that asks for a pause; 0 where it names no time."""
        with self._lock:
            found, now = self._host(host), time.monotonic()
            if now >= found.held_until:  # else it answers a request that was under way at the last refusal
                found.num_refusals += 1
                if found.num_refusals == 1:  # one that follows at once says that the pause was short, not the rate high
                    observed = len(found.asked_at) / max(0.1, now - found.asked_at[0]) if found.asked_at else math.inf
                    found.rate = found.cut_rate = max(SLOWEST_RATE, min(found.rate, observed) / 2)
                found.asked_at.clear()
            own_s = min(LONGEST_HOLD_S, FIRST_HOLD_S * 2 ** min(10, found.num_refusals - 1))
            found.held_until = max(found.held_until, now + (pause_s or own_s))
            found.next_at = max(found.next_at, found.held_until)

    def answered(self, host: str) -> None:
        """Notes any other answer."""
        with self._lock:
            found = self._host(host)
            found.num_refusals = 0
            if found.rate < self._ceiling:
                found.rate = min(self._ceiling, found.rate + found.cut_rate / (RECOVERY_S * found.rate))

    def _host(self, host: str) -> _Host:
        found = self._hosts.get(host)
        if found is None:
            found = self._hosts[host] = _Host(self._ceiling)
        return found

    def _reserve(self, host: str, now: float, *, before: float) -> float:
        with self._lock:
            found = self._host(host)
            at = max(now, found.next_at, found.held_until)
            if at > before:
                raise FetchUnavailable(f"{host} is asked again in {at - now:.0f} s only.", at - now)
            found.next_at = at + 1 / found.rate
            return at

    def _is_held(self, host: str) -> bool:
        with self._lock:
            return self._host(host).held_until > time.monotonic()


def pause_of(retry_after: bytes) -> float:
    """The seconds that a Retry-After field asks for, as a number or a date; 0 for what is neither, or is past."""
    text = retry_after.decode("latin-1").strip()
    if text.isascii() and text.isdecimal() and len(text) < 10:
        return float(text)
    try:
        at = parsedate_to_datetime(text)
    except (ValueError, OverflowError):  # a year of many digits
        return 0.0
    at = at if at.tzinfo else at.replace(tzinfo=UTC)
    return max(0.0, (at - datetime.now(UTC)).total_seconds())
