"""Which ended video jobs have a webhook to deliver, and who is at it: each is delivered at least once, or given up."""

from __future__ import annotations

from typing import Literal

from pia_ray import storage
from pia_ray.errors import JobConflict, JobNotFound
from pia_ray.online.video_jobs import layout
from pia_ray.online.video_jobs.document import Entry, Revision
from pia_ray.online.video_jobs.documents import Documents


class Outbox:
    """The webhooks of all owners that have not been delivered."""

    def __init__(self, documents: Documents) -> None:
        self._documents = documents

    def entries(self) -> tuple[Entry, ...]:
        """Ended jobs with a webhook to deliver, in order of creation."""
        return tuple(self._documents.entries(layout.webhooks_uri(self._documents.prefix)))

    def read(self, entry: Entry) -> Revision:
        """The job of an entry. An entry that is no longer needed is removed.

        Raises:
            JobNotFound: there is nothing to deliver for it, or not yet.
        """
        now = self._documents.read_entry(entry)
        if not now.job.ended:  # its end is being written, or who wrote it came too late
            raise JobNotFound("it has not ended")
        if now.job.webhook_state != "pending":
            storage.delete(entry.uri)
            raise JobNotFound("its webhook is settled")
        return now

    def claim(self, at: Revision, *, worker: str) -> Revision:
        """The delivery in this worker's hands; one more try is counted.

        Raises:
            JobConflict: it is not to be had (now).
        """
        job = at.job
        if job.webhook_state != "pending" or max(job.lease_until, job.not_before) > self._documents.now():
            raise JobConflict(f"the webhook of {job.id} is in other hands, or not due")
        change = {**self._documents.lease(worker), "webhook_attempts": job.webhook_attempts + 1}
        return self._documents.replace(at, change)

    def settle(self, at: Revision, state: Literal["delivered", "failed"]) -> None:
        """Notes that the webhook has arrived, or that it is given up.

        Raises:
            JobConflict, JobNotFound: somebody else has it in hand now, or the job is deleted.
        """
        job = self._documents.replace_held(at, {"webhook_state": state, "lease_owner": None, "lease_until": 0.0}).job
        entry = layout.webhook_entry_uri(self._documents.prefix, layout.owner_folder(job.owner), job.id)
        storage.delete(entry)

    def postpone(self, at: Revision, *, delay_s: float) -> None:
        """Has it tried again after that time.

        Raises:
            JobConflict, JobNotFound: as `settle`.
        """
        change = {"lease_owner": None, "lease_until": 0.0, "not_before": self._documents.now() + delay_s}
        self._documents.replace_held(at, change)
