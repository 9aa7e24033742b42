"""The sender of webhooks among many of them: fair between owners, whole, and without growth."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from pia_ray.online.video_jobs import JobStore
from pia_ray.online.video_jobs.dispatcher import Dispatcher
from pia_ray.online.video_jobs.webhook_sender import KEPT_PER_HOST, PER_OWNER, SENDERS, WebhookSender
from pia_ray.online.video_jobs.webhooks import Webhooks
from tests.online.video_jobs.test_dispatcher import QUICK, ScriptedRenderer, run, running
from tests.online.video_jobs.test_webhooks import (
    SECRET,
    Receiver,
    cancelled,
    jobs,
    pem,
    receiver,
    resolve,
    settled,
    webhooks,
)
from tests.tables import num_entries

__all__ = ["jobs", "pem", "receiver", "webhooks"]  # fixtures

UNKNOWN = Webhooks(SECRET, retry_delays_s=(), resolve=resolve)
"""Gives receivers up at once, as no name but one has an address."""


def test_many_webhooks_of_one_receiver_that_does_not_answer_delay_no_other_owner(
    jobs: JobStore, receiver: Receiver, webhooks: Webhooks
) -> None:
    async def work() -> None:
        with socket.create_server(("127.0.0.1", 0), backlog=64) as silent:
            url = f"https://pictures.test:{silent.getsockname()[1]}/"
            with ThreadPoolExecutor(16) as threads:
                list(threads.map(lambda _: cancelled(jobs, url), range(KEPT_PER_HOST + PER_OWNER)))
            other = cancelled(jobs, receiver.url, owner="bob")
            async with running(Dispatcher(ScriptedRenderer(), jobs, webhooks=webhooks, **QUICK)):
                assert (await settled(jobs, other)).webhook_state == "delivered"

    run(work)


def test_a_free_place_goes_to_the_owner_with_the_fewest_and_not_to_the_oldest_webhook(jobs: JobStore) -> None:
    lookups: list[str] = []
    owners = [f"owner {number}" for number in range(1 + SENDERS // PER_OWNER)] * (PER_OWNER + 2)

    def slow(host: str, port: int) -> Sequence[str]:
        lookups.append(host)
        time.sleep(0.15)
        return resolve(host, port)

    async def work() -> None:
        with ThreadPoolExecutor(16) as threads:
            urls = [f"https://others-{number}.test/" for number in range(len(owners))]
            list(threads.map(lambda url, owner: cancelled(jobs, url, owner=owner), urls, owners))
        last = cancelled(jobs, "https://last.test/")
        unknown = Webhooks(SECRET, retry_delays_s=(), resolve=slow)
        async with running(Dispatcher(ScriptedRenderer(), jobs, webhooks=unknown, **QUICK)):
            await settled(jobs, last)

    run(work)
    assert lookups.index("last.test") < SENDERS + PER_OWNER


def test_all_of_more_webhooks_than_are_kept_are_sent_one_after_the_other(jobs: JobStore) -> None:
    async def work() -> None:
        with ThreadPoolExecutor(16) as threads:
            made = threads.map(lambda _: cancelled(jobs, "https://others.test/"), range(KEPT_PER_HOST + PER_OWNER))
            last = max(made, key=lambda job: job.id)
        sender = WebhookSender(jobs, UNKNOWN, worker="sender", poll_s=60)
        sending = asyncio.create_task(sender.run())
        assert (await settled(jobs, last)).webhook_state == "failed"
        sending.cancel()
        await asyncio.wait([sending])

    run(work)


def test_receivers_that_were_given_up_take_no_memory(jobs: JobStore) -> None:
    unknown = Webhooks(SECRET, retry_delays_s=(), resolve=resolve)  # no name has an address

    sender = WebhookSender(jobs, unknown, worker="sender", poll_s=0.05)

    async def work() -> None:
        sending = asyncio.create_task(sender.run())
        for number in range(5):
            made = cancelled(jobs, f"https://receiver-{number}.test/")
            assert (await settled(jobs, made)).webhook_state == "failed"
        while num_entries(sender):  # storage has the last webhook's end before the sender forgets it
            await asyncio.sleep(0.01)
        sending.cancel()
        await asyncio.wait([sending])

    run(work)
