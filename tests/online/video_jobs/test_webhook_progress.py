"""Webhooks with the progress of a job: for receivers that ask for it, at most so often, and never after the end."""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
from collections.abc import Sequence
from pathlib import Path

import pytest
from openai import OpenAI

from pia_ray.online.video_jobs import JobStore, VideoJob
from pia_ray.online.video_jobs.dispatcher import Dispatcher
from pia_ray.online.video_jobs.webhook_fields import EVENTS
from pia_ray.online.video_jobs.webhook_progress import ProgressSender
from pia_ray.online.video_jobs.webhooks import Webhooks
from tests.online.video_jobs.test_dispatcher import QUICK, ScriptedRenderer, create, ended, run, running
from tests.online.video_jobs.test_webhooks import SECRET, Receiver, jobs, pem, receiver, resolve, settled, webhooks
from tests.tables import num_entries

__all__ = ["jobs", "pem", "receiver", "webhooks"]  # fixtures


def in_progress(jobs: JobStore, url: str) -> VideoJob:
    """A job that wants all events and is at work."""
    job = create(jobs, webhook_url=url, webhook_events=EVENTS)
    held = jobs.queue.claim(jobs.queue.read(jobs.queue.entries()[0]), worker="me")
    at_work = jobs.queue.heartbeat(held, progress=40).document
    assert at_work.id == job.id
    return at_work


async def until_idle(sender: ProgressSender, *, entries: int) -> None:
    async with asyncio.timeout(10):
        while num_entries(sender) > entries:
            await asyncio.sleep(0.01)


def test_a_receiver_that_asks_for_progress_gets_it_once_in_some_seconds_and_before_the_end(
    jobs: JobStore, receiver: Receiver, webhooks: Webhooks
) -> None:
    async def work() -> None:
        renderer = ScriptedRenderer()
        job = create(jobs, "wait here", webhook_url=receiver.url, webhook_events=EVENTS)
        async with running(Dispatcher(renderer, jobs, webhooks=webhooks, **QUICK)):
            async with asyncio.timeout(10):
                while not receiver.got:
                    await asyncio.sleep(0.01)
            await asyncio.sleep(0.2)  # several heartbeats
            renderer.go_on.set()
            assert (await settled(jobs, job)).webhook_attempts == 1
        (first, begun), (last, end) = receiver.got
        assert first["webhook-id"] != last["webhook-id"]
        with OpenAI(api_key="none", webhook_secret=SECRET) as client:
            assert client.webhooks.unwrap(begun, first).type == "video.in_progress"
        data = json.loads(begun)["data"]
        assert data["id"] == job.id
        assert 0 < data["progress"] < 100
        assert json.loads(end)["type"] == "video.completed"

    run(work)


def test_a_receiver_that_asks_for_nothing_more_gets_the_end_alone(
    jobs: JobStore, receiver: Receiver, webhooks: Webhooks
) -> None:
    async def work() -> None:
        job = create(jobs, webhook_url=receiver.url)
        other = create(jobs, "wait", webhook_url=receiver.url, webhook_events=("video.failed",))
        renderer = ScriptedRenderer()
        renderer.go_on.set()
        async with running(Dispatcher(renderer, jobs, webhooks=webhooks, **QUICK)):
            await settled(jobs, job)
            assert (await ended(jobs, other)).webhook_state == "none"
        assert [json.loads(body)["type"] for _, body in receiver.got] == ["video.completed"]

    run(work)


def test_nothing_is_reported_once_the_job_has_ended(jobs: JobStore, receiver: Receiver, pem: Path) -> None:
    async def work() -> None:
        job = in_progress(jobs, receiver.url)

        def resolve_late(host: str, port: int) -> Sequence[str]:
            jobs.cancel(job.owner, job.id)  # as a name server takes its time
            return ["127.0.0.1"]

        trusted = ssl.create_default_context(cafile=str(pem))
        late = Webhooks(SECRET, allowed_networks=("127.0.0.1/32",), resolve=resolve_late, ssl_context=trusted)
        sender = ProgressSender(jobs, late)
        sending = asyncio.create_task(sender.run())
        await asyncio.sleep(0)
        sender.report(job)
        await until_idle(sender, entries=1)
        assert [body for _, body in receiver.got if body] == []
        sending.cancel()
        await asyncio.wait([sending])

    run(work)


def test_a_receiver_that_fails_gets_no_reports_for_a_while_and_none_is_kept(jobs: JobStore) -> None:
    async def work() -> None:
        job = in_progress(jobs, "https://nowhere.test/hook")
        lookups: list[str] = []

        def no_name(host: str, port: int) -> Sequence[str]:
            lookups.append(host)
            return resolve(host, port)

        sender = ProgressSender(jobs, Webhooks(SECRET, resolve=no_name), interval_s=0.0)
        sending = asyncio.create_task(sender.run())
        await asyncio.sleep(0)
        for _ in range(3):
            sender.report(job)
            await until_idle(sender, entries=2)
        assert lookups == ["nowhere.test"]
        sender.forget(job.id)
        assert num_entries(sender) == 1
        sending.cancel()
        await asyncio.wait([sending])

    run(work)


def test_a_report_that_is_not_answered_does_not_delay_the_event_of_the_end(jobs: JobStore, webhooks: Webhooks) -> None:
    async def work() -> None:
        renderer = ScriptedRenderer()
        with socket.create_server(("127.0.0.1", 0), backlog=64) as silent:
            url = f"https://pictures.test:{silent.getsockname()[1]}/"
            job = create(jobs, "wait here", webhook_url=url, webhook_events=EVENTS)
            async with running(Dispatcher(renderer, jobs, webhooks=webhooks, **QUICK)):
                report, _ = await asyncio.to_thread(silent.accept)
                with report:
                    renderer.go_on.set()
                    end, _ = await asyncio.to_thread(silent.accept)
                    with end:
                        assert (await asyncio.to_thread(jobs.get, job.owner, job.id)).status == "completed"
                        report.setblocking(False)
                        assert report.recv(100_000)
                        with pytest.raises(BlockingIOError):  # the report still waits for its answer
                            report.recv(1)

    run(work)
