"""Times of a renderer: the speed of its requests, and the deadline of each."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable
from typing import Final, TypeVar

from pia_ray.errors import Timeout
from pia_ray.online.rendering.renderer import StepDone

Result = TypeVar("Result")

_UNKNOWN_S: Final = 5.0
"""Seconds until a place is free, before any request has ended."""

_MOST_S: Final = 60
"""The most seconds that a caller is told to wait: the openai clients obey no greater number."""


class Tally:
    """The speed of requests, measured by their events."""

    def __init__(self) -> None:
        self._latest: dict[str, tuple[int, float]] = {}
        self._begun_at: dict[str, float] = {}
        self._used_s: dict[str, float] = {}
        self.step_s: float | None = None
        """Seconds of a recent step of one request; None before the first."""
        self._request_s: float | None = None
        self._booked: dict[str, float] = {}
        """By owner, the time for which its latest refused request was told to come again."""

    @property
    def num_running(self) -> int:
        """Requests that have done a step and have not ended."""
        return len(self._latest)

    def count(self, request_id: str, event: StepDone) -> float:
        """Counts a step of a request. Its share of the engine's time between its steps until now, in seconds."""
        now = time.monotonic()
        self._begun_at.setdefault(request_id, now)
        done, at = self._latest.get(request_id, (0, now))
        if 0 < done < event.done:  # else another take begins, which may have waited
            self.step_s = _mean(self.step_s, (now - at) / (event.done - done))
            self._used_s[request_id] = self._used_s.get(request_id, 0.0) + (now - at) / len(self._latest)
        self._latest[request_id] = event.done, now
        return self._used_s.get(request_id, 0.0)

    def end(self, request_id: str) -> None:
        """Counts the end of a request; without effect on one that never began."""
        self._used_s.pop(request_id, None)
        if self._latest.pop(request_id, None) is not None:
            self._request_s = _mean(self._request_s, time.monotonic() - self._begun_at.pop(request_id))

    def seconds_until_free(self, max_batch_size: int, owner: str) -> float:
        """Estimated seconds until there is a place for this owner, where `max_batch_size` requests denoise together.

        A whole number, 1 to 60. Owners that have been refused come in turn, and each refusal of one owner is for a
        later place, so that callers who come when they are told to do not all come at once.
        """
        now = time.monotonic()
        self._booked = {each: at for each, at in self._booked.items() if at > now}
        place_s = _UNKNOWN_S if self._request_s is None else self._request_s / max_batch_size
        at = self._booked.get(owner, now) + place_s * len(self._booked.keys() | {owner})
        self._booked[owner] = min(at, now + _MOST_S)
        return float(min(_MOST_S, max(1, math.ceil(at - now))))


class Deadline:
    """The deadline of a request, counted from now or from `begun_at`. With None it has no deadline."""

    def __init__(self, deadline_s: float | None, *, begun_at: float | None = None) -> None:
        self._started = time.monotonic() if begun_at is None else begun_at
        self._deadline_s = deadline_s

    @property
    def elapsed_s(self) -> float:
        """Seconds since it began."""
        return time.monotonic() - self._started

    @property
    def left_s(self) -> float | None:
        """Seconds until its deadline, at least 0."""
        return None if self._deadline_s is None else max(0.0, self._deadline_s - self.elapsed_s)

    def share(self, part: float) -> Deadline:
        """A deadline that began at the same time and has this part of its seconds."""
        return Deadline(None if self._deadline_s is None else part * self._deadline_s, begun_at=self._started)

    async def within(self, awaited: Awaitable[Result]) -> Result:
        """The awaited value, if it comes before the deadline.

        Raises:
            Timeout: it does not.
        """
        try:
            return await asyncio.wait_for(awaited, self.left_s)
        except TimeoutError:
            raise Timeout(f"not finished within its deadline of {self._deadline_s:g} s") from None


def _mean(before: float | None, value: float) -> float:
    return value if before is None else 0.8 * before + 0.2 * value
