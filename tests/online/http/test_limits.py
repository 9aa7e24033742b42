"""Callers and bodies are held to their limits."""

from __future__ import annotations

import asyncio
import tracemalloc
from typing import Any

import pytest

from pia_ray.errors import BodyTooLarge, Busy, HeadersTooLarge, RateLimited, SlowBody
from pia_ray.online.http.limits import BodyMemory, RateLimit, announced_bytes, check_headers, limited


def test_a_caller_gets_a_minutes_calls_at_once_and_then_its_share_of_a_second():
    now = 0.0
    rate = RateLimit(60, clock=lambda: now)
    for _ in range(60):
        rate.take("a")
    with pytest.raises(RateLimited) as raised:
        rate.take("a")
    assert raised.value.retry_after_s == pytest.approx(1)
    rate.take("b")
    now = 1.0
    rate.take("a")
    with pytest.raises(RateLimited):
        rate.take("a")
    now = 1000.0
    for _ in range(60):
        rate.take("a")
    with pytest.raises(RateLimited):
        rate.take("a")


def test_any_number_of_callers_takes_bounded_memory():
    rate, sizes = RateLimit(2, clock=lambda: 0.0), []
    rate.take("busy")
    tracemalloc.start()
    try:
        for number in range(45_000):
            rate.take(f"caller {number}")
            if number % 5_000 == 0 and number:
                with pytest.raises(RateLimited):
                    for _ in range(3):
                        rate.take("busy")
            if number in (15_000, 44_999):
                sizes.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    assert sizes[1] < 1.2 * sizes[0]


@pytest.mark.parametrize(
    ("length", "chunked", "room"), [("10", False, 10), (None, False, 0), ("x", False, 0), (None, True, 10)]
)
def test_the_memory_of_a_body_follows_from_its_headers(length: str | None, chunked: bool, room: int):
    assert announced_bytes(length, chunked=chunked, max_bytes=10) == room


@pytest.mark.parametrize("length", ["11", "9" * 400])
def test_a_body_is_refused_by_its_announced_length(length: str):
    with pytest.raises(BodyTooLarge):
        announced_bytes(length, chunked=False, max_bytes=10)


def test_bodies_that_do_not_fit_into_memory_together_wait_outside():
    memory = BodyMemory(10)
    with memory.hold(6), memory.hold(4):
        with pytest.raises(Busy), memory.hold(1):
            pass
        with memory.hold(0):
            pass
    with memory.hold(10):
        pass


def read(messages: list[Any], **limit: Any) -> bytes:
    async def receive() -> Any:
        if not messages:
            await asyncio.Event().wait()
        return messages.pop(0)

    async def read_all() -> bytes:
        inner = limited(receive, **{"timeout_s": 60, **limit})
        body = b""
        while True:
            message = await inner()
            body += message.get("body", b"")
            if not message.get("more_body"):
                return body

    return asyncio.run(read_all())


def part(body: bytes, more: bool = True) -> dict[str, Any]:
    return {"type": "http.request", "body": body, "more_body": more}


def test_a_body_is_given_up_as_soon_as_it_is_too_large():
    assert read([part(b"12345"), part(b"67890", False)], max_bytes=10) == b"1234567890"
    rest = [part(b"12345"), part(b"678901"), part(b"never taken", False)]
    with pytest.raises(BodyTooLarge):
        read(rest, max_bytes=10)
    assert len(rest) == 1


def test_a_body_that_trickles_is_given_up():
    with pytest.raises(SlowBody):
        read([part(b"1")], max_bytes=10, timeout_s=0.05)


def test_after_the_body_the_wait_for_a_hang_up_has_no_deadline():
    async def call() -> str:
        messages = [part(b"1", False)]

        async def receive() -> Any:
            if messages:
                return messages.pop()
            await asyncio.sleep(0.2)
            return {"type": "http.disconnect"}

        inner = limited(receive, max_bytes=10, timeout_s=0.05)
        await inner()
        return (await inner())["type"]

    assert asyncio.run(call()) == "http.disconnect"


@pytest.mark.parametrize("headers", [[(b"a", b"b")] * 201, [(b"cookie", b"x" * 66_000)]])
def test_a_flood_of_headers_is_refused(headers: list[tuple[bytes, bytes]]):
    check_headers([(b"a", b"b")] * 200)
    with pytest.raises(HeadersTooLarge):
        check_headers(headers)
