"""The work beside the endpoint's answers: what is told where it ends by a fault."""

from __future__ import annotations

import asyncio
import base64
import logging
import time
from pathlib import Path
from typing import Any

import httpx2
import pytest
from fastapi.testclient import TestClient
from openai import AsyncOpenAI

from pia_ray.config.serve import ServeConfig
from pia_ray.online.rendering.local_renderer import LocalRenderer
from pia_ray.online.service import create_endpoint
from pia_ray.online.video_jobs import JobStore
from pia_ray.testing import FakeAnimator, draw_picture


class BrokenStore(JobStore):
    """A store with a bug: its sweep fails with what no store raises."""

    def sweep(self, *args: Any, **how: Any) -> int:
        raise ZeroDivisionError("a bug")


@pytest.mark.parametrize("broken", [False, True])
def test_a_process_that_works_on_no_jobs_any_more_has_to_be_replaced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, broken: bool
):
    config = ServeConfig.model_validate({"storage": str(tmp_path)})
    jobs = (BrokenStore if broken else JobStore)(config.storage)
    with FakeAnimator(config.models["demo"]) as animator, caplog.at_level(logging.CRITICAL):
        app = create_endpoint(LocalRenderer(animator, config), jobs, config)
        with TestClient(app, base_url="http://127.0.0.1:8000") as client:
            deadline = time.monotonic() + 60
            while broken and client.get("/healthz").status_code == 200:
                assert time.monotonic() < deadline
                time.sleep(0.02)
            for path in ("/healthz", "/readyz"):
                answer = client.get(path)
                assert answer.status_code == (503 if broken else 200)
                assert not broken or answer.json()["error"]["code"] == "not_ready"
    assert ("the work on video jobs has ended" in caplog.text) == broken


def test_an_app_that_is_started_again_goes_on_with_its_jobs(tmp_path: Path):
    config = ServeConfig.model_validate({"storage": str(tmp_path)})
    picture = "data:image/png;base64," + base64.b64encode(draw_picture((64, 48), seed=1)).decode()
    with FakeAnimator(config.models["demo"], styles=config.models) as animator:
        app = create_endpoint(LocalRenderer(animator, config), JobStore(config.storage), config)
        for number in range(2):  # each in an event loop of its own
            with TestClient(app, base_url="http://127.0.0.1:8000") as client:
                asked = {"prompt": f"the {number}th", "input_reference": {"image_url": picture}}
                job = client.post("/v1/videos", json=asked).json()
                deadline = time.monotonic() + 60
                while (job := client.get(f"/v1/videos/{job['id']}").json())["status"] != "completed":
                    assert time.monotonic() < deadline
                    time.sleep(0.1)
                assert client.get("/healthz").status_code == 200


@pytest.mark.parametrize("grace_s", [60, 0.3])
def test_an_app_that_ends_lets_its_videos_end_for_a_time_and_then_gives_them_back(tmp_path: Path, grace_s: float):
    config = ServeConfig.model_validate({"storage": str(tmp_path), "graceful_shutdown_s": grace_s})
    picture = "data:image/png;base64," + base64.b64encode(draw_picture((64, 48), seed=1)).decode()
    jobs = JobStore(config.storage)
    step_s = 0.04 if grace_s == 60 else 0.5  # 1.2 s a video, or 15
    with FakeAnimator(config.models["demo"], styles=config.models, seconds_per_step=step_s) as animator:
        app = create_endpoint(LocalRenderer(animator, config), jobs, config)
        with TestClient(app, base_url="http://127.0.0.1:8000") as client:
            asked = {"prompt": "waves", "input_reference": {"image_url": picture}, "num_inference_steps": 30}
            job = client.post("/v1/videos", json=asked).json()
            deadline = time.monotonic() + 60
            while client.get(f"/v1/videos/{job['id']}").json()["status"] != "in_progress":
                assert time.monotonic() < deadline
                time.sleep(0.1)
    left = jobs.get("anonymous", job["id"])
    assert (left.status, left.attempt) == (("completed", 1) if grace_s == 60 else ("queued", 0))
    assert left.lease_owner is None


def test_a_job_with_bounds_ends_with_its_best_take_and_a_remix_keeps_them(tmp_path: Path):
    config = ServeConfig.model_validate({"storage": str(tmp_path)})
    picture = "data:image/png;base64," + base64.b64encode(draw_picture((64, 48), seed=1)).decode()
    knobs = {"num_frames": 4, "num_inference_steps": 2, "width": 64, "height": 64, "seed": "50"}
    policy = {"accept": ["flicker<=0.0005"], "retakes": 1}
    with FakeAnimator(config.models["demo"], styles=config.models) as animator:
        app = create_endpoint(LocalRenderer(animator, config), JobStore(config.storage), config, poll_s=0.05)
        with TestClient(app, base_url="http://127.0.0.1:8000") as client:
            made = ended(
                client, client.post("/v1/videos", json={"prompt": "uneven", "image": picture, **knobs, **policy})
            )
            assert (made["status"], made["accepted"], len(made["takes"])) == ("completed", False, 2)
            assert made["params"]["seed"] == made["takes"][made["take"]]["seed"]
            remixed = ended(client, client.post(f"/v1/videos/{made['id']}/remix", json={"prompt": "uneven again"}))
            assert (remixed["accepted"], len(remixed["takes"])) == (False, 2)


def ended(client: TestClient, answer: Any) -> dict[str, Any]:
    """The video object of a new job, once it has ended."""
    assert answer.status_code == 200, answer.text
    deadline = time.monotonic() + 60
    job: dict[str, Any] = answer.json()
    while job["status"] not in ("completed", "failed"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
        job = client.get(f"/v1/videos/{job['id']}").json()
    return job


@pytest.mark.filterwarnings("ignore:The Sora API is scheduled:DeprecationWarning")
def test_the_openai_client_loses_no_job_at_the_limits_of_calls_and_open_jobs(tmp_path: Path):
    limits = {"requests_per_minute": 20, "max_jobs_per_key": 4}
    config = ServeConfig.model_validate({"storage": str(tmp_path), "batch_size": 2, **limits})
    picture = draw_picture((64, 48), seed=1)
    knobs = {"num_frames": 4, "num_inference_steps": 20, "width": 64, "height": 64}

    async def work(animator: FakeAnimator) -> list[str]:
        app = create_endpoint(LocalRenderer(animator, config), JobStore(config.storage), config, poll_s=0.05)
        http = httpx2.AsyncClient(transport=httpx2.ASGITransport(app))
        client = AsyncOpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none", max_retries=0, http_client=http)
        async with app.state.service.at_work(), client:
            made = await asyncio.gather(
                *(
                    client.videos.create_and_poll(prompt=f"{n}", input_reference=picture, extra_body=knobs)
                    for n in range(config.max_jobs_per_key)
                )
            )
        return [each.status for each in made]

    with FakeAnimator(config.models["demo"], styles=config.models, seconds_per_step=0.04) as animator:
        assert asyncio.run(work(animator)) == ["completed"] * config.max_jobs_per_key
