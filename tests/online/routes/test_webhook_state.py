"""The delivery of a webhook in the video object, and its redelivery, in this process."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx2
import pytest

from pia_ray.config.serve import ServeConfig
from pia_ray.online.rendering.local_renderer import LocalRenderer
from pia_ray.online.service import create_endpoint
from pia_ray.online.video_jobs import JobStore
from pia_ray.online.video_jobs.webhook_outbox import TryResult
from pia_ray.testing import FakeAnimator, draw_picture

URL = "https://hooks.example.com/secret-path?token=secret"
SECRET = "whsec_" + "A" * 44


@asynccontextmanager
async def endpoint(folder: Path) -> AsyncIterator[tuple[httpx2.AsyncClient, httpx2.AsyncClient, JobStore]]:
    """Clients of two keys, and the jobs, on which nobody works."""
    keys = [hashlib.sha256(key.encode()).hexdigest() for key in ("ann", "bob")]
    values = {"storage": str(folder), "webhook_secret": SECRET, "api_keys": keys, "requests_per_day": 2}
    config = ServeConfig.model_validate(values)
    with FakeAnimator(config.models["demo"], styles=config.models) as animator:
        jobs = JobStore(config.storage)
        transport = httpx2.ASGITransport(create_endpoint(LocalRenderer(animator, config), jobs, config))

        def client(key: str) -> httpx2.AsyncClient:
            headers = {"authorization": f"Bearer {key}"}
            return httpx2.AsyncClient(transport=transport, base_url="http://127.0.0.1", headers=headers)

        async with client("ann") as ann, client("bob") as bob:
            yield ann, bob, jobs


async def create(client: httpx2.AsyncClient, **fields: str) -> str:
    picture = {"image": draw_picture((64, 48), seed=1)}
    answer = await client.post("/v1/videos", data={"prompt": "a boat", **fields}, files=picture)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["id"])


def test_a_video_says_how_its_webhook_fares_without_its_url_and_is_sent_again_on_request(tmp_path: Path) -> None:
    async def work() -> None:
        async with endpoint(tmp_path) as (ann, bob, jobs):
            path = f"/v1/videos/{await create(ann, webhook_url=URL)}"
            first = await ann.get(path)
            assert first.json()["webhook"] == {
                "host": "hooks.example.com",
                "events": ["video.completed", "video.failed"],
                "state": "waiting",
                "attempts": 0,
                "last_status": None,
                "last_error": None,
                "next_attempt_at": None,
            }
            assert "secret" not in first.text
            too_early = await ann.post(f"{path}/webhook/redeliver")
            assert (too_early.status_code, too_early.json()["error"]["code"]) == (409, "job_conflict")
            ended = (await ann.post(f"{path}/cancel")).json()
            assert ended["webhook"]["next_attempt_at"] == ended["completed_at"]
            held = jobs.outbox.claim(jobs.outbox.read(next(jobs.outbox.due())), worker="sender")
            jobs.outbox.settle(held, "failed", TryResult(503, "fetch_unavailable"))
            assert jobs.outbox.entries() == ()
            webhook = (await ann.get(path)).json()["webhook"]
            assert (webhook["state"], webhook["attempts"], webhook["last_status"]) == ("failed", 1, 503)
            assert (webhook["last_error"], webhook["next_attempt_at"]) == ("fetch_unavailable", None)
            assert (await bob.post(f"{path}/webhook/redeliver")).status_code == 404
            for _ in range(3):  # it makes nothing, so the two requests of a day do not count it
                again = await ann.post(f"{path}/webhook/redeliver")
                assert (again.status_code, again.json()["webhook"]["state"]) == (200, "waiting")
            assert [entry.id for entry in jobs.outbox.due()] == [ended["id"]]

    asyncio.run(work())


def test_a_webhook_that_is_being_sent_is_left_to_its_sender(tmp_path: Path) -> None:
    async def work() -> None:
        async with endpoint(tmp_path) as (ann, _, jobs):
            path = f"/v1/videos/{await create(ann, webhook_url=URL)}"
            await ann.post(f"{path}/cancel")
            held = jobs.outbox.claim(jobs.outbox.read(next(jobs.outbox.due())), worker="sender")
            assert (await ann.post(f"{path}/webhook/redeliver")).json()["webhook"]["attempts"] == 1
            jobs.outbox.settle(held, "delivered", TryResult(204))
            webhook = (await ann.get(path)).json()["webhook"]
            assert (webhook["state"], webhook["last_status"]) == ("delivered", 204)
            without = f"/v1/videos/{await create(ann)}"
            assert (await ann.get(without)).json()["webhook"] is None
            assert (await ann.post(f"{without}/webhook/redeliver")).status_code == 409

    asyncio.run(work())


def test_a_request_names_the_events_of_its_webhook_in_any_form_of_a_list(tmp_path: Path) -> None:
    async def work() -> None:
        async with endpoint(tmp_path) as (ann, bob, _):
            fields = {"webhook_url": URL, "webhook_events": "video.in_progress, video.completed"}
            made = (await ann.get(f"/v1/videos/{await create(ann, **fields)}")).json()
            assert made["webhook"]["events"] == ["video.completed", "video.in_progress"]
            cancelled = (await ann.post(f"/v1/videos/{made['id']}/cancel")).json()
            assert cancelled["webhook"]["state"] == "none"
            assert (await ann.post(f"/v1/videos/{made['id']}/webhook/redeliver")).status_code == 409
            fields = {"webhook_url": URL, "webhook_events[]": "video.failed"}
            made = (await bob.get(f"/v1/videos/{await create(bob, **fields)}")).json()
            assert made["webhook"]["events"] == ["video.failed"]

    asyncio.run(work())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"webhook_url": URL, "webhook_events": ["video.progress"]}, 'Did you mean "video.in_progress"?'),
        ({"webhook_url": URL, "webhook_events": ["response.completed", 3]}, "must be a list of video.completed, "),
        ({"webhook_url": URL, "webhook_events": []}, "must be a list of"),
        ({"webhook_url": URL, "webhook_events": "x"}, "Events are video.completed, video.failed, video.in_progress."),
        ({"webhook_events": ["video.failed"]}, "give one too"),
    ],
)
def test_events_that_are_not_known_are_refused(tmp_path: Path, fields: dict[str, object], message: str) -> None:
    async def work() -> None:
        async with endpoint(tmp_path) as (ann, *_):
            answer = await ann.post("/v1/videos", json={"prompt": "a boat", "image": "data:,", **fields})
            error = answer.json()["error"]
            assert (answer.status_code, error["param"]) == (400, "webhook_events")
            assert message in error["message"]

    asyncio.run(work())
