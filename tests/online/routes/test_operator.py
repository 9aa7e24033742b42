"""The operator's page and its calls, in this process."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

from pia_ray import storage
from pia_ray.config.knobs import AnimationParams
from pia_ray.config.serve import ServeConfig, load_serve
from pia_ray.errors import ConfigError, OutOfMemory
from pia_ray.online.rendering.local_renderer import LocalRenderer
from pia_ray.online.rendering.renderer import BATCH_LINE, RenderRequest
from pia_ray.online.service import create_endpoint
from pia_ray.online.video_jobs import JobStore, VideoJob
from pia_ray.testing import FakeAnimator

KEY = "an-operator-s-key"


@asynccontextmanager
async def endpoint(folder: Path, key: str | None = KEY, **settings: Any) -> AsyncIterator[httpx2.AsyncClient]:
    keys = [hashlib.sha256(b"ann").hexdigest()]
    values = {"storage": str(folder), "api_keys": keys, "operator_key": KEY, **settings}
    config = ServeConfig.model_validate({name: value for name, value in values.items() if value is not None})
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    with FakeAnimator(config.models["demo"], styles=config.models) as animator:
        app = create_endpoint(LocalRenderer(animator, config), JobStore(config.storage), config)
        transport = httpx2.ASGITransport(app)
        async with httpx2.AsyncClient(transport=transport, base_url="http://127.0.0.1", headers=headers) as client:
            yield client


def create(jobs: JobStore, owner: str, *, batch: str | None = None) -> VideoJob:
    priority = 1 if batch is None else BATCH_LINE
    request = RenderRequest(id="", params=AnimationParams(prompt="a boat"), image=b"picture", priority=priority)
    return jobs.create(request, owner=owner, model="demo", seconds="2", size="64x64", batch_id=batch)


def fail(jobs: JobStore, job: VideoJob) -> VideoJob:
    entry = next(entry for entry in jobs.queue.entries() if entry.id == job.id)
    return jobs.queue.fail(jobs.queue.claim(jobs.queue.read(entry), worker="w"), OutOfMemory("the GPU is full"))


def test_the_operator_sees_the_queue_by_owner_and_why_jobs_failed_and_queues_them_again(tmp_path: Path) -> None:
    jobs = JobStore(str(tmp_path))
    failed, open_job = fail(jobs, create(jobs, "key_ann")), create(jobs, "key_ann")
    lines = [create(jobs, "key_bob", batch="batch_1") for _ in range(3)]
    jobs.cancel("key_bob", create(jobs, "key_bob").id)

    async def work() -> None:
        async with endpoint(tmp_path) as client:
            found = (await client.get("/operator/jobs")).json()
            assert found["owners"] == [
                {"owner": "key_bob", "num_jobs": 0, "num_lines": 3},
                {"owner": "key_ann", "num_jobs": 1, "num_lines": 0},
            ]
            assert [job["id"] for job in found["open"]] == [open_job.id, *(line.id for line in lines)]
            assert not found["has_more"]
            (why,) = found["failed"]  # the cancelled one has not failed by itself
            assert (why["id"], why["error"]) == (failed.id, {"code": "out_of_memory", "message": "the GPU is full"})
            assert (await client.post(f"/operator/jobs/key_ann/{failed.id}/retry")).json()["status"] == "queued"
            again = await client.post(f"/operator/jobs/key_ann/{failed.id}/retry")
            assert (again.status_code, again.json()["error"]["code"]) == (409, "job_conflict")
            assert (await client.post(f"/operator/jobs/key_bob/{failed.id}/retry")).status_code == 404
            assert (await client.post(f"/operator/jobs/key_ann/{open_job.id}/cancel")).json()["is_cancelled"]
            left = (await client.get("/operator/jobs")).json()
            assert left["failed"] == []
            assert failed.id in [job["id"] for job in left["open"]]

    asyncio.run(work())


def test_a_deleted_job_leaves_the_list_of_failed_ones(tmp_path: Path) -> None:
    jobs = JobStore(str(tmp_path))
    one, other = (fail(jobs, create(jobs, "key_ann")) for _ in range(2))
    jobs.delete("key_ann", one.id)
    assert [job.id for job in jobs.overview.read().failed] == [other.id]


def test_an_entry_that_a_dead_writer_left_of_a_job_that_is_queued_again_is_removed(tmp_path: Path) -> None:
    jobs = JobStore(str(tmp_path))
    failed = fail(jobs, create(jobs, "key_ann"))
    (entry,) = storage.list_objects(f"{tmp_path}/failed")
    jobs.overview.retry("key_ann", failed.id)
    storage.create_bytes(entry.uri, b"")
    assert jobs.overview.read().failed == ()
    assert list(storage.list_objects(f"{tmp_path}/failed")) == []


def test_the_jobs_are_for_the_operator_s_key_alone(tmp_path: Path) -> None:
    async def status(key: str | None, path: str, **settings: Any) -> int:
        async with endpoint(tmp_path, key, **settings) as client:
            return (await client.get(path)).status_code

    async def work() -> None:
        assert await status(None, "/operator") == 200  # it holds nothing
        for key in (None, "ann", "another"):
            assert await status(key, "/operator/jobs") == 401
        assert await status(KEY, "/v1/videos") == 401  # it is no caller's key
        assert await status(None, "/operator", operator_key=None) == 404
        assert await status("ann", "/operator/jobs", operator_key=None) == 404
        async with endpoint(tmp_path, "wrong", requests_per_minute=3) as client:
            assert [(await client.get("/operator/jobs")).status_code for _ in range(4)] == [401, 401, 401, 429]

    asyncio.run(work())


def test_a_short_operator_key_is_refused_without_being_shown() -> None:
    with pytest.raises(ConfigError, match="operator_key") as raised:
        load_serve(None, {"operator_key": "short-one"})
    assert "short-one" not in str(raised.value)
