"""Sends the webhooks that are due. Every HTTP replica may run a sender; each webhook is sent by one of them.

The outbox in storage has the due webhooks. Another sender delivers those that a dead one had claimed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from pia_ray.errors import FetchError, JobConflict, JobNotFound, StorageError
from pia_ray.online.documents.document import IndexEntry
from pia_ray.online.video_jobs import JobStore
from pia_ray.online.video_jobs.webhooks import Webhooks

_SENDERS: Final = 4

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

    def wake(self) -> None:
        """Says that a job has ended."""
        self._woken.set()

    async def run(self) -> None:
        """Works until it is cancelled. One call at a time."""
        loop = asyncio.get_running_loop()
        self._woken = asyncio.Event()  # of this event loop
        threads = ThreadPoolExecutor(_SENDERS + 1, thread_name_prefix="webhooks")
        try:
            while True:
                self._woken.clear()
                try:
                    entries = await loop.run_in_executor(threads, self._jobs.outbox.entries)
                except StorageError as error:
                    _log.warning("the outbox cannot be read: %s", error.message)
                else:
                    await asyncio.gather(*(loop.run_in_executor(threads, self._send, each) for each in entries))
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._woken.wait(), self._poll_s)
        finally:
            threads.shutdown(wait=False, cancel_futures=True)

    def _send(self, entry: IndexEntry) -> None:
        """One try of one webhook, if it is due; on a thread."""
        try:
            self._try(entry)
        except (JobConflict, JobNotFound):
            pass  # another sender has claimed it, or the job was deleted
        except StorageError as error:
            _log.warning("the webhook of %s waits: %s", entry.id, error.message)

    def _try(self, entry: IndexEntry) -> None:
        outbox = self._jobs.outbox
        held = outbox.claim(outbox.read(entry), worker=self._worker)
        try:
            self._webhooks.send(held.document)
        except FetchError as error:
            tries = held.document.webhook_attempts
            _log.info("the webhook of %s, try %d: %s", entry.id, tries, error.message)
            if error.retryable and tries <= len(self._webhooks.retry_delays_s):
                outbox.postpone(held, delay_s=self._webhooks.retry_delays_s[tries - 1])
            else:
                outbox.settle(held, "failed")
        else:
            outbox.settle(held, "delivered")
