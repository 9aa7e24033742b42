"""How much a caller may ask for: calls a minute, bytes and time of a body, size of a video."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Final

from starlette.types import Message, Receive

from pia_ray.config import ServeConfig
from pia_ray.errors import BadParameter, BodyTooLarge, RateLimited, SlowBody
from pia_ray.params import AnimationParams

BODY_TIMEOUT_S: Final = 120.0
"""Seconds that a body may take to arrive, however slowly its bytes come."""

MAX_FIELDS: Final = 100
MAX_FILES: Final = 10

_MAX_CALLERS: Final = 10_000


class RateLimit:
    """A bucket for each caller that holds a minute's calls and fills steadily. Safe in threads."""

    def __init__(self, per_minute: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_minute = per_minute
        self._clock = clock
        self._lock = threading.Lock()
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def __len__(self) -> int:
        """Callers that are remembered."""
        return len(self._buckets)

    def take(self, caller: str) -> None:
        """Counts one call.

        Raises:
            RateLimited: the bucket is empty.
        """
        now, per_s = self._clock(), self._per_minute / 60
        with self._lock:
            left, since = self._buckets.pop(caller, (float(self._per_minute), now))
            left = min(float(self._per_minute), left + (now - since) * per_s)
            allowed = left >= 1
            self._buckets[caller] = (left - 1 if allowed else left, now)
            while len(self._buckets) > _MAX_CALLERS:  # the longest unheard of has a full bucket again, or nearly
                self._buckets.popitem(last=False)
        if not allowed:
            raise RateLimited(
                f"More than {self._per_minute} calls a minute: slow down, and try again after `retry-after` seconds.",
                (1 - left) / per_s,
            )


def limited(receive: Receive, *, max_bytes: int, timeout_s: float = BODY_TIMEOUT_S) -> Receive:
    """`receive` that gives up on a body that is too large or too slow while it arrives. `check_length` goes first.

    What it raises comes out where the body is read: `BodyTooLarge` or `SlowBody`.
    """
    received = 0
    ended = False
    deadline: float | None = None

    async def receive_limited() -> Message:
        nonlocal received, ended, deadline
        if ended:
            return await receive()
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s if deadline is None else deadline
        try:
            async with asyncio.timeout_at(deadline):
                message = await receive()
        except TimeoutError:
            raise SlowBody(f"The body did not arrive within {timeout_s:g} seconds.") from None
        received += len(message.get("body", b""))
        ended = not message.get("more_body", False)
        if received > max_bytes:
            raise _too_large(max_bytes)
        return message

    return receive_limited


def check_length(length: str | None, max_bytes: int) -> None:
    """Refuses a body by its announced length, before any of it is read.

    Raises:
        BodyTooLarge: it is over the limit.
    """
    if length is not None and length.isascii() and length.isdigit() and int(length[:20]) > max_bytes:
        raise _too_large(max_bytes)


def check_size(resolved: AnimationParams, config: ServeConfig) -> None:
    """Refuses videos that are longer than this endpoint makes.

    Raises:
        BadParameter: names the knob.
    """
    for name, most in (("num_frames", config.max_frames), ("num_inference_steps", config.max_steps)):
        if (value := getattr(resolved, name)) > most:
            raise BadParameter(f"{name} must be at most {most} at this endpoint (got {value})", name)
    if resolved.num_videos > 1:
        raise BadParameter("num_videos must be 1 here: a request makes one video; send one for each seed", "num_videos")


def _too_large(max_bytes: int) -> BodyTooLarge:
    return BodyTooLarge(f"The request's body is larger than the {max_bytes:,} bytes that are taken.")
