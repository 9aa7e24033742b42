"""Callers and bodies are held to their limits."""

from __future__ import annotations

import tracemalloc

import pytest

from pia_ray.errors import Busy, HeadersTooLarge, RateLimited
from pia_ray.online.http.limits import OpenRequests, RateLimit, check_headers


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


def test_a_read_of_a_status_counts_a_tenth_of_a_call_and_the_allowance_says_what_is_left():
    now = 0.0
    rate = RateLimit(60, clock=lambda: now)
    assert rate.allowance("a").headers == {
        "x-ratelimit-limit-requests": "60",
        "x-ratelimit-remaining-requests": "60",
        "x-ratelimit-reset-requests": "0ms",
    }
    for _ in range(300):
        rate.take("a", cost=0.1)
    left = rate.allowance("a")
    assert (left.left, left.headers["x-ratelimit-reset-requests"]) == (30, "30s")
    now = 29.5
    assert rate.allowance("a").headers["x-ratelimit-reset-requests"] == "500ms"


def test_a_caller_has_a_share_of_the_open_requests():
    requests = OpenRequests(2)
    with requests.hold("a"), requests.hold("a"):
        with pytest.raises(Busy), requests.hold("a"):
            pass
        with requests.hold("b"):
            pass
    with requests.hold("a"):
        pass


@pytest.mark.parametrize("headers", [[(b"a", b"b")] * 201, [(b"cookie", b"x" * 66_000)]])
def test_a_flood_of_headers_is_refused(headers: list[tuple[bytes, bytes]]):
    check_headers([(b"a", b"b")] * 200)
    with pytest.raises(HeadersTooLarge):
        check_headers(headers)
