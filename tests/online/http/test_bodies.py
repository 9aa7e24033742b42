"""Bodies are held to their bytes, their rate, and their callers' share of the memory."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from pia_ray.errors import BodyTooLarge, Busy, SlowBody
from pia_ray.online.http.bodies import BodyLimits, BodyMemory, announced_bytes, limited


@pytest.mark.parametrize(
    ("length", "chunked", "room"), [("10", False, 10), (None, False, 0), ("x", False, 0), (None, True, 10)]
)
def test_the_length_of_a_body_follows_from_its_headers(length: str | None, chunked: bool, room: int):
    assert announced_bytes(length, chunked=chunked, max_bytes=10) == room


@pytest.mark.parametrize("length", ["11", "9" * 400])
def test_a_body_is_refused_by_its_announced_length(length: str):
    with pytest.raises(BodyTooLarge):
        announced_bytes(length, chunked=False, max_bytes=10)


def test_bodies_that_do_not_fit_into_memory_together_wait_outside():
    memory = BodyMemory(10, caller_bytes=5)
    with memory.hold("a", 5) as first, memory.hold("b", 5) as second, memory.hold("c", 5) as third:
        first(5)
        second(4)
        with pytest.raises(Busy):
            third(2)
        third(1)
    with memory.hold("a", 5) as again:
        again(5)


def test_a_caller_sends_no_more_than_its_part_of_the_memory_at_a_time():
    memory = BodyMemory(10, caller_bytes=5)
    with memory.hold("a", 5), memory.hold("b", 5) as other:
        with pytest.raises(Busy), memory.hold("a", 1):
            pass
        other(5)
    with memory.hold("a", 5):
        pass


def test_announced_bodies_that_do_not_come_hold_no_memory_from_others():
    memory = BodyMemory(10, caller_bytes=10)
    with memory.hold("a", 10), memory.hold("b", 10) as other:
        other(10)


def read(messages: list[Any], **limit: Any) -> bytes:
    async def receive() -> Any:
        if not messages:
            await asyncio.Event().wait()
        return messages.pop(0)

    async def read_all() -> bytes:
        add = limit.pop("add", lambda _: None)
        inner = limited(receive, BodyLimits(**{"timeout_s": 60, **limit}), add)
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

        inner = limited(receive, BodyLimits(10, timeout_s=0.05, bytes_per_s=10, window_s=0.05), lambda _: None)
        await inner()
        return (await inner())["type"]

    assert asyncio.run(call()) == "http.disconnect"


def paced(*pauses_s: float, bytes_each: int = 10) -> bytes:
    """Reads a body whose parts come after these pauses, of 100 bytes a second in windows of 0.2 s at least."""
    pauses = list(pauses_s)

    async def receive() -> Any:
        await asyncio.sleep(pauses.pop(0))
        return part(b"x" * bytes_each, bool(pauses))

    async def read_all() -> bytes:
        rates = BodyLimits(10_000, timeout_s=60, bytes_per_s=100, window_s=0.2)
        inner, body = limited(receive, rates, lambda _: None), b""
        while (message := await inner())["more_body"]:
            body += message["body"]
        return body + message["body"]

    return asyncio.run(read_all())


def test_a_body_that_comes_slower_than_the_least_rate_is_given_up():
    with pytest.raises(SlowBody, match="less than 100 bytes a second"):
        paced(*[0.05] * 20, bytes_each=1)
    assert len(paced(*[0.05] * 10)) == 100


def test_a_pause_after_a_window_that_had_its_bytes_is_forgiven_and_a_longer_one_is_not():
    assert len(paced(0, 0, 0.3)) == 30
    with pytest.raises(SlowBody):
        paced(0, 0, 0.6)
