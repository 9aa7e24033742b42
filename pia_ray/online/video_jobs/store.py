"""What the owners of video jobs do with them: create once, look, list, cancel, delete."""

from __future__ import annotations

import hashlib
import json
import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, Literal

from pia_ray import storage
from pia_ray.config.knobs import REFERENCE_KNOBS
from pia_ray.errors import BadParameter, Busy, ConfigError, JobConflict, JobNotFound
from pia_ray.online.public_errors import PublicError
from pia_ray.online.rendering.renderer import BATCH_LINE, VIDEO_JOB, RenderRequest
from pia_ray.online.video_jobs import layout
from pia_ray.online.video_jobs.document import CANCELLED, Page, VideoJob
from pia_ray.online.video_jobs.documents import ABANDONED_S, Documents, read_record
from pia_ray.online.video_jobs.queue import JobQueue
from pia_ray.online.video_jobs.webhook_outbox import Outbox

LEASE_S: Final = 20.0
"""A dispatcher that has not renewed its claim for so long is taken for dead."""
RETRY_WINDOW_S: Final = 900.0
"""A client's own retry of an equal request gets the first try's job for so long; the openai client waits 600 s for an
answer."""
_SWAPS: Final = 20
_READERS: Final = 8

_log = logging.getLogger(__name__)


class JobStore:
    """The video jobs below a storage prefix; safe in threads and in any number of processes. Its calls block."""

    def __init__(self, prefix: str, *, job_ttl_s: float = 86_400.0, lease_s: float = LEASE_S) -> None:
        self._documents = Documents(prefix, job_ttl_s=job_ttl_s, lease_s=lease_s)
        self.queue = JobQueue(self._documents)
        """What dispatchers do."""
        self.outbox = Outbox(self._documents)
        """What becomes of webhooks."""
        self._prefix = prefix
        self._lock = threading.Lock()
        self._last_us = 0

    def check(self) -> None:
        """Tries the storage, once, at the start, and clears temporary files of dead writers away.

        Raises:
            OutputError: it cannot be written.
            ConfigError: it has no conditional writes.
        """
        storage.probe(self._prefix)
        if not storage.conditional_writes(self._prefix):
            raise ConfigError(f"video jobs need a store with conditional writes (If-Match); {self._prefix} has none")
        storage.sweep(self._prefix)

    def now(self) -> float:
        """Seconds since 1970 by the store's clock, as in a job's times."""
        return self._documents.now()

    def create(
        self,
        request: RenderRequest,
        *,
        owner: str,
        model: str,
        seconds: str,
        size: str,
        webhook_url: str | None = None,
        batch_id: str | None = None,
        remixed_from_video_id: str | None = None,
        idempotency_key: str | None = None,
        retry_count: int = 0,
        max_open: int | None = None,
    ) -> VideoJob:
        """A new queued job, or the one that this request has made already. `request.id` is not used.

        One `idempotency_key` makes one job per owner. Without one, a client's own retry (`retry_count` above 0, as it
        tells in x-stainless-retry-count) gets the latest job that an equal request made within RETRY_WINDOW_S. A
        client that retries while it also repeats the request on purpose may get the other's job: it wants a key.

        Raises:
            JobConflict: the key was used for another request.
            BadParameter: a file is for no knob.
            Busy: the owner has `max_open` jobs that have not ended.
            StorageError: the store failed; the same call may be made again.
        """
        if unknown := request.inputs.keys() - set(REFERENCE_KNOBS):
            raise BadParameter(f"no knob takes a file as {min(unknown)}", min(unknown))
        folder, now = layout.owner_folder(owner), self.now()
        body_sha256 = _body_digest(request, [model, seconds, size, webhook_url, batch_id, remixed_from_video_id])
        job_id = layout.new_id(self._tick_us(now))
        record = layout.record_name(body_sha256, idempotency_key)
        record_uri = layout.record_uri(self._prefix, folder, record)
        if idempotency_key is not None:
            job_id = _id_of_key(record_uri, job_id, body_sha256)
        else:
            job_id = _id_of_body(record_uri, job_id, now=now, is_retry=retry_count > 0)
        # From here on every step may have been done by an earlier try, or be done by another one at the same time.
        try:
            return self.get(owner, job_id)
        except JobNotFound:
            pass
        if max_open is not None and self.num_open(owner) >= max_open:
            raise Busy(f"{max_open} of your videos are queued or in progress, which is the most", 10.0)
        inputs_uri = layout.inputs_uri(self._prefix, job_id)
        job = VideoJob(
            id=job_id,
            owner=owner,
            created_at=now,
            model=model,
            prompt=request.params.prompt,
            seconds=seconds,
            size=size,
            params=request.params,
            format=request.format,
            inputs={name: storage.join(inputs_uri, name) for name in ("image", *request.inputs)},
            remixed_from_video_id=remixed_from_video_id,
            batch_id=batch_id,
            priority=max(request.priority, VIDEO_JOB),
            record=record,
            webhook_url=webhook_url,
        )
        self._documents.write_entry(layout.queue_entry_uri(self._prefix, folder, job_id, priority=job.priority))
        for name, content in {"image": request.image, **request.inputs}.items():
            storage.write_bytes(job.inputs[name], content)
        if not self._documents.create(job):
            return self.get(owner, job_id)
        _log.info("%s queued for %s", job.id, job.owner)
        return job

    def get(self, owner: str, job_id: str) -> VideoJob:
        """The job.

        Raises:
            JobNotFound: there is none of that id, or it is another owner's.
        """
        return self._documents.read(layout.owner_folder(owner), job_id).job

    def list(
        self, owner: str, *, after: str | None = None, limit: int = 20, order: Literal["asc", "desc"] = "desc"
    ) -> Page:
        """An owner's jobs by creation, the newest or the oldest first; `after` is the last one of the page before.

        Raises:
            JobNotFound: `after` is no id. One that was deleted meanwhile still says where to go on.
        """
        if after is not None:
            layout.checked_id(after)
        found = storage.list_objects(layout.documents_uri(self._prefix, layout.owner_folder(owner)), suffix=".json")
        ids = [stat.uri.rpartition("/")[2].removesuffix(".json") for stat in found]
        if order == "desc":
            ids.reverse()
        if after is not None:
            ids = [one for one in ids if (one > after if order == "asc" else one < after)]

        def read(job_id: str) -> VideoJob | None:
            try:
                return self.get(owner, job_id)
            except JobNotFound:  # deleted since the listing
                return None

        with ThreadPoolExecutor(_READERS) as readers:
            jobs = tuple(job for job in readers.map(read, ids[:limit]) if job is not None)
        return Page(jobs=jobs, has_more=len(ids) > limit)

    def cancel(self, owner: str, job_id: str) -> VideoJob:
        """The job, failed with the code `cancelled`; whoever renders it hears of it at its next heartbeat.

        Raises:
            JobConflict: it has completed or failed already.
            JobNotFound: as `get`.
        """
        error = PublicError(code=CANCELLED, message="The video job was cancelled.", retryable=True)
        for _ in range(_SWAPS):
            now = self._documents.read(layout.owner_folder(owner), job_id)
            if now.job.cancelled:
                return now.job
            if now.job.ended:
                raise JobConflict(f"the video has {now.job.status} already")
            try:
                return self._documents.end(now, {"status": "failed", "error": error})
            except JobConflict:
                continue
        raise JobConflict("the video job changes too fast; try again")

    def delete(self, owner: str, job_id: str) -> None:
        """Removes the job and all that belongs to it, whatever its status; one at work stops at the next heartbeat.

        Raises:
            JobNotFound: as `get`.
        """
        folder = layout.owner_folder(owner)
        job = self._documents.read(folder, job_id).job
        if job.lease_owner is not None:
            # Its dispatcher may still write files: the sweep looks once more when that is over.
            late = self.now() + ABANDONED_S
            self._documents.write_entry(layout.expiring_entry_uri(self._prefix, folder, job.id, expires_at=late))
        self._documents.remove(folder, job)

    def request(self, job: VideoJob, *, deadline_s: float | None = None) -> RenderRequest:
        """What an engine is asked for this job, with the files that came with it.

        Raises:
            StorageError: they cannot be read.
        """
        files = {name: storage.read_bytes(uri) for name, uri in job.inputs.items()}
        return RenderRequest(
            id=job.id,
            params=job.params,
            image=files.pop("image"),
            inputs=files,
            format=job.format,
            deadline_s=deadline_s,
            priority=job.priority,
        )

    def num_open(self, owner: str) -> int:
        """Jobs of this owner that have not ended; lines of batches do not count, which go after all others."""
        folder = layout.owner_folder(owner)
        return sum(entry.owner_folder == folder and entry.rank < BATCH_LINE for entry in self.queue.entries())

    def position(self, job: VideoJob) -> int:
        """Open jobs of all owners that go before this one; 0 for the next one and for one that has ended."""
        if job.ended:
            return 0
        mine = (job.priority, job.id)
        return sum((entry.rank, entry.id) < mine for entry in self.queue.entries())

    def sweep(self) -> int:
        """Removes the jobs that have expired, and what broken-off requests left; how many jobs."""
        now, removed = self.now(), 0
        for entry in self._documents.entries(layout.expiring_uri(self._prefix)):
            if entry.rank > now:
                break
            try:
                job = self._documents.read(entry.owner_folder, entry.id).job
            except JobNotFound:
                self._documents.remove_files(entry.id)
                storage.delete(entry.uri)
                continue
            if job.expires_at is not None and job.expires_at <= now:
                self._documents.remove(entry.owner_folder, job)
                removed += 1
            elif job.ended:  # left by a worker that came too late to end it
                storage.delete(entry.uri)
        return removed

    def _tick_us(self, now: float) -> int:
        """Microseconds since 1970, each later than the last, so that ids of one process sort as they were made."""
        with self._lock:
            self._last_us = max(int(now * 1e6), self._last_us + 1)
            return self._last_us


