"""Two keys at one endpoint, one of them hostile in each way: the calls of the other wait for few of its own."""

from __future__ import annotations

import asyncio
import hashlib
import json
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2

from pia_ray.config.serve import ServeConfig
from pia_ray.errors import FetchUnavailable
from pia_ray.online.rendering.local_renderer import LocalRenderer
from pia_ray.online.requests.request_reader import FormReader
from pia_ray.online.service import create_endpoint
from pia_ray.online.video_jobs import JobStore
from pia_ray.testing import FakeAnimator, draw_picture

PICTURE = draw_picture((64, 48), seed=1)
FIELDS = {"prompt": "a cat", "num_frames": "4", "num_inference_steps": "4", "width": "64", "height": "64"}
CALLS = 3


@asynccontextmanager
async def endpoint(
    folder: Path, log: Path, client_hangs: threading.Event
) -> AsyncIterator[Callable[[str], httpx2.AsyncClient]]:
    keys = [hashlib.sha256(key.encode()).hexdigest() for key in ("good", "bad")]
    config = ServeConfig.model_validate({"storage": str(folder), "batch_size": 2, "api_keys": keys})

    def never(url: str, _: int) -> bytes:
        client_hangs.wait(30)
        raise FetchUnavailable(f"{url} does not answer")

    given: dict[str, Any] = {"batch_size": 2, "seconds_per_step": 0.1, "log": log}
    with FakeAnimator(config.models["demo"], styles=config.models, **given) as animator:
        forms = FormReader(config, fetch_url=never)
        app = create_endpoint(LocalRenderer(animator, config), JobStore(config.storage), config, forms=forms)

        def client(key: str) -> httpx2.AsyncClient:
            headers = {"authorization": f"Bearer {key}"}
            transport = httpx2.ASGITransport(app)
            return httpx2.AsyncClient(transport=transport, base_url="http://127.0.0.1", headers=headers, timeout=60)

        async with app.state.service.at_work():
            yield client


async def again_and_again(call: Callable[[], Awaitable[Any]]) -> None:
    while True:
        await call()
        await asyncio.sleep(0.2)


async def announced() -> AsyncIterator[bytes]:
    """A body that does not come."""
    yield b"{"
    await asyncio.Event().wait()


def hostilities(bad: httpx2.AsyncClient) -> list[asyncio.Task[None]]:
    """Calls, jobs, pictures of dead servers and bodies that do not come, as many as are taken."""

    def post(path: str, **body: Any) -> Callable[[], Awaitable[Any]]:
        return lambda: bad.post(path, **body)

    upload = {"data": FIELDS, "files": {"image": PICTURE}}
    slow_picture = {"json": {**FIELDS, "image": "https://example.com/a.png"}}
    stalled = {"headers": {"content-type": "application/json", "content-length": "60000000"}}
    calls = [
        *[post("/v1/animations", **upload)] * 12,
        *[post("/v1/videos", **upload)] * 4,
        *[post("/v1/animations", **slow_picture)] * 12,
        *[lambda: bad.post("/v1/animations", content=announced(), **stalled)] * 12,
    ]
    return [asyncio.create_task(again_and_again(call)) for call in calls]


def begun(log: Path) -> list[str]:
    """The request ids of what the engine has begun, in order."""
    return [json.loads(line)["id"] for line in log.read_text().splitlines()] if log.exists() else []


async def numbers_ahead(good: httpx2.AsyncClient, log: Path) -> list[int]:
    """For each call the number of others that the engine begins between its start and its own begin."""
    found = []
    for _ in range(CALLS):
        before = len(begun(log))
        answer = await good.post("/v1/animations", data=FIELDS, files={"image": PICTURE})
        assert answer.status_code == 200, answer.text
        found.append(begun(log).index(answer.headers["x-animation-id"]) - before)
    return found


def test_a_call_waits_for_few_of_those_of_a_hostile_key(tmp_path: Path) -> None:
    log = tmp_path / "log"

    async def work() -> list[int]:
        released = threading.Event()
        async with endpoint(tmp_path, log, released) as client, client("good") as good, client("bad") as bad:
            tasks = hostilities(bad)
            while len(begun(log)) < 4:
                await asyncio.sleep(0.05)
            found = await numbers_ahead(good, log)
            released.set()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return found

    # None or one, as a rule; the other key's first 12 calls, 4 jobs and 12 bodies wait already.
    assert max(asyncio.run(work())) <= 2
