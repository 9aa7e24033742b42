"""The events of a video job, and the refusal of verbs that the endpoint has nothing for, in this process."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from pia_ray.config.serve import ServeConfig
from pia_ray.online.rendering.local_renderer import LocalRenderer
from pia_ray.online.routes.video_events import STREAMS_PER_CALLER
from pia_ray.online.service import create_endpoint
from pia_ray.online.video_jobs import JobStore
from pia_ray.testing import FakeAnimator, draw_picture

PICTURE = draw_picture((64, 48), seed=1)
FIELDS = {"num_frames": "4", "num_inference_steps": "4", "width": "64", "height": "64"}


@asynccontextmanager
async def endpoint(folder: Path, *, is_at_work: bool = True) -> AsyncIterator[httpx2.AsyncClient]:
    config = ServeConfig.model_validate({"storage": str(folder)})
    with FakeAnimator(config.models["demo"], styles=config.models, seconds_per_step=0.1) as animator:
        app = create_endpoint(LocalRenderer(animator, config), JobStore(config.storage), config, poll_s=0.05)
        transport = httpx2.ASGITransport(app)
        async with httpx2.AsyncClient(transport=transport, base_url="http://127.0.0.1", timeout=30) as client:
            if not is_at_work:
                yield client
                return
            async with app.state.service.at_work():
                yield client


async def create(client: httpx2.AsyncClient, prompt: str) -> str:
    answer = await client.post("/v1/videos", data={**FIELDS, "prompt": prompt}, files={"image": PICTURE})
    assert answer.status_code == 200, answer.text
    return str(answer.json()["id"])


async def events_of(client: httpx2.AsyncClient, video_id: str) -> list[tuple[str, Any]]:
    answer = await client.get(f"/v1/videos/{video_id}/events")
    assert (answer.status_code, answer.headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
    found = []
    for block in answer.text.strip().split("\n\n"):
        if not block.startswith(":"):
            name, data = block.split("\n")
            found.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return found


def test_a_stream_shows_the_progress_of_a_video_and_ends_with_it(tmp_path: Path) -> None:
    async def work() -> None:
        async with endpoint(tmp_path) as client:
            video_id = await create(client, "waves")
            found = await events_of(client, video_id)
            assert [name for name, _ in found[:-1]] == ["progress"] * (len(found) - 1)
            assert len(found) > 1
            name, last = found[-1]
            assert (name, last["id"], last["progress"]) == ("completed", video_id, 100)
            again = await events_of(client, video_id)  # a new connection gets the state at once
            assert [(name, each["status"]) for name, each in again] == [("completed", "completed")]
            cancelled = await create(client, "waves")
            await client.post(f"/v1/videos/{cancelled}/cancel")
            name, last = (await events_of(client, cancelled))[-1]
            assert (name, last["error"]["code"]) == ("failed", "cancelled")

    asyncio.run(work())


def test_a_stream_of_a_deleted_video_ends_with_an_error_and_of_none_is_404(tmp_path: Path) -> None:
    async def work() -> None:
        async with endpoint(tmp_path, is_at_work=False) as client:
            video_id = await create(client, "waves")
            stream = asyncio.create_task(events_of(client, video_id))
            await asyncio.sleep(0.1)
            await client.delete(f"/v1/videos/{video_id}")
            name, error = (await stream)[-1]
            assert (name, error["error"]["code"]) == ("error", "job_not_found")
            assert (await client.get(f"/v1/videos/{video_id}/events")).status_code == 404

    asyncio.run(work())


def test_a_caller_has_a_bounded_number_of_streams_which_are_free_again_at_their_ends(tmp_path: Path) -> None:
    async def work() -> None:
        async with endpoint(tmp_path, is_at_work=False) as client:
            video_id = await create(client, "waves")
            streams = [asyncio.create_task(events_of(client, video_id)) for _ in range(STREAMS_PER_CALLER)]
            await asyncio.sleep(0.3)
            refused = await client.get(f"/v1/videos/{video_id}/events")
            assert (refused.status_code, refused.headers["retry-after"]) == (429, "2")
            await client.post(f"/v1/videos/{video_id}/cancel")
            await asyncio.gather(*streams)
            assert (await events_of(client, video_id))[-1][0] == "failed"

    asyncio.run(work())


@pytest.mark.filterwarnings("ignore:The Sora API is scheduled:DeprecationWarning")
def test_verbs_of_the_openai_client_without_a_meaning_here_are_refused_as_unsupported(tmp_path: Path) -> None:
    async def work() -> None:
        async with endpoint(tmp_path, is_at_work=False) as http:
            client = openai.AsyncOpenAI(base_url="http://127.0.0.1/v1", api_key="any", http_client=http)
            videos = client.videos
            calls = (
                videos.edit(prompt="a", video=b"content"),
                videos.extend(prompt="a", seconds="4", video=b"content"),
                videos.create_character(name="a", video=b"content"),
                videos.get_character("char_1"),
            )
            for call, way in zip(calls, ("remix", "num_frames", "LoRA", "LoRA"), strict=True):
                with pytest.raises(openai.BadRequestError) as caught:
                    await call
                assert caught.value.code == "unsupported"
                assert way in str(caught.value)

    asyncio.run(work())
