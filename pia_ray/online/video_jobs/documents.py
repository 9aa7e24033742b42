"""The documents of video jobs for the queue, the outbox and their owners: leases, ends, and the files of a job."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Final

from pia_ray import storage
from pia_ray.errors import JobConflict
from pia_ray.online.documents.document import Revision
from pia_ray.online.documents.store import DocumentStore
from pia_ray.online.video_jobs.document import FAILED, QUEUE, VIDEO_JOBS, WEBHOOKS, VideoJob

QUEUED: Final[Mapping[str, Any]] = {
    "status": "queued",
    "progress": 0,
    "started_at": None,
    "eta_at": None,
    "lease_owner": None,
    "lease_until": 0.0,
}
"""The fields of a job that nobody has claimed."""

_HOLDER: Final = ("lease_owner", "attempt", "webhook_attempts", "webhook_state", "retries", "ended")
"""The fields by which a worker sees that a job is still its own."""

_log = logging.getLogger(__name__)


class JobDocuments:
    """The job documents of all owners; safe in threads and in any number of processes."""

    def __init__(self, prefix: str, *, job_ttl_s: float, lease_s: float, failed_job_ttl_s: float | None = None) -> None:
        """`failed_job_ttl_s` is `job_ttl_s` if left out."""
        self.prefix = prefix
        self.lease_s = lease_s
        self.store = DocumentStore(
            prefix,
            VIDEO_JOBS,
            indexes=(QUEUE, WEBHOOKS, FAILED),
            remove_content=lambda _, job_id: self._remove_files(job_id),
        )
        self._job_ttl_s = job_ttl_s
        self._failed_job_ttl_s = job_ttl_s if failed_job_ttl_s is None else failed_job_ttl_s

    def lease(self, worker: str) -> dict[str, Any]:
        """The fields of a job that this worker claims now."""
        return {"lease_owner": worker, "lease_until": self.store.now() + self.lease_s}

    def end(self, job: VideoJob, change: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of the job when it ends now with that change: it leaves the queue and will expire."""
        now, has_failed = self.store.now(), change.get("status") == "failed" and not change.get("cancelled")
        return {
            **QUEUED,
            "progress": job.progress,
            "started_at": job.started_at,
            "completed_at": now,
            "expires_at": now + (self._failed_job_ttl_s if has_failed else self._job_ttl_s),
            "not_before": 0.0,
            "webhook_state": "pending" if job.wants(str(change["status"])) else "none",
            **change,
        }

    def replace_held(self, at: Revision[VideoJob], change: Mapping[str, Any]) -> Revision[VideoJob]:
        """The job with these fields changed, unless another worker has claimed it.

        Goes through also where the answer to an earlier write was lost.

        Raises:
            JobConflict: it has ended, or another worker has claimed it.
            JobNotFound: it was deleted.
        """
        try:
            return self.store.replace(at, change)
        except JobConflict:
            now = self.store.read(at.document.owner, at.document.id)
            if any(getattr(now.document, name) != getattr(at.document, name) for name in _HOLDER):
                raise
            return self.store.replace(now, change)

    def end_held(self, at: Revision[VideoJob], change: Mapping[str, Any]) -> VideoJob:
        """The job as it has ended with that change.

        Raises:
            JobConflict, JobNotFound: as `replace_held`.
        """
        ended = self.replace_held(at, self.end(at.document, change)).document
        _log.info("%s %s%s", ended.id, ended.status, f" ({ended.error.code})" if ended.error else "")
        return ended

    def inputs_uri(self, job_id: str) -> str:
        """Folder of the files that came with a job."""
        return storage.join(self.prefix, "inputs", job_id)

    def content_uri(self, job_id: str) -> str:
        """Folder of the files that a job's attempts made."""
        return storage.join(self.prefix, "content", job_id)

    def _remove_files(self, job_id: str) -> None:
        for folder in (self.inputs_uri(job_id), self.content_uri(job_id)):
            for found in storage.list_objects(folder):
                storage.delete(found.uri)
