"""A proxy before an S3 server whose faults come in spells: for some seconds, on a share of the requests."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from tests.chaos_proxy import CUT_BODY, LOSE_ANSWER, RESET, ChaosProxy

SLOW = "slow"
"""The request waits before it is passed on."""
SLOW_S = 0.5


@dataclass(frozen=True)
class Spell:
    """A fault of the store for some seconds."""

    fault: str | int
    share: float
    """Of the requests that match."""
    seconds: float
    matches: Callable[[str, str], bool] = lambda method, path: True
    """Takes method and path of a request."""


def lost_answers(seconds: float) -> Spell:
    return Spell(LOSE_ANSWER, 0.3, seconds)


def cut_bodies(seconds: float) -> Spell:
    return Spell(CUT_BODY, 0.3, seconds, lambda method, path: method == "GET")


def throttling(seconds: float) -> Spell:
    return Spell(503, 0.5, seconds)


def server_errors(seconds: float) -> Spell:
    return Spell(500, 0.3, seconds)


def slowness(seconds: float) -> Spell:
    return Spell(SLOW, 0.5, seconds)


def absence(seconds: float) -> Spell:
    return Spell(RESET, 1.0, seconds)


def denial_of_videos(seconds: float) -> Spell:
    return Spell(403, 1.0, seconds, lambda method, path: method == "PUT" and "/videos/" in path)


def denial(seconds: float) -> Spell:
    return Spell(403, 1.0, seconds, lambda method, path: method == "PUT")


class FaultyStore(ChaosProxy):
    """A `ChaosProxy` with spells. Faults are drawn from `seed`."""

    def __init__(self, server_url: str, *, seed: int = 0) -> None:
        super().__init__(server_url)
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._spells: list[tuple[float, Spell]] = []
        self.num_requests = 0
        self.num_faults = 0

    def begin(self, spell: Spell) -> None:
        """Lets the store be like this for the spell's seconds."""
        with self._lock:
            self._spells.append((time.monotonic() + spell.seconds, spell))

    def calm(self) -> None:
        """Ends all spells."""
        with self._lock:
            self._spells.clear()

    @property
    def is_away(self) -> bool:
        """Whether something is the matter with it now."""
        with self._lock:
            return any(until > time.monotonic() for until, _ in self._spells)

    def next_fault(self, method: str, path: str) -> str | int | None:
        """The fault for this request."""
        fault = self._draw(method, path)
        if fault == SLOW:
            time.sleep(SLOW_S)
            return None
        return fault

    def _draw(self, method: str, path: str) -> str | int | None:
        with self._lock:
            self.num_requests += 1
            now = time.monotonic()
            self._spells = [(until, spell) for until, spell in self._spells if until > now]
            for _, spell in self._spells:
                if spell.matches(method, path) and self._random.random() < spell.share:
                    self.num_faults += 1
                    return spell.fault
            return None
