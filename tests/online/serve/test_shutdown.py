"""What shuts down in order lets the videos end that it makes, and gives back what takes longer. Real Ray Serve."""

from __future__ import annotations

import asyncio
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import pytest
from ray import serve

from pia_ray.config.serve import ServeConfig
from pia_ray.errors import PiaRayError
from pia_ray.online.rendering.renderer import INTERACTIVE, VIDEO_JOB, Rendered, RenderRequest
from pia_ray.online.serve import RayRenderer
from pia_ray.online.serve.deployments import bind_engines, ingress_options
from pia_ray.online.video_jobs import JobStore, VideoJob
from pia_ray.testing import make_fake_engine
from tests.online.serve.test_engines import ask, outcome
from tests.online.serve.test_http import animate, begun, created, ended, endpoint, until

__all__ = ["endpoint"]  # fixtures

heavy = pytest.mark.heavy
# Ray's client code of 2.60 leaves sockets and event loops to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")


def stored(folder: Path, job_id: str) -> VideoJob:
    return JobStore(str(folder / "jobs")).get("anonymous", job_id)


@heavy
def test_an_upgrade_loses_no_video_and_counts_no_attempt(endpoint: Callable[..., httpx2.Client], tmp_path: Path):
    client = endpoint(step_s=0.25, graceful_shutdown_s=12)
    ends = created(client, num_inference_steps="8")
    given_back = created(client, num_inference_steps="100")  # 25 s
    until(lambda: len(begun(tmp_path)) == 2, seconds=60)
    endpoint(step_s=0.01, graceful_shutdown_s=12, max_frames=32)
    late = created(client, num_inference_steps="2")
    for job_id in (ends, given_back, late):
        assert ended(client, job_id, seconds=200)["status"] == "completed"
    rows = Counter(row["id"] for row in begun(tmp_path))
    assert (rows[ends], rows[given_back]) == (1, 2), "no step is done twice where there is the time to end"
    assert stored(tmp_path, ends).attempt == stored(tmp_path, given_back).attempt == 1


@pytest.fixture
def engines(address: str, tmp_path: Path) -> Iterator[Callable[[], RayRenderer]]:
    """Deploys engines, or deploys them anew, with 6 s for what runs; a renderer of this process on them."""
    config = ServeConfig.model_validate({"batch_size": 1, "graceful_shutdown_s": 6})

    def deploy() -> RayRenderer:
        make = partial(make_fake_engine, seconds_per_step=0.25, marks=tmp_path, log=tmp_path / "log.jsonl")
        handle = serve.run(bind_engines(config, make_animator=make), name="engines", route_prefix=None)
        return RayRenderer(handle, config)

    yield deploy
    serve.delete("engines")


@heavy
def test_an_engine_that_is_replaced_ends_what_it_can_and_gives_the_rest_to_others(
    engines: Callable[[], RayRenderer], tmp_path: Path
):
    renderer = engines()

    def asked(request_id: str, priority: int, steps: int) -> RenderRequest:
        return ask(request_id=request_id, priority=priority, knobs={"num_inference_steps": steps})

    async def work() -> list[Any]:
        requests = [
            asked("ends", VIDEO_JOB, 12),
            asked("waits", VIDEO_JOB, 2),
            asked("call", INTERACTIVE, 2),
        ]
        first = asyncio.create_task(outcome(renderer, requests[0]))
        while len(begun(tmp_path)) < 1:
            await asyncio.sleep(0.05)
        others = [asyncio.create_task(outcome(renderer, each)) for each in requests[1:]]
        await asyncio.sleep(0.5)
        await asyncio.to_thread(engines)
        return await asyncio.gather(first, *others)

    ends, waits, call = asyncio.run(work())
    assert isinstance(ends[-1], Rendered)
    assert isinstance(call[-1], Rendered)  # made by the other engine
    assert (isinstance(waits, PiaRayError), waits.code) == (True, "cancelled")
    assert [row["id"] for row in begun(tmp_path)] == ["ends", "call"]


def test_an_ingress_has_time_for_its_calls_and_then_for_its_videos():
    config = ServeConfig.model_validate({"sync_timeout_s": 300, "graceful_shutdown_s": 1800})
    assert ingress_options(config)["graceful_shutdown_timeout_s"] >= 300 + 1800


@heavy
def test_the_command_ends_a_video_that_is_being_made_on_a_signal_and_ends_at_once_on_a_second(tmp_path: Path):
    (tmp_path / "serve.yaml").write_text("max_steps: 1000")
    command = [Path(sys.executable).parent / "pia-ray", "serve", "--config", tmp_path / "serve.yaml", "--port", "0"]
    command += ["--storage", tmp_path / "jobs"]
    with (tmp_path / "errors").open("wb") as errors:
        server = subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, stderr=errors, text=True)
    try:
        url = re.search(r"Serving demo at (http://127\.0\.0\.1:\d+/)", server.stdout.readline())[1]
        with httpx2.Client(base_url=url, timeout=100) as client:
            answer = animate(client)  # the model is loaded
            assert (answer.status_code, answer.headers["x-animation-frames"]) == (200, "4")
            assert answer.headers["x-animation-model"].startswith("demo@")
            long = created(client, num_frames="16", num_inference_steps="1000")
            until(lambda: client.get(f"/v1/videos/{long}").json()["status"] == "in_progress", seconds=100)
            short = created(client, num_inference_steps="10")
            until(lambda: client.get(f"/v1/videos/{short}").json()["status"] == "in_progress", seconds=100)
        server.send_signal(signal.SIGTERM)
        until(lambda: stored(tmp_path, short).status == "completed", seconds=100)
        until(lambda: "a second signal ends it at once" in (tmp_path / "errors").read_text(), seconds=100)
        assert server.poll() is None
        server.send_signal(signal.SIGTERM)
        assert server.wait(300) == 0, (tmp_path / "errors").read_text()
        assert stored(tmp_path, short).attempt == 1
        job = stored(tmp_path, long)  # large, and thrown away
        assert (job.status, job.attempt) == ("in_progress", 1)
    finally:
        server.kill()
        server.wait()
        server.stdout.close()
