"""Sends the progress of video jobs to webhooks that want it: once each, and never after the event of the job's end.

A report that finds no place, or whose receiver has failed lately, is left out: the next one says more.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Final
from urllib.parse import urlsplit

from cachetools import LRUCache

from pia_ray.errors import FetchError, JobConflict, JobNotFound, StorageError
from pia_ray.online.video_jobs import JobStore, VideoJob
from pia_ray.online.video_jobs.webhooks import Webhooks

INTERVAL_S: Final = 5.0
"""The least seconds between two reports of a job."""

REPORTS: Final = 16
"""Reports that are sent at the same time."""

REPORTS_PER_OWNER: Final = 4
"""Of these, at most so many of one owner."""

QUIET_S: Final = 60.0
"""Seconds without reports for a host that has failed; its owner's other hosts get theirs."""

_QUIET_HOSTS: Final = 10_000
_log = logging.getLogger(__name__)


class ProgressSender:
    """Posts the event `video.in_progress` of jobs that this process renders. Its methods belong to one event loop."""

    def __init__(self, jobs: JobStore, webhooks: Webhooks, *, interval_s: float = INTERVAL_S) -> None:
        self._jobs = jobs
        self._webhooks = webhooks
        self._interval_s = interval_s
        self._threads: ThreadPoolExecutor | None = None
        self._next_at: dict[str, float] = {}
        """By job at work, the earliest time of its next report; infinite while one is being sent."""
        self._places: Counter[str] = Counter()
        """Reports that are being sent, by owner."""
        self._quiet_until: LRUCache[str, float] = LRUCache(_QUIET_HOSTS)
        """By owner and host, the end of its pause."""
        self._sending: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Sends reports until it is cancelled. One call at a time."""
        threads = self._threads = ThreadPoolExecutor(REPORTS, thread_name_prefix="progress")
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            self._threads = None
            for sending in self._sending:
                sending.cancel()
            threads.shutdown(wait=False, cancel_futures=True)

    def report(self, job: VideoJob) -> None:
        """Sends the progress of a job, if its webhook wants it and there is a place."""
        if self._threads is None or not job.wants("in_progress") or job.status != "in_progress":
            return
        now, place = time.monotonic(), _place(job)
        if now < max(self._next_at.get(job.id, 0.0), self._quiet_until.get(place, 0.0)):
            return
        if len(self._sending) >= REPORTS or self._places[job.owner] >= REPORTS_PER_OWNER:
            return
        self._next_at[job.id] = float("inf")
        self._places[job.owner] += 1
        sending = asyncio.create_task(self._send(job, place, self._threads))
        self._sending.add(sending)
        sending.add_done_callback(self._sending.discard)

    def forget(self, job_id: str) -> None:
        """Drops what is kept of a job that is no longer at work here."""
        self._next_at.pop(job_id, None)

    async def _send(self, job: VideoJob, place: str, threads: ThreadPoolExecutor) -> None:
        begun = time.monotonic()
        try:
            await asyncio.get_running_loop().run_in_executor(threads, self._post, job)
        except (JobConflict, JobNotFound):
            pass  # it has ended meanwhile
        except (FetchError, StorageError) as error:
            self._quiet_until[place] = time.monotonic() + QUIET_S
            _log.info("the progress of %s is not sent: %s", job.id, error.message)
        finally:
            self._places[job.owner] -= 1
            if not self._places[job.owner]:
                del self._places[job.owner]
            if job.id in self._next_at:
                self._next_at[job.id] = begun + self._interval_s

    def _post(self, job: VideoJob) -> None:
        """Posts the event; on a thread. Nothing of it is sent once the job has ended, whoever has ended it."""

        def check() -> None:
            now = self._jobs.get(job.owner, job.id)
            if now.ended or now.lease_owner != job.lease_owner:
                raise JobConflict(f"{job.id} is no longer at work here")

        self._webhooks.send_progress(job, before_body=check)


def _place(job: VideoJob) -> str:
    return f"{job.owner} {urlsplit(job.webhook_url or '').netloc.lower()}"
