"""Two keys at one endpoint, one of them hostile in each way: the calls of the other take little longer than alone."""

from __future__ import annotations

import asyncio
import hashlib
import threading
import time
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
async def endpoint(folder: Path, client_hangs: threading.Event) -> AsyncIterator[Callable[[str], httpx2.AsyncClient]]:
    keys = [hashlib.sha256(key.encode()).hexdigest() for key in ("good", "bad")]
    config = ServeConfig.model_validate({"storage": str(folder), "batch_size": 2, "api_keys": keys})

    def never(url: str, _: int) -> bytes:
        client_hangs.wait(30)
        raise FetchUnavailable(f"{url} does not answer")

    with FakeAnimator(config.models["demo"], styles=config.models, batch_size=2, seconds_per_step=0.1) as animator:
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


async def latencies(good: httpx2.AsyncClient) -> list[float]:
    found = []
    for _ in range(CALLS):
        began = time.monotonic()
        answer = await good.post("/v1/animations", data=FIELDS, files={"image": PICTURE})
        assert answer.status_code == 200, answer.text
        found.append(time.monotonic() - began)
    return sorted(found)


def test_a_hostile_key_does_not_double_the_latency_of_another(tmp_path: Path) -> None:
    async def work() -> tuple[list[float], list[float]]:
        released = threading.Event()
        async with endpoint(tmp_path, released) as client, client("good") as good, client("bad") as bad:
            alone = await latencies(good)
            tasks = hostilities(bad)
            await asyncio.sleep(0.5)
            beside = await latencies(good)
            released.set()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return alone, beside

    alone, beside = asyncio.run(work())
    assert beside[CALLS // 2] < 2 * alone[CALLS // 2], (alone, beside)
