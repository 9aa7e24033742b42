"""The documents of video jobs: read, and changed by compare-and-swap, so that of two changes that meet one is refused.

What a crash leaves between two writes is mended later: entries of an index are written before the document that they
are about, and removed after it has changed; the document alone says what is.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any, Final

from pydantic import ValidationError

from pia_ray import storage
from pia_ray.errors import JobConflict, JobNotFound, StorageError, StorageNotFound
from pia_ray.online.video_jobs import layout
from pia_ray.online.video_jobs.document import Entry, Revision, VideoJob

MAX_DOCUMENT_BYTES: Final = 1_000_000
CLOCK_S: Final = 600.0
"""The store's clock is looked at again after this time."""
ABANDONED_S: Final = 3600.0
"""An entry without a document after so long belongs to a request that broke off."""

QUEUED: Final[Mapping[str, Any]] = {
    "status": "queued",
    "progress": 0,
    "started_at": None,
    "eta_at": None,
    "lease_owner": None,
    "lease_until": 0.0,
}
"""What is so of a job that nobody has in hand."""

_log = logging.getLogger(__name__)


class Documents:
    """The job documents of all owners; safe in threads and in any number of processes."""

    def __init__(self, prefix: str, *, job_ttl_s: float, lease_s: float) -> None:
        self.prefix = prefix
        self.lease_s = lease_s
        self._job_ttl_s = job_ttl_s
        self._lock = threading.Lock()
        self._clock_offset_s = 0.0
        self._clock_looked_at = -CLOCK_S

    def now(self) -> float:
        """Seconds since 1970 by the store's clock, on which all replicas agree to a second or so."""
        with self._lock:
            if time.monotonic() - self._clock_looked_at >= CLOCK_S:
                self._clock_offset_s = storage.clock(self.prefix).timestamp() - time.monotonic()
                self._clock_looked_at = time.monotonic()
            return time.monotonic() + self._clock_offset_s

    def lease(self, worker: str) -> dict[str, Any]:
        """What is so of a job that this worker has in hand from now."""
        return {"lease_owner": worker, "lease_until": self.now() + self.lease_s}

    def read(self, folder: str, job_id: str) -> Revision:
        """A job of the owner with that folder.

        Raises:
            JobNotFound: there is none of that id, or it is another owner's.
        """
        uri = layout.document_uri(self.prefix, folder, layout.checked_id(job_id))
        # The ETag first: if the document changes before it is read, the ETag is the older one and a change is refused.
        found = storage.head(uri)
        if found is None:
            raise JobNotFound("there is no such video")
        try:
            content = storage.read_bytes(uri, max_bytes=MAX_DOCUMENT_BYTES)
            return Revision(VideoJob.model_validate_json(content), found.etag)
        except StorageNotFound:
            raise JobNotFound("there is no such video") from None
        except ValidationError as error:
            raise StorageError(f"{uri} is damaged: {error.errors(include_url=False)[0]['msg']}") from None

    def read_entry(self, entry: Entry) -> Revision:
        """The job of an entry; with one that broke off long ago, its files and the entry are removed.

        Raises:
            JobNotFound: there is no such job, or not yet.
        """
        try:
            return self.read(entry.owner_folder, entry.id)
        except JobNotFound:
            if self.now() - entry.written_at.timestamp() > ABANDONED_S:
                self.remove_files(entry.id)
                storage.delete(entry.uri)
            raise

    def create(self, job: VideoJob) -> bool:
        """Writes a new document; False if it is there already, which is left alone."""
        return storage.create_bytes(self._uri(job), _written(job), content_type="application/json")

    def replace(self, at: Revision, change: Mapping[str, Any]) -> Revision:
        """The job with these fields changed.

        Raises:
            JobConflict: it was changed or deleted since `at`.
        """
        job = at.job.model_copy(update={**change, "revision": at.job.revision + 1})
        etag = storage.replace_bytes(self._uri(job), _written(job), etag=at.etag)
        if etag is None:
            raise JobConflict(f"{job.id} was changed by somebody else")
        return Revision(job, etag)

    def replace_held(self, at: Revision, change: Mapping[str, Any]) -> Revision:
        """The same as long as nobody else has got the job in hand: also after the answer to an earlier write was lost.

        Raises:
            JobConflict: it has ended, or is in other hands.
            JobNotFound: it was deleted.
        """
        try:
            return self.replace(at, change)
        except JobConflict:
            now = self.read(layout.owner_folder(at.job.owner), at.job.id)
            holder = ("lease_owner", "attempt", "webhook_attempts", "webhook_state", "ended")
            if any(getattr(now.job, name) != getattr(at.job, name) for name in holder):
                raise
            return self.replace(now, change)

    def end(self, at: Revision, change: Mapping[str, Any]) -> VideoJob:
        """Ends the job with these fields; it leaves the queue and will expire.

        Raises:
            JobConflict, JobNotFound: as `replace_held`.
        """
        job, folder, now = at.job, layout.owner_folder(at.job.owner), self.now()
        ends: dict[str, Any] = {
            **QUEUED,
            "progress": job.progress,
            "started_at": job.started_at,
            "completed_at": now,
            "expires_at": now + self._job_ttl_s,
            "not_before": 0.0,
            **change,
        }
        self.write_entry(layout.expiring_entry_uri(self.prefix, folder, job.id, expires_at=ends["expires_at"]))
        if job.webhook_url is not None:
            ends["webhook_state"] = "pending"
            self.write_entry(layout.webhook_entry_uri(self.prefix, folder, job.id))
        ended = self.replace_held(at, ends).job
        storage.delete(layout.queue_entry_uri(self.prefix, folder, job.id, priority=job.priority))
        _log.info("%s %s%s", ended.id, ended.status, f" ({ended.error.code})" if ended.error else "")
        return ended

    def remove(self, folder: str, job: VideoJob) -> None:
        """Removes a job and all that belongs to it; the document first, so that none tells of files that are gone."""
        storage.delete(self._uri(job))
        record = layout.record_uri(self.prefix, folder, job.record)
        if read_record(record).get("id") == job.id:
            storage.delete(record)
        self.remove_files(job.id)
        storage.delete(layout.queue_entry_uri(self.prefix, folder, job.id, priority=job.priority))
        storage.delete(layout.webhook_entry_uri(self.prefix, folder, job.id))
        if job.expires_at is not None:
            storage.delete(layout.expiring_entry_uri(self.prefix, folder, job.id, expires_at=job.expires_at))

    def remove_files(self, job_id: str) -> None:
        """Removes what came with a job and what its attempts made."""
        for folder in (layout.inputs_uri(self.prefix, job_id), layout.content_uri(self.prefix, job_id)):
            for found in storage.list_objects(folder):
                storage.delete(found.uri)

    def entries(self, uri: str) -> Iterator[Entry]:
        """The entries of an index, in its order."""
        for found in storage.list_objects(uri):
            if (entry := layout.entry_of(found)) is not None:
                yield entry

    def write_entry(self, uri: str) -> None:
        """Puts an entry into an index, if it is not there."""
        storage.create_bytes(uri, b"")

    def _uri(self, job: VideoJob) -> str:
        return layout.document_uri(self.prefix, layout.owner_folder(job.owner), job.id)


def read_record(uri: str) -> dict[str, Any]:
    """What the record of a request says; nothing where there is none."""
    try:
        record = json.loads(storage.read_bytes(uri, max_bytes=MAX_DOCUMENT_BYTES))
    except StorageNotFound:
        return {}
    except ValueError:
        raise StorageError(f"{uri} is damaged: it is no JSON") from None
    return record if isinstance(record, dict) else {}


def _written(job: VideoJob) -> bytes:
    return job.model_dump_json().encode()
