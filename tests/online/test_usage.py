"""Quotas of a key a day hold over all replicas, and cost storage little."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from pia_ray import storage
from pia_ray.config.serve import ServeConfig
from pia_ray.errors import FetchUnavailable, QuotaExceeded
from pia_ray.online.files import FileStore
from pia_ray.online.rendering.local_renderer import LocalRenderer
from pia_ray.online.requests.request_reader import FormReader
from pia_ray.online.service import create_endpoint
from pia_ray.online.usage import Amounts, Usage
from pia_ray.online.video_jobs import JobStore
from pia_ray.online.video_jobs.creation import JobCreator, LineRequest
from pia_ray.testing import FakeAnimator, draw_picture
from tests.tables import num_entries

DAY_S = 86_400


class Clock:
    """Shows what it is set to."""

    now = 20_000.0 * DAY_S + 3600

    def __call__(self) -> float:
        return self.now


def usage(folder: Path, clock: Clock | None = None, **quotas: Any) -> Usage:
    return Usage(ServeConfig.model_validate({"storage": str(folder), **quotas}), clock=clock or Clock())


def test_what_one_replica_counted_another_refuses_once_both_have_flushed(tmp_path: Path) -> None:
    one, other = (usage(tmp_path, gpu_seconds_per_day=10) for _ in range(2))
    one.add("ann", Amounts(gpu_s=6))
    one.flush()
    other.add("ann", Amounts(gpu_s=6))
    other.flush()
    with pytest.raises(QuotaExceeded, match="12 of its 10 GPU seconds a day; the next day begins at") as raised:
        other.check("ann")
    assert raised.value.retry_after_s == DAY_S - 3600
    other.check("bob")
    one.check("ann")
    one.flush()
    with pytest.raises(QuotaExceeded):
        one.check("ann")


def test_replicas_whose_clocks_differ_agree_on_the_day_by_the_stores_clock(tmp_path: Path) -> None:
    late, store = Clock(), Clock()
    late.now -= 2 * 3600  # yesterday
    config = ServeConfig.model_validate({"storage": str(tmp_path), "gpu_seconds_per_day": 10})
    right = usage(tmp_path, store, gpu_seconds_per_day=10)
    wrong = Usage(config, clock=late, store_clock=store)
    wrong.add("ann", Amounts(gpu_s=12))
    wrong.flush()
    with pytest.raises(QuotaExceeded):
        wrong.check("ann")
    right.check("ann")
    right.flush()
    with pytest.raises(QuotaExceeded):
        right.check("ann")


def test_a_process_holds_its_own_counts_at_once(tmp_path: Path) -> None:
    book = usage(tmp_path, requests_per_day=2, bytes_per_day=100)
    for _ in range(2):
        book.check("ann")
        book.add("ann", Amounts(num_requests=1))
    with pytest.raises(QuotaExceeded, match="2 of its 2 requests"):
        book.check("ann")
    book.add("bob", Amounts(num_bytes=100))
    with pytest.raises(QuotaExceeded, match="stored bytes"):
        book.check("bob")


def test_a_new_day_begins_with_nothing_used(tmp_path: Path) -> None:
    clock = Clock()
    book = usage(tmp_path, clock, gpu_seconds_per_day=10)
    book.add("ann", Amounts(gpu_s=10))
    book.flush()
    clock.now += DAY_S
    book.check("ann")
    book.add("ann", Amounts(gpu_s=4))
    book.flush()
    later = usage(tmp_path, clock, gpu_seconds_per_day=4)
    later.check("ann")
    later.flush()
    with pytest.raises(QuotaExceeded, match="4 of its 4"):
        later.check("ann")


def test_callers_of_earlier_days_take_no_memory(tmp_path: Path) -> None:
    clock = Clock()
    today = usage(tmp_path, clock, requests_per_day=10)
    before = num_entries(today)
    for number in range(20):
        today.check(f"caller {number}")
    today.flush()
    clock.now += DAY_S
    today.check("ann")
    today.flush()
    assert num_entries(today) == before + 1


def test_replicas_that_write_at_the_same_time_lose_no_count(tmp_path: Path) -> None:
    books = [usage(tmp_path, requests_per_day=1000) for _ in range(4)]

    def work(book: Usage) -> None:
        for _ in range(10):
            book.add("ann", Amounts(num_requests=1))
            book.flush()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, books))
    for book in books:
        book.flush()
    reader = usage(tmp_path, requests_per_day=40)
    reader.check("ann")
    reader.flush()
    with pytest.raises(QuotaExceeded, match="40 of its 40"):
        reader.check("ann")


def test_without_quotas_nothing_is_written(tmp_path: Path) -> None:
    book = usage(tmp_path)
    book.add("ann", Amounts(gpu_s=1e9))
    book.check("ann")
    book.flush()
    assert list(storage.list_objects(str(tmp_path))) == []


def test_a_key_beyond_its_engine_time_is_refused_with_429_and_may_still_read(tmp_path: Path) -> None:
    config = ServeConfig.model_validate({"storage": str(tmp_path), "gpu_seconds_per_day": 1e-9})
    small = {"prompt": "a cat", "num_frames": "4", "num_inference_steps": "2", "width": "64", "height": "64"}
    files = {"image": draw_picture((64, 48), seed=1)}
    with FakeAnimator(config.models["demo"], styles=config.models) as animator:
        app = create_endpoint(LocalRenderer(animator, config), JobStore(config.storage), config)
        with TestClient(app, base_url="http://127.0.0.1:8000") as client:
            first, second = (client.post("/v1/animations", data=small, files=files) for _ in range(2))
            assert (first.status_code, second.status_code) == (200, 429)
            assert second.json()["error"]["code"] == "insufficient_quota"
            assert int(second.headers["retry-after"]) > 0
            assert client.post("/v1/videos", data=small, files=files).status_code == 429
            assert client.get("/v1/videos").status_code == 200


def test_a_line_of_a_batch_that_is_tried_again_counts_once(tmp_path: Path) -> None:
    config = ServeConfig.model_validate({"storage": str(tmp_path), "requests_per_day": 2})
    book, away = Usage(config, clock=Clock()), [True, True, False, False]

    def fetch(url: str, max_bytes: int) -> bytes:
        if away.pop(0):
            raise FetchUnavailable("away")
        return draw_picture((64, 48), seed=1)

    jobs, files = JobStore(config.storage), FileStore(config.storage, ttl_s=60)
    creator = JobCreator(config, jobs=jobs, files=files, reader=FormReader(config, fetch_url=fetch), usage=book)
    line = LineRequest("ann", "batch_1", {"prompt": "a cat", "image": "https://shop.example/cat.png"}, "batch_1:0")

    async def submit() -> None:
        for _ in range(2):
            with pytest.raises(FetchUnavailable):
                await creator.create_line(line)
        await creator.create_line(line)

    asyncio.run(submit())
    book.check("ann")
    asyncio.run(creator.create_line(line))
    with pytest.raises(QuotaExceeded):
        book.check("ann")


def test_engine_time_counts_also_where_no_take_is_accepted(tmp_path: Path) -> None:
    config = ServeConfig.model_validate({"storage": str(tmp_path), "gpu_seconds_per_day": 1e-9})
    small = {"prompt": "uneven", "num_frames": "4", "num_inference_steps": "2", "width": "64", "height": "64"}
    strict = {"accept": "flicker<=0", "retakes": "1", "unaccepted": "fail", "seed": "50"}
    files = {"image": draw_picture((64, 48), seed=1)}
    with FakeAnimator(config.models["demo"], styles=config.models, seconds_per_step=0.01) as animator:
        app = create_endpoint(LocalRenderer(animator, config), JobStore(config.storage), config)
        with TestClient(app, base_url="http://127.0.0.1:8000") as client:
            answers = [client.post("/v1/animations", data={**small, **strict}, files=files) for _ in range(2)]
    assert [answer.json()["error"]["code"] for answer in answers] == ["not_accepted", "insufficient_quota"]
