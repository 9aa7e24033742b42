"""Video jobs by the length of the queue: CPU, latency and requests to storage of each call, beside other queues.

On a disk and on an S3 server (`s3_memory.py`, in a process of its own), N jobs wait, of 100 owners, and one more owner
has N that have ended. An SQLite queue and, where `celery` and `redis-server` are installed, Celery with Redis are
measured beside it. Prints a card and, last, one JSON line.
Run: `.venv/bin/python benchmarks/jobs.py [--jobs 100,10000,100000] [--repeats N] [--render-s S]`
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import card
import fake_clock
import httpx2
import queue_yardsticks
from PIL import Image
from seeded_jobs import create, seeded

from pia_ray import storage
from pia_ray.config.serve import ServeConfig
from pia_ray.online.rendering.renderer import Event, FinishedVideo, Load, Rendered, RenderRequest, StepDone
from pia_ray.online.service import create_endpoint
from pia_ray.online.video_jobs import JobStore, VideoJob
from pia_ray.online.video_jobs.dispatcher import Dispatcher

STEPS: Final = 25
SIDE: Final = 64
CALLS: Final = ("create", "claim", "status", "newest page", "cancel")


@dataclass(frozen=True)
class Cost:
    """What a call costs: the median of some."""

    cpu_ms: float
    wall_ms: float
    requests: dict[str, float]
    """Requests to S3 by operation; on a disk none are counted."""

    @property
    def num_requests(self) -> float:
        """Requests to S3 of all operations."""
        return sum(self.requests.values())


class TimedRenderer:
    """Gives every request the same video after `render_s`. `begun` is set as one begins."""

    def __init__(self, render_s: float) -> None:
        self._render_s = render_s
        self.begun = asyncio.Event()

    async def render(self, request: RenderRequest) -> AsyncIterator[Event]:
        """The steps of a video, and the video."""
        self.begun.set()
        for done in range(1, STEPS + 1):
            await asyncio.sleep(self._render_s / STEPS)
            yield StepDone(done, STEPS)
        made = FinishedVideo(
            num_frames=16,
            width=64,
            height=64,
            fps=8,
            size_bytes=5,
            sha256="",
            params=request.params,
            model_version="timed",
            gpu_s=self._render_s,
            animate_s=self._render_s,
            motion=0.1,
        )
        yield Rendered(made, b"video", "mp4", b"thumbnail", b"sheet")

    async def load(self) -> Load:
        """The load of an engine that knows how long a step takes."""
        return Load(0, 0, self._render_s / STEPS, ())


def picture() -> str:
    """A picture, as a URL of itself."""
    out = io.BytesIO()
    Image.linear_gradient("L").resize((SIDE, SIDE)).convert("RGB").save(out, "PNG")
    return f"data:image/png;base64,{base64.b64encode(out.getvalue()).decode()}"


def measured(call: Callable[[], object], *, repeats: int) -> Cost:
    """The median cost of a call, without its first time, which opens connections."""
    call()
    cpu, wall, before = [], [], storage.usage().requests
    for _ in range(repeats):
        cpu_s, wall_s = time.process_time(), time.perf_counter()
        call()
        cpu.append(time.process_time() - cpu_s)
        wall.append(time.perf_counter() - wall_s)
    return Cost(1000 * statistics.median(cpu), 1000 * statistics.median(wall), requests_since(before, repeats))


def requests_since(before: dict[str, int], num: float = 1) -> dict[str, float]:
    """Requests by operation since then, of each of so many calls."""
    now = storage.usage().requests
    return {name: (now[name] - before.get(name, 0)) / num for name in sorted(now) if now[name] > before.get(name, 0)}


def calls_of(prefix: str, *, repeats: int) -> dict[str, Cost]:
    """The cost of each call on the jobs below a prefix."""
    jobs, waiting = JobStore(prefix), []

    def make() -> None:
        waiting.append(create(jobs, "caller", prompt=f"waves {len(waiting)}"))

    costs = {"create": measured(make, repeats=repeats)}
    with asyncio.Runner() as loop:
        costs["claim"] = measured(lambda: loop.run(claimed(jobs)), repeats=repeats)
        dispatcher = Dispatcher(TimedRenderer(1.0), jobs)

        async def status(job: VideoJob) -> None:
            await dispatcher.outlook(await asyncio.to_thread(jobs.get, job.owner, job.id))

        costs["status"] = measured(lambda: loop.run(status(waiting[0])), repeats=repeats)
    costs["newest page"] = measured(lambda: jobs.list("archive", limit=20), repeats=repeats)
    costs["cancel"] = measured(lambda: jobs.cancel("caller", waiting.pop().id), repeats=repeats)
    return costs


async def claimed(jobs: JobStore) -> None:
    """Has a dispatcher claim one job and begin it; as it ends it gives the job back. A sweep runs beside it."""
    renderer = TimedRenderer(3600.0)
    working = asyncio.create_task(Dispatcher(renderer, jobs, max_in_flight=1, sweep_s=3600).run())
    await renderer.begun.wait()
    working.cancel()
    await asyncio.wait((working,))


def write_to_disk(prefix: str) -> Callable[[dict[str, str]], None]:
    """Writes objects as files, without waiting for the disk."""

    def write(objects: dict[str, str]) -> None:
        for folder in {name.rpartition("/")[0] for name in objects}:
            Path(prefix, folder).mkdir(parents=True, exist_ok=True)
        for name, content in objects.items():
            Path(prefix, name).write_text(content)

    return write


def write_to_server(prefix: str) -> Callable[[dict[str, str]], None]:
    """Loads objects into the S3 server."""
    bucket, _, folder = prefix.removeprefix("s3://").partition("/")
    url = f"{os.environ['AWS_ENDPOINT_URL']}/{bucket}?load="

    def write(objects: dict[str, str]) -> None:
        content = json.dumps({f"{folder}/{name}": text for name, text in objects.items()}).encode()
        httpx2.put(url, content=content, timeout=300).raise_for_status()

    return write


@contextmanager
def s3_server() -> Iterator[None]:
    """Points this process at an S3 server of its own for as long as the block lasts."""
    program = [sys.executable, str(Path(__file__).with_name("s3_memory.py"))]
    with subprocess.Popen(program, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        os.environ |= {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{process.stdout.readline().strip()}",
            "AWS_ACCESS_KEY_ID": "memory",
            "AWS_SECRET_ACCESS_KEY": "memory",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        try:
            yield
        finally:
            process.kill()


def quickly(work: Coroutine[object, object, dict[str, float]]) -> dict[str, float]:
    """What comes of it, on a clock that skips its waits."""
    with fake_clock.runner() as loop:
        return loop.run(work)


def idle_hour(prefix: str) -> dict[str, float]:
    """Requests of an ingress without calls in the second hour of its life, on a clock that skips its waits."""
    config = ServeConfig(storage=prefix, webhook_secret="whsec_" + "A" * 32)
    with fake_clock.runner() as loop:
        app = create_endpoint(TimedRenderer(1.0), JobStore(prefix), config)

        async def hours() -> dict[str, float]:
            async with app.state.service.at_work():
                await asyncio.sleep(3600)
                before = storage.usage().requests
                await asyncio.sleep(3600)
                return requests_since(before)

        return loop.run(hours())


async def one_job(prefix: str, render_s: float) -> dict[str, float]:
    """Requests of an idle ingress for one video from its creation to its download, polled as the endpoint asks."""
    async with client_of(prefix, render_s) as client:
        await video(client, seed=1)  # what the first one reads in its time is not the second one's
        await asyncio.sleep(60)
        before = storage.usage().requests
        await video(client, seed=2)
        return requests_since(before)


async def video(client: httpx2.AsyncClient, *, seed: int) -> None:
    """Makes one video and asks for its content."""
    answer = await client.post("/v1/videos", json={"prompt": "waves", "image": picture(), "seed": seed})
    answer.raise_for_status()
    video_id = answer.json()["id"]
    while answer.json()["status"] not in ("completed", "failed"):
        await asyncio.sleep(int(answer.headers.get("openai-poll-after-ms", "1000")) / 1000)
        answer = await client.get(f"/v1/videos/{video_id}")
    assert answer.json()["status"] == "completed", answer.text
    await client.get(f"/v1/videos/{video_id}/content")  # a link to the file


async def one_line(prefix: str, render_s: float, num_lines: int) -> dict[str, float]:
    """Requests for each line of a batch, from the upload of its input file to the download of its output file."""
    body = {"prompt": "waves", "image": picture()}
    lines = [
        {"custom_id": str(n), "method": "POST", "url": "/v1/videos", "body": {**body, "seed": n}}
        for n in range(num_lines)
    ]
    content = "".join(json.dumps(line) + "\n" for line in lines).encode()
    async with client_of(prefix, render_s) as client:
        await asyncio.sleep(60)
        before = storage.usage().requests
        file = await client.post("/v1/files", data={"purpose": "batch"}, files={"file": ("lines.jsonl", content)})
        request = {"input_file_id": file.json()["id"], "endpoint": "/v1/videos", "completion_window": "24h"}
        answer = await client.post("/v1/batches", json=request)
        answer.raise_for_status()
        batch_id = answer.json()["id"]
        while answer.json()["status"] != "completed":
            await asyncio.sleep(10)
            answer = await client.get(f"/v1/batches/{batch_id}")
            assert answer.json()["status"] in ("validating", "in_progress", "finalizing", "completed"), answer.text
        await client.get(f"/v1/files/{answer.json()['output_file_id']}/content")
        return requests_since(before, num_lines)


class client_of:  # noqa: N801
    """A client of an endpoint at work, in this process."""

    def __init__(self, prefix: str, render_s: float) -> None:
        config = ServeConfig(storage=prefix, webhook_secret="whsec_" + "A" * 32)
        self._app = create_endpoint(TimedRenderer(render_s), JobStore(prefix), config)
        self._at_work = self._app.state.service.at_work()
        self._client = httpx2.AsyncClient(transport=httpx2.ASGITransport(app=self._app), base_url="http://127.0.0.1")

    async def __aenter__(self) -> httpx2.AsyncClient:
        await self._at_work.__aenter__()
        return self._client

    async def __aexit__(self, *error: object) -> None:
        await self._client.aclose()
        await self._at_work.__aexit__(None, None, None)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", default="100,10000,100000")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--render-s", type=float, default=10.0)
    given = parser.parse_args()
    sizes = [int(size) for size in given.jobs.split(",")]
    rows: dict[str, dict[str, dict[str, object]]] = {}
    with tempfile.TemporaryDirectory() as folder, s3_server():
        for size in sizes:
            for store, prefix in (("disk", f"{folder}/{size}"), ("s3", f"s3://jobs-{size}/serve")):
                write = write_to_disk(prefix) if store == "disk" else write_to_server(prefix)
                write(seeded(prefix, size, f"{folder}/scratch-{store}-{size}"))
                costs = calls_of(prefix, repeats=given.repeats)
                rows[f"{store} {size:,}"] = {name: asdict(cost) for name, cost in costs.items()}
                print_costs(f"{store}, {size:,} jobs", costs)
            for name, yardstick in queue_yardsticks.installed(folder, size):
                costs = {call: measured(yardstick[call], repeats=given.repeats) for call in CALLS if call in yardstick}
                rows[f"{name} {size:,}"] = {call: asdict(cost) for call, cost in costs.items()}
                print_costs(f"{name}, {size:,} jobs", costs)
        whole = {
            "idle hour": idle_hour("s3://idle/serve"),
            "one job": quickly(one_job("s3://one/serve", given.render_s)),
            "one line": quickly(one_line("s3://batch/serve", given.render_s, 100)),
        }
    for name, requests in whole.items():
        each = ", ".join(f"{operation} {num:.1f}" for operation, num in requests.items())
        print(f"{name:<12}{sum(requests.values()):8.1f} requests: {each}")
    facts = card.machine("boto3")
    print(card.line(facts))
    print(json.dumps({**facts, "rows": rows, "whole": whole}))


def print_costs(title: str, costs: dict[str, Cost]) -> None:
    """Prints the costs of some calls."""
    print(f"{title:<28}   cpu ms  wall ms  requests")
    for name, cost in costs.items():
        each = ", ".join(f"{operation} {num:.1f}" for operation, num in cost.requests.items())
        print(f"  {name:<26}{cost.cpu_ms:9.1f}{cost.wall_ms:9.1f}{cost.num_requests:10.1f}  {each}", flush=True)


if __name__ == "__main__":
    main()
