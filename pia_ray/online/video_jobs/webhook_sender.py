"""Sends the webhooks that are due. Every HTTP replica may run a sender; each webhook is sent by one of them.

The outbox in storage has the due webhooks. Another sender delivers those that a dead one had claimed. A receiver that
does not answer delays its own events alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Final
from urllib.parse import urlsplit

from cachetools import LRUCache

from pia_ray.errors import FetchError, JobConflict, JobNotFound, StorageError
from pia_ray.online.documents.document import IndexEntry, Revision
from pia_ray.online.video_jobs import JobStore, VideoJob
from pia_ray.online.video_jobs.webhook_outbox import TryResult
from pia_ray.online.video_jobs.webhooks import Webhooks

SENDERS: Final = 64
"""Webhooks that are sent at the same time."""

PER_OWNER: Final = 8
"""Of these, at most so many of one owner."""

PER_HOST: Final = 4
"""Of these, at most so many to one host."""

_KNOWN_HOSTS: Final = 100_000

_log = logging.getLogger(__name__)


class WebhookSender:
    """Delivers the webhooks of a job store's outbox, which it reads every `poll_s` and when it is woken.

    `worker` is its name in leases. `wake` belongs to the event loop of `run`.
    """

    def __init__(self, jobs: JobStore, webhooks: Webhooks, *, worker: str, poll_s: float) -> None:
        self._jobs = jobs
        self._webhooks = webhooks
        self._worker = worker
        self._poll_s = poll_s
        self._woken = asyncio.Event()
        self._due: dict[str, IndexEntry] = {}
        """Entries that wait for a place, by id."""
        self._sending: dict[str, IndexEntry] = {}
        self._places: Counter[str] = Counter()
        """Webhooks that are being sent, by owner and by owner and host."""
        self._hosts: LRUCache[str, str] = LRUCache(_KNOWN_HOSTS)
        """Owner and host of entries that were read once, by id."""

    def wake(self) -> None:
        """Says that a job has ended."""
        self._woken.set()

    async def run(self) -> None:
        """Works until it is cancelled. One call at a time."""
        self._woken = asyncio.Event()  # of this event loop
        self._due, self._sending, self._places = {}, {}, Counter()
        threads = ThreadPoolExecutor(SENDERS + 1, thread_name_prefix="webhooks")
        try:
            async with asyncio.TaskGroup() as group:
                while True:
                    self._woken.clear()
                    await self._read_outbox(threads)
                    self._begin(group, threads)
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(self._woken.wait(), self._poll_s)
        finally:
            threads.shutdown(wait=False, cancel_futures=True)

    async def _read_outbox(self, threads: ThreadPoolExecutor) -> None:
        try:
            due = await asyncio.get_running_loop().run_in_executor(threads, self._jobs.outbox.due)
        except StorageError as error:
            _log.warning("the outbox cannot be read: %s", error.message)
        else:
            self._due = {entry.id: entry for entry in due if entry.id not in self._sending}

    def _begin(self, group: asyncio.TaskGroup, threads: ThreadPoolExecutor) -> None:
        """Begins the entries for which there is a place."""
        for entry in list(self._due.values()):
            if len(self._sending) >= SENDERS:
                return
            if self._places[entry.owner_folder] < PER_OWNER and not self._is_host_full(entry):
                self._sending[entry.id] = self._due.pop(entry.id)
                self._places[entry.owner_folder] += 1
                group.create_task(self._deliver(entry, group, threads))

    def _is_host_full(self, entry: IndexEntry) -> bool:
        host = self._hosts.get(entry.id)
        return host is not None and self._places[host] >= PER_HOST

    async def _deliver(self, entry: IndexEntry, group: asyncio.TaskGroup, threads: ThreadPoolExecutor) -> None:
        """One try of one webhook, if it is due; then others take its place."""
        loop = asyncio.get_running_loop()
        try:
            at = await loop.run_in_executor(threads, self._jobs.outbox.read, entry)
            host = self._hosts[entry.id] = _host(entry, at.document)
            if self._places[host] >= PER_HOST:
                self._due[entry.id] = entry
            else:
                self._places[host] += 1
                try:
                    await loop.run_in_executor(threads, self._try, at)
                finally:
                    self._places[host] -= 1
        except (JobConflict, JobNotFound):
            pass  # another sender has claimed it, or the job was deleted
        except StorageError as error:
            _log.warning("the webhook of %s waits: %s", entry.id, error.message)
        finally:
            del self._sending[entry.id]
            self._places[entry.owner_folder] -= 1
        self._begin(group, threads)

    def _try(self, at: Revision[VideoJob]) -> None:
        """One try of one webhook; on a thread."""
        outbox = self._jobs.outbox
        held = outbox.claim(at, worker=self._worker)
        try:
            status = self._webhooks.send(held.document)
        except FetchError as error:
            tries, result = held.document.webhook_attempts, TryResult(error.answered, error.code)
            _log.info("the webhook of %s, try %d: %s", at.document.id, tries, error.message)
            if error.retryable and tries <= len(self._webhooks.retry_delays_s):
                outbox.postpone(held, result, delay_s=self._webhooks.retry_delays_s[tries - 1])
            else:
                outbox.settle(held, "failed", result)
        else:
            outbox.settle(held, "delivered", TryResult(status))


def _host(entry: IndexEntry, job: VideoJob) -> str:
    """The owner and the host of a job's webhook: a slow host of one owner takes no place of another owner."""
    return f"{entry.owner_folder} {urlsplit(job.webhook_url or '').netloc.lower()}"
