"""`prefetch: auto`: rows that are fetched and published while others denoise, as many as the engine needs."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future, wait
from typing import Any

import pytest

from pia_ray.catalog.rows.engine_clock import EngineClock
from pia_ray.catalog.rows.in_flight import InFlightRows
from pia_ray.catalog.rows.prefetch import MOST_PICTURE_BYTES, PrefetchTuner
from pia_ray.catalog.rows.row_threads import RowThreads
from pia_ray.config.catalog import CatalogConfig
from pia_ray.config.model import build
from pia_ray.errors import ConfigError


class Rows(InFlightRows):
    """The rows of a worker whose engine has one row for so much of each second."""

    def __init__(self, *, busy: float = 1.0, queued: int = 0, picture_bytes: int = 0) -> None:
        super().__init__(hang_timeout_s=1)
        self.busy, self.queued, self.picture_bytes = busy, queued, picture_bytes
        self.now = 0.0
        self.engine: Any = self
        self.rows_s = 0.0

    @property
    def num_queued(self) -> int:
        return self.queued

    @property
    def largest_picture_bytes(self) -> int:
        return self.picture_bytes

    def limit_after(self, num_rows: int, limit: int = 3, *, waiting: int = 9) -> int:
        """The number of rows at once after so many rows of a second each, from 3 to 11."""
        tuner = PrefetchTuner(self, batch_size=lambda: 1, least=3, most=11, now=lambda: self.now)
        for _ in range(num_rows + 1):
            limit = tuner(limit, waiting)
            self.now += 1
            self.rows_s += self.busy
        return limit


def test_an_engine_that_waits_for_rows_gets_more_of_them_up_to_the_most() -> None:
    assert Rows(busy=0.9).limit_after(4) == 4
    assert Rows(busy=0.9).limit_after(200) == 11


def test_an_engine_that_is_never_without_a_row_keeps_what_it_has() -> None:
    assert Rows(busy=1.0, queued=1).limit_after(200, 5) == 5


def test_rows_that_wait_for_the_engine_all_the_time_become_fewer_again() -> None:
    assert Rows(busy=1.0, queued=3).limit_after(200, 9) == 3


def test_the_end_of_the_rows_is_no_reason_for_more() -> None:
    assert Rows(busy=0.5).limit_after(200, waiting=0) == 3


def test_large_pictures_bound_the_rows_but_not_below_the_least() -> None:
    assert Rows(busy=0.5, picture_bytes=MOST_PICTURE_BYTES // 5).limit_after(200) == 5
    assert Rows(busy=0.5, picture_bytes=MOST_PICTURE_BYTES).limit_after(200) == 3


def test_an_engine_behind_a_slow_store_has_rows_ahead_after_a_while() -> None:
    rows, engine, clock = InFlightRows(hang_timeout_s=1), threading.Lock(), EngineClock()
    rows.engine = clock
    tuner = PrefetchTuner(rows, batch_size=lambda: 1, least=1, most=8)
    threads = RowThreads(1, tune=tuner)

    def row() -> None:
        time.sleep(0.06)  # the store
        with engine:
            clock.enter(visit := object())
            time.sleep(0.02)
            clock.leave(visit)

    futures: list[Future[None]] = [threads.submit(row) for _ in range(26)]
    wait(futures, timeout=30)
    assert threads.limit >= 3


def test_calls_at_once_are_as_many_as_the_limit_and_closing_cancels_those_that_wait() -> None:
    running, most, lock, go = [0], [0], threading.Lock(), threading.Event()
    threads = RowThreads(2)

    def call() -> None:
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        go.wait(30)
        with lock:
            running[0] -= 1

    futures = [threads.submit(call) for _ in range(9)]
    wait(futures, timeout=0.1)
    threading.Timer(0.1, go.set).start()
    threads.close()
    assert most == [2]
    assert [future.cancelled() for future in futures] == [False] * 2 + [True] * 7


def config(**settings: Any) -> CatalogConfig:
    return build(CatalogConfig, {"manifest": "m.csv", "output": "out", "model": "demo", **settings})


@pytest.mark.parametrize(("value", "expected"), [("auto", (2, 16)), (3, (3, 3)), ("4", (4, 4)), (0, (0, 0))])
def test_an_integer_fixes_prefetch(value: object, expected: tuple[int, int]) -> None:
    assert config(prefetch=value).prefetch_range == expected


@pytest.mark.parametrize("value", ["many", -1, 65, True, 1.5])
def test_other_values_of_prefetch_are_refused(value: object) -> None:
    with pytest.raises(ConfigError, match=r'^prefetch: must be .*("auto" or 0 to 64|not true or false)'):
        config(prefetch=value)


def test_auto_begins_with_the_rows_that_two_ahead_make() -> None:
    assert config().concurrent_rows() == config(prefetch=2).concurrent_rows()
