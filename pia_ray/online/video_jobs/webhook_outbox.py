"""The outbox of webhooks: each event of an ended video job is delivered at least once, or given up."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, Literal

from pia_ray.errors import JobConflict, JobNotFound
from pia_ray.online.documents.document import IndexEntry, Revision
from pia_ray.online.video_jobs.document import WEBHOOKS, VideoJob
from pia_ray.online.video_jobs.documents import JobDocuments

EARLIER_S: Final = 60.0
"""Seconds between two searches for entries that 0.1.0 has written behind others that are not due."""


@dataclass(frozen=True)
class TryResult:
    """The result of a try of a webhook."""

    status: int | None = None
    """HTTP status that the receiver answered, if it answered one."""
    error: str | None = None
    """Code of the error; None where the webhook was delivered."""


class WebhookOutbox:
    """The webhooks of all owners that have not been delivered."""

    def __init__(self, documents: JobDocuments) -> None:
        self._documents = documents
        self._earlier_read_at = -EARLIER_S

    def entries(self) -> tuple[IndexEntry, ...]:
        """Ended jobs whose webhook is not settled, those that are due first, and within a second by age."""
        return self._documents.store.entries(WEBHOOKS)

    def due(self) -> Iterator[IndexEntry]:
        """The entries whose names say that they are due, the earliest first.

        They are read as they are taken, up to the first one that is not due. No document is read.
        """
        now = self._documents.store.now()
        for entry in self._documents.store.each_entry(WEBHOOKS):
            if entry.rank > now:
                break
            yield entry
        else:
            return
        if time.monotonic() - self._earlier_read_at >= EARLIER_S:
            self._earlier_read_at = time.monotonic()
            yield from self._documents.store.unranked_entries(WEBHOOKS)

    def read(self, entry: IndexEntry) -> Revision[VideoJob]:
        """The job of an entry. The entry of a settled webhook is removed, and a wrong due time in a name is mended.

        Raises:
            JobNotFound: there is nothing to deliver, or not yet.
        """
        now = self._documents.store.read_entry(entry)
        if not now.document.ended:  # its end is being written, or its writer came too late
            raise JobNotFound("it has not ended")
        self._documents.store.mend_entry(entry, WEBHOOKS, now.document)
        if now.document.webhook_state != "pending":
            raise JobNotFound("its webhook is settled")
        return now

    def claim(self, at: Revision[VideoJob], *, worker: str) -> Revision[VideoJob]:
        """The job, whose delivery this worker has claimed; one more try is counted.

        Raises:
            JobConflict: it cannot be claimed now.
        """
        job = at.document
        if job.webhook_state != "pending" or max(job.lease_until, job.not_before) > self._documents.store.now():
            raise JobConflict(f"the webhook of {job.id} is not due, or another worker has claimed it")
        change = {**self._documents.lease(worker), "webhook_attempts": job.webhook_attempts + 1}
        return self._documents.store.replace(at, change)

    def settle(self, at: Revision[VideoJob], state: Literal["delivered", "failed"], result: TryResult) -> None:
        """Notes that the webhook was delivered, or that it is given up.

        Raises:
            JobConflict, JobNotFound: another worker has claimed it, or the job was deleted.
        """
        self._documents.replace_held(at, {**_tried(result), "webhook_state": state})

    def postpone(self, at: Revision[VideoJob], result: TryResult, *, delay_s: float) -> None:
        """Frees the webhook for another try after that time.

        Raises:
            JobConflict, JobNotFound: as `settle`.
        """
        change = {**_tried(result), "not_before": self._documents.store.now() + delay_s}
        self._documents.replace_held(at, change)

    def redeliver(self, owner: str, job_id: str) -> VideoJob:
        """The ended job, whose webhook is due again now, with all its tries and the same id of its event.

        One that is being sent at this moment is left to its sender.

        Raises:
            JobConflict: the job has no webhook, has not ended, or its webhook does not get the event of this end.
            JobNotFound: the owner has no such job.
        """

        def due_now(job: VideoJob) -> dict[str, Any]:
            if job.webhook_url is None:
                raise JobConflict(f"{job.id} has no webhook: give webhook_url where the video is created")
            if not job.ended:
                raise JobConflict(f"{job.id} is {job.status}: its webhook is sent when it has ended")
            if not job.wants(job.status):
                raise JobConflict(f"{job.id} has {job.status}, and its webhook_events leave that event out")
            if job.webhook_state == "pending" and job.lease_until > self._documents.store.now():
                return {}
            return {"webhook_state": "pending", "webhook_attempts": 0, "not_before": 0.0}

        return self._documents.store.change(owner, job_id, due_now)


def _tried(result: TryResult) -> dict[str, Any]:
    """The fields of a job after a try of its webhook."""
    return {
        "lease_owner": None,
        "lease_until": 0.0,
        "webhook_error": result.error,
        "webhook_status": result.status,
    }
