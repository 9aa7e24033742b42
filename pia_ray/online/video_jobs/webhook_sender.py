"""Sends the webhooks that are due. Every HTTP replica may run a sender; each webhook is sent by one of them.

The outbox in storage has the due webhooks. Another sender delivers those that a dead one had claimed. A receiver that
does not answer delays its own events alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Final
from urllib.parse import urlsplit

from cachetools import LRUCache

from pia_ray.errors import FetchError, JobConflict, JobNotFound, StorageError
from pia_ray.online.documents.document import IndexEntry, Revision
from pia_ray.online.video_jobs import JobStore, VideoJob
from pia_ray.online.video_jobs.webhook_outbox import TryResult
from pia_ray.online.video_jobs.webhook_progress import ProgressSender
from pia_ray.online.video_jobs.webhooks import Webhooks

SENDERS: Final = 64
"""Webhooks that are sent at the same time."""

PER_OWNER: Final = 8
"""Of these, at most so many of one owner."""

PER_HOST: Final = 4
"""Of these, at most so many to one host."""

KEPT: Final = 2048
"""Due webhooks that are kept in memory for a place; the others are read again when these have been sent."""

KEPT_PER_OWNER: Final = 128
"""Of these, at most so many of one owner."""

KEPT_PER_HOST: Final = 64
"""Of these, at most so many to one host, and so many whose host is not known yet."""

_KNOWN_HOSTS: Final = 10_000
_PART: Final = 256
"""Entries that are read of the outbox in one step."""
_PACE: Final = 10.0
"""The outbox is read again at the earliest after so many times the time of the last reading."""

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
        self.progress: Final = ProgressSender(jobs, webhooks)
        """Sends the progress of jobs while `run` runs."""
        self._woken = asyncio.Event()
        self._due: dict[str, IndexEntry] = {}
        """Entries that wait for a place, by id."""
        self._is_whole = True
        """Whether all entries that were due at the last reading are in `_due` or were begun."""
        self._sending: dict[str, IndexEntry] = {}
        self._places: Counter[str] = Counter()
        """Webhooks that are being sent, by owner and by owner and host."""
        self._hosts: LRUCache[str, str] = LRUCache(_KNOWN_HOSTS)
        """Owner and host of entries that were read once and are not settled, by id."""

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
                group.create_task(self.progress.run())
                while True:
                    self._woken.clear()
                    begun = time.monotonic()
                    await self._read_outbox(threads)
                    self._begin(group, threads)
                    # Each job that ends wakes this: a long outbox is not read for each of them.
                    await asyncio.sleep(min(self._poll_s, _PACE * (time.monotonic() - begun)))
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(self._woken.wait(), self._poll_s)
        finally:
            threads.shutdown(wait=False, cancel_futures=True)

    async def _read_outbox(self, threads: ThreadPoolExecutor) -> None:
        """Keeps of the due entries as many as there is room for: an owner's or host's many leave room for others'."""
        due, kept = self._jobs.outbox.due(), dict[str, IndexEntry]()
        groups, is_whole = Counter[str](), True
        try:
            while part := await asyncio.get_running_loop().run_in_executor(threads, _next_part, due):
                for entry in part:
                    host = self._hosts.get(entry.id, f"{entry.owner_folder} ")
                    if entry.id in self._sending or entry.id in kept:
                        continue
                    if groups[host] >= KEPT_PER_HOST or groups[entry.owner_folder] >= KEPT_PER_OWNER:
                        is_whole = False
                        continue
                    kept[entry.id] = entry
                    groups.update((host, entry.owner_folder))
                if len(kept) >= KEPT:
                    is_whole = False
                    break
        except StorageError as error:
            _log.warning("the outbox cannot be read: %s", error.message)
        else:
            self._is_whole = is_whole
            self._due = {entry.id: entry for entry in kept.values() if entry.id not in self._sending}

    def _begin(self, group: asyncio.TaskGroup, threads: ThreadPoolExecutor) -> None:
        """Begins the entries for which there is a place, those of the owners with the fewest places first."""
        for entry in sorted(self._due.values(), key=lambda each: self._places[each.owner_folder]):
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
                    if await loop.run_in_executor(threads, self._try, at):
                        self._hosts.pop(entry.id, None)  # others may have displaced it
                finally:
                    self._leave(host)
        except (JobConflict, JobNotFound):
            self._hosts.pop(entry.id, None)  # another sender has claimed it, or the job was deleted
        except StorageError as error:
            _log.warning("the webhook of %s waits: %s", entry.id, error.message)
        finally:
            del self._sending[entry.id]
            self._leave(entry.owner_folder)
        self._begin(group, threads)
        if not self._is_whole and not self._has_waiting(entry.owner_folder):
            self.wake()

    def _leave(self, place: str) -> None:
        """Gives back a place of an owner, or of an owner and host."""
        self._places[place] -= 1
        if not self._places[place]:
            del self._places[place]

    def _has_waiting(self, owner_folder: str) -> bool:
        """Whether an entry of the owner is kept that could begin at the next free place."""
        return any(each.owner_folder == owner_folder and not self._is_host_full(each) for each in self._due.values())

    def _try(self, at: Revision[VideoJob]) -> bool:
        """Whether the webhook is settled after one more try; on a thread."""
        outbox = self._jobs.outbox
        held = outbox.claim(at, worker=self._worker)
        try:
            status = self._webhooks.send(held.document)
        except FetchError as error:
            tries, result = held.document.webhook_attempts, TryResult(error.answered, error.code)
            _log.info("the webhook of %s, try %d: %s", at.document.id, tries, error.message)
            if error.retryable and tries <= len(self._webhooks.retry_delays_s):
                outbox.postpone(held, result, delay_s=self._webhooks.retry_delays_s[tries - 1])
                return False
            outbox.settle(held, "failed", result)
        else:
            outbox.settle(held, "delivered", TryResult(status))
        return True


def _next_part(due: Iterator[IndexEntry]) -> list[IndexEntry]:
    return list(itertools.islice(due, _PART))


def _host(entry: IndexEntry, job: VideoJob) -> str:
    """The owner and the host of a job's webhook: a slow host of one owner takes no place of another owner."""
    return f"{entry.owner_folder} {urlsplit(job.webhook_url or '').netloc.lower()}"
