"""Two keys at one endpoint, one of them hostile in each way: the calls of the other wait for few of its own."""

from __future__ import annotations

import asyncio
import hashlib
import json
import socket
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
from pia_ray.online.video_jobs.webhooks import Webhooks
from pia_ray.testing import FakeAnimator, draw_picture

PICTURE = draw_picture((64, 48), seed=1)
SECRET = "whsec_" + "A" * 44
FIELDS = {"prompt": "a cat", "num_frames": "4", "num_inference_steps": "4", "width": "64", "height": "64"}
CALLS = 3


@asynccontextmanager
async def endpoint(
    folder: Path, log: Path, client_hangs: threading.Event, *, step_s: float = 0.1
) -> AsyncIterator[Callable[[str], httpx2.AsyncClient]]:
    keys = [hashlib.sha256(key.encode()).hexdigest() for key in ("good", "bad")]
    values = {"storage": str(folder), "batch_size": 2, "api_keys": keys, "webhook_secret": SECRET}
    config = ServeConfig.model_validate(values)
    webhooks = Webhooks(SECRET, allowed_networks=("127.0.0.1/32",), resolve=lambda *_: ["127.0.0.1"])

    def never(url: str, _: int) -> bytes:
        client_hangs.wait(30)
        raise FetchUnavailable(f"{url} does not answer")

    given: dict[str, Any] = {"batch_size": 2, "seconds_per_step": step_s, "log": log}
    with FakeAnimator(config.models["demo"], styles=config.models, **given) as animator:
        forms = FormReader(config, fetch_url=never)
        renderer, jobs = LocalRenderer(animator, config), JobStore(config.storage)
        app = create_endpoint(renderer, jobs, config, forms=forms, webhooks=webhooks, poll_s=0.1)

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


async def fill_the_queue(bad: httpx2.AsyncClient, dead_port: int) -> None:
    """As many jobs as are taken, each with a webhook to a receiver that never answers, and a batch of dead hosts."""
    hook = f"https://dead.test:{dead_port}/"

    async def create() -> httpx2.Response:
        return await bad.post("/v1/videos", data={**FIELDS, "webhook_url": hook}, files={"image": PICTURE})

    ended = await asyncio.gather(*(create() for _ in range(12)))
    await asyncio.gather(*(bad.post(f"/v1/videos/{each.json()['id']}/cancel") for each in ended))
    while (await create()).status_code != 429:
        pass
    body = {**FIELDS, "image": "https://example.com/a.png"}
    line = {"custom_id": "1", "method": "POST", "url": "/v1/videos", "body": body}
    lines = "".join(json.dumps({**line, "custom_id": str(number)}) + "\n" for number in range(20))
    uploaded = await bad.post("/v1/files", data={"purpose": "batch"}, files={"file": ("lines.jsonl", lines.encode())})
    batch = {"input_file_id": uploaded.json()["id"], "endpoint": "/v1/videos", "completion_window": "24h"}
    for _ in range(4):
        assert (await bad.post("/v1/batches", json=batch)).status_code == 200


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


def test_a_job_waits_for_few_of_a_full_queue_with_dead_receivers_and_batches_of_dead_hosts(tmp_path: Path) -> None:
    log = tmp_path / "log"

    async def ended_job(good: httpx2.AsyncClient) -> int:
        """Makes a job to its end; gives the number of others that begin between its creation and its own begin."""
        before = len(begun(log))
        answer = await good.post("/v1/videos", data=FIELDS, files={"image": PICTURE})
        path = f"/v1/videos/{answer.json()['id']}"
        while (await good.get(path)).json()["status"] != "completed":
            await asyncio.sleep(0.05)
        return begun(log).index(answer.json()["id"]) - before

    async def work() -> list[int]:
        released = threading.Event()
        with socket.create_server(("127.0.0.1", 0), backlog=64) as dead:
            async with (
                endpoint(tmp_path, log, released, step_s=0.05) as client,
                client("good") as good,
                client("bad") as bad,
            ):
                await fill_the_queue(bad, dead.getsockname()[1])
                found = [await ended_job(good) for _ in range(2)]
                released.set()
        return found

    # Those that the dispatcher has claimed already, three, and those that begin while it reads the queue.
    assert max(asyncio.run(work())) <= 8
