"""The turns of hosts: rates are kept, pauses that hosts ask for are honoured, and good answers bring the pace back."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest

from pia_ray.errors import FetchUnavailable
from pia_ray.storage.host_rates import KNOWN_HOSTS, HostRates, pause_of
from tests.tables import num_entries


def wait(rates: HostRates, host: str = "shop.test", *, limit_s: float = 60.0) -> float:
    return rates.wait(host, limit_s=limit_s, stopped=threading.Event(), note=lambda waits: None)


def test_threads_together_keep_the_rate_of_a_host_and_others_do_not_wait() -> None:
    rates, begin = HostRates(20), time.monotonic()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: wait(rates), range(9)))
    assert 0.38 < time.monotonic() - begin < 1
    assert wait(rates, "other.test") < 0.02


def test_a_host_that_asks_for_a_pause_is_left_alone_by_all_threads() -> None:
    rates = HostRates()
    assert wait(rates) < 0.02
    rates.refused("shop.test", pause_s=0.3)
    with ThreadPoolExecutor(4) as pool:
        assert min(pool.map(lambda n: wait(rates), range(4))) > 0.25


def test_a_turn_later_than_the_limit_is_said_at_once_with_its_time() -> None:
    rates = HostRates()
    rates.refused("shop.test", pause_s=500)
    with pytest.raises(FetchUnavailable, match=r"shop\.test is asked again in 500 s only") as late:
        wait(rates, limit_s=60)
    assert late.value.retry_after_s == pytest.approx(500, abs=1)


def test_a_wait_ends_when_it_is_stopped() -> None:
    rates, stopped = HostRates(), threading.Event()
    rates.refused("shop.test", pause_s=50)
    threading.Timer(0.05, stopped.set).start()
    with pytest.raises(FetchUnavailable):
        rates.wait("shop.test", stopped=stopped, note=lambda waits: None)


def test_refusals_halve_the_rate_once_for_all_that_were_under_way_and_answers_bring_it_back() -> None:
    rates = HostRates(100)
    for _ in range(3):
        rates.refused("shop.test", pause_s=0.05)
    assert wait(rates) == pytest.approx(0.05, abs=0.03)
    slowed = sum(wait(rates) for _ in range(5))
    assert slowed == pytest.approx(5 / 50, abs=0.05)
    for _ in range(6000):
        rates.answered("shop.test")
    wait(rates)
    assert sum(wait(rates) for _ in range(5)) == pytest.approx(5 / 100, abs=0.03)


def test_a_run_over_any_number_of_hosts_keeps_the_pace_of_so_many() -> None:
    rates = HostRates()
    for number in range(KNOWN_HOSTS + 100):
        rates.answered(f"shop-{number}.test")
    assert num_entries(rates) == KNOWN_HOSTS


def test_hosts_that_name_no_time_get_longer_pauses_each_time() -> None:
    rates = HostRates()
    pauses = []
    for _ in range(3):
        rates.refused("shop.test", pause_s=0)
        with pytest.raises(FetchUnavailable) as late:
            wait(rates, limit_s=0)
        pauses.append(late.value.retry_after_s)
        rates._hosts["shop.test"].held_until = 0  # as if the time had passed
    assert pauses == [pytest.approx(pause, abs=0.1) for pause in (1, 2, 4)]


@pytest.mark.parametrize(
    ("field", "seconds"),
    [
        (b"7", 7),
        (b" 120 ", 120),
        (b"", 0),
        (b"-5", 0),
        (b"soon", 0),
        (b"\xb2", 0),
        (b"9" * 400, 0),
        (b"Mon, 01 Jan " + b"9" * 20 + b" 00:00:00 GMT", 0),
    ],
)
def test_pauses_are_numbers_and_nothing_else(field: bytes, seconds: float) -> None:
    assert pause_of(field) == seconds


@pytest.mark.parametrize(("away_s", "seconds"), [(90, 90), (-86_400, 0)])
def test_pauses_may_be_dates(away_s: float, seconds: float) -> None:
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=away_s), usegmt=True)
    assert pause_of(date.encode()) == pytest.approx(seconds, abs=2)