def _id_of_key(record_uri: str, new_id: str, body_sha256: str) -> str:
    """The id that goes with an idempotency key: the new one, if the key is new."""
    record = json.dumps({"id": new_id, "body_sha256": body_sha256}).encode()
    for _ in range(_SWAPS):
        if storage.create_bytes(record_uri, record, content_type="application/json"):
            return new_id
        found = read_record(record_uri)
        if not found:  # its job was deleted just now
            continue
        if found["body_sha256"] != body_sha256:
            raise JobConflict("this Idempotency-Key was used for another request; take a new key for a new request")
        return str(found["id"])
    raise JobConflict("this Idempotency-Key is in use; try again")


def _id_of_body(record_uri: str, new_id: str, *, now: float, is_retry: bool) -> str:
    """The id for a request without a key: the new one, but for a client's own retry that of the first try."""
    if is_retry:
        found = read_record(record_uri)
        if found and now - float(found["at"]) <= RETRY_WINDOW_S:
            return str(found["id"])
    record = json.dumps({"id": new_id, "at": now}).encode()
    storage.write_bytes(record_uri, record, content_type="application/json")
    return new_id


def _body_digest(request: RenderRequest, more: Any) -> str:
    files = {"image": request.image, **request.inputs}
    parts = {
        "params": request.params.model_dump(mode="json", exclude_unset=True),
        "format": request.format,
        "files": {name: hashlib.sha256(content).hexdigest() for name, content in files.items()},
        "more": more,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
