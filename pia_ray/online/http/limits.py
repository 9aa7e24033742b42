"""Limits of HTTP requests: calls a minute, headers, bytes and time of a body.

Starlette 1.10 limits the bytes of a body too, but neither its time nor all bodies together, and answers in plain text.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final

from cachetools import LRUCache
from starlette.types import Message, Receive

from pia_ray.errors import BodyTooLarge, Busy, HeadersTooLarge, RateLimited, SlowBody

LARGEST_BODIES: Final = 8
"""So many bodies of the largest size may be in memory at once, or more of smaller ones."""

MAX_HEADERS: Final = 200
MAX_HEADER_BYTES: Final = 65_536
"""All headers of a request together. Servers that parse with httptools have no limit of their own."""

_MAX_CALLERS: Final = 10_000


class RateLimit:
    """A token bucket per caller, which holds a minute's calls and fills steadily. Safe in threads."""

    def __init__(self, per_minute: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_minute = per_minute
        self._clock = clock
        self._lock = threading.Lock()
        # Who falls out has not called for the longest time: its bucket is full again, or nearly.
        self._buckets: LRUCache[str, tuple[float, float]] = LRUCache(_MAX_CALLERS)

    def take(self, caller: str) -> None:
        """Counts one call.

        Raises:
            RateLimited: the bucket is empty.
        """
        now, per_s = self._clock(), self._per_minute / 60
        with self._lock:
            left, since = self._buckets.get(caller, (float(self._per_minute), now))
            left = min(float(self._per_minute), left + (now - since) * per_s)
            allowed = left >= 1
            self._buckets[caller] = (left - 1 if allowed else left, now)
        if not allowed:
            raise RateLimited(
                f"More than {self._per_minute} calls a minute: slow down, and try again after `retry-after` seconds.",
                (1 - left) / per_s,
            )


class BodyMemory:
    """Memory for the bodies of all requests together. For one event loop."""

    def __init__(self, total_bytes: int) -> None:
        self._left = total_bytes

    @contextmanager
    def hold(self, num_bytes: int) -> Iterator[None]:
        """Reserves memory for a body until its request is done.

        Raises:
            Busy: there is not enough now.
        """
        if num_bytes > self._left:
            raise Busy("Too many large requests are being received: try again in some seconds.", 2.0)
        self._left -= num_bytes
        try:
            yield
        finally:
            self._left += num_bytes


def check_headers(headers: Sequence[tuple[bytes, bytes]]) -> None:
    """Refuses a request with too many headers.

    Raises:
        HeadersTooLarge: they are over `MAX_HEADERS` or `MAX_HEADER_BYTES`.
    """
    if len(headers) > MAX_HEADERS or sum(len(name) + len(value) for name, value in headers) > MAX_HEADER_BYTES:
        raise HeadersTooLarge(f"A request may have {MAX_HEADERS} headers of {MAX_HEADER_BYTES:,} bytes together.")


def announced_bytes(length: str | None, *, chunked: bool, max_bytes: int) -> int:
    """Bytes of a body by its headers; one in chunks counts as the largest.

    Raises:
        BodyTooLarge: they are over the limit.
    """
    if chunked:
        return max_bytes
    if length is None or not (length.isascii() and length.isdigit()):
        return 0  # without either header there is no body
    if len(length) > 20 or int(length) > max_bytes:
        raise _too_large(max_bytes)
    return int(length)


def limited(receive: Receive, *, max_bytes: int, timeout_s: float) -> Receive:
    """A `receive` that raises `BodyTooLarge` or `SlowBody` where the body is read, once it exceeds either limit."""
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


def _too_large(max_bytes: int) -> BodyTooLarge:
    return BodyTooLarge(f"The request's body is larger than the {max_bytes:,} bytes that are taken.")
