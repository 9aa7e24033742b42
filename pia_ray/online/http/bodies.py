"""Limits of requests' bodies: the bytes of one and of all together, the share of a caller, and the least rate.

Starlette 1.10 limits the bytes of a body too, but neither its time nor all bodies together, and answers in plain text.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from starlette.types import Message, Receive

from pia_ray.errors import BodyTooLarge, Busy, SlowBody

LARGEST_BODIES: Final = 10
"""So many bodies of the largest size may be in memory at once, or more of smaller ones."""

LARGEST_OF_CALLER: Final = 8
"""So many of them of one caller; the rest is for others."""

WINDOW_S: Final = 10.0
"""Seconds over which the rate of a body is measured."""

AddBytes = Callable[[int], None]
"""Counts bytes of a body that have arrived. Raises Busy where there is no memory for them."""


class BodyMemory:
    """Memory for the bodies of all requests together, and the part of it that one caller may fill. For one event loop.

    Bytes count once they have arrived: a body that is announced and does not come holds nothing from others. What one
    caller announces at a time is bounded too, so that its bodies are refused unread.
    """

    def __init__(self, total_bytes: int, *, caller_bytes: int) -> None:
        self._total = total_bytes
        self._of_caller = caller_bytes
        self._held_bytes = 0
        self._announced: Counter[str] = Counter()

    @contextmanager
    def hold(self, caller: str, announced: int) -> Iterator[AddBytes]:
        """Holds memory for what arrives of a body until its request is done.

        Raises:
            Busy: the caller sends too much at a time.
        """
        if self._announced[caller] + announced > self._of_caller:
            raise Busy("You send too many large requests at a time: try again in some seconds.", 2.0)
        self._announced[caller] += announced
        arrived = 0

        def add(num_bytes: int) -> None:
            nonlocal arrived
            if self._held_bytes + num_bytes > self._total:
                raise Busy("Too many large requests are being received: try again in some seconds.", 2.0)
            self._held_bytes += num_bytes
            arrived += num_bytes

        try:
            yield add
        finally:
            self._held_bytes -= arrived
            self._announced[caller] -= announced
            if not self._announced[caller]:
                del self._announced[caller]


@dataclass(frozen=True)
class BodyLimits:
    """The limits of one body."""

    max_bytes: int
    timeout_s: float
    """Seconds within which the whole body has to arrive."""
    bytes_per_s: float = 0.0
    """The least rate, in each window of `window_s` in which the body is waited for."""
    window_s: float = WINDOW_S


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


def limited(receive: Receive, limits: BodyLimits, add: AddBytes) -> Receive:
    """A `receive` that counts what arrives by `add`, and raises where the body exceeds a limit.

    Raises, when it is called:
        BodyTooLarge, SlowBody: the body exceeds a limit.
        Busy: there is no memory for it.
    """
    received, ended, pace = 0, False, _Pace(limits)

    async def receive_limited() -> Message:
        nonlocal received, ended
        if ended:
            return await receive()
        message = await pace.next(receive)
        num_bytes = len(message.get("body", b""))
        received += num_bytes
        ended = not message.get("more_body", False)
        if received > limits.max_bytes:
            raise _too_large(limits.max_bytes)
        add(num_bytes)
        return message

    return receive_limited


class _Pace:
    """The time that a body is waited for, as a whole and in the present window."""

    def __init__(self, limits: BodyLimits) -> None:
        self._limits = limits
        self._deadline: float | None = None
        self._waited_s = 0.0
        self._num_bytes = 0

    async def next(self, receive: Receive) -> Message:
        """The next message, if it comes in time.

        Raises:
            SlowBody: it does not.
        """
        limits, begun = self._limits, time.monotonic()
        self._deadline = begun + limits.timeout_s if self._deadline is None else self._deadline
        # A window that has its bytes is followed by one that may be empty until its end.
        windows = 2 if self._num_bytes >= limits.bytes_per_s * limits.window_s else 1
        window_left_s = windows * limits.window_s - self._waited_s if limits.bytes_per_s else limits.timeout_s
        left_s = self._deadline - begun
        try:
            async with asyncio.timeout(min(window_left_s, left_s)):
                message = await receive()
        except TimeoutError:
            if left_s <= window_left_s:
                raise SlowBody(f"The body did not arrive within {limits.timeout_s:g} seconds.") from None
            raise SlowBody(
                f"The body arrives at less than {limits.bytes_per_s:,.0f} bytes a second over {limits.window_s:g} s."
            ) from None
        self._waited_s += time.monotonic() - begun
        if self._waited_s >= limits.window_s:
            self._waited_s, self._num_bytes = self._waited_s % limits.window_s, 0
        self._num_bytes += len(message.get("body", b""))
        return message


def _too_large(max_bytes: int) -> BodyTooLarge:
    return BodyTooLarge(f"The request's body is larger than the {max_bytes:,} bytes that are taken.")
