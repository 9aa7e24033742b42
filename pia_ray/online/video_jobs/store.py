"""The video jobs of their owners: created once, read, listed, cancelled, deleted."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from typing import Any, Final

from cachetools import LRUCache

from pia_ray import storage
from pia_ray.config.knobs import REFERENCE_KNOBS
from pia_ray.errors import BadParameter, Busy, Cancelled, ConfigError, JobConflict, JobNotFound
from pia_ray.online.documents.document import Order, Page
from pia_ray.online.documents.store import ABANDONED_S
from pia_ray.online.public_errors import public_error
from pia_ray.online.rendering.renderer import BATCH_LINE, VIDEO_JOB, RenderRequest
from pia_ray.online.video_jobs.document import END_EVENTS, QUEUE, VideoJob, WebhookEvent
from pia_ray.online.video_jobs.documents import JobDocuments
from pia_ray.online.video_jobs.overview import JobOverview
from pia_ray.online.video_jobs.queue import JobQueue
from pia_ray.online.video_jobs.request_records import RequestRecords, body_digest, record_name
from pia_ray.online.video_jobs.webhook_outbox import WebhookOutbox

LEASE_S: Final = 20.0
"""Seconds without a renewal after which a claim is void, because its dispatcher is dead."""

MOST_OPEN: Final = 1000
"""Open jobs of an owner that are counted."""

KEPT_BYTES: Final = 64 * 2**20
"""Memory for the files of new jobs, which a dispatcher of this process then does not read from storage."""

_log = logging.getLogger(__name__)


class JobStore:
    """The video jobs below a storage prefix; safe in threads and in any number of processes. Its calls block."""

    def __init__(
        self,
        prefix: str,
        *,
        job_ttl_s: float = 86_400.0,
        failed_job_ttl_s: float | None = None,
        lease_s: float = LEASE_S,
    ) -> None:
        """`failed_job_ttl_s` is `job_ttl_s` if left out."""
        self._job_documents = JobDocuments(
            prefix, job_ttl_s=job_ttl_s, failed_job_ttl_s=failed_job_ttl_s, lease_s=lease_s
        )
        self._documents = self._job_documents.store
        self._records = RequestRecords(prefix)
        self.queue = JobQueue(self._job_documents)
        """The jobs that have not ended, for dispatchers."""
        self.outbox = WebhookOutbox(self._job_documents)
        """The webhooks that are not delivered."""
        self.overview = JobOverview(self._job_documents, self.queue)
        """The jobs of all owners, for an operator."""
        self._prefix = prefix
        self._lock = threading.Lock()
        self._inputs: LRUCache[str, Mapping[str, bytes]] = LRUCache(KEPT_BYTES, getsizeof=_size_of)
        """Files of jobs that this process has made and nobody here has rendered yet."""

    def check(self) -> None:
        """Checks the storage, once, at the start, and removes temporary files of dead writers.

        Raises:
            OutputError: it cannot be written.
            ConfigError: it has no conditional writes.
        """
        storage.probe(self._prefix)
        if not (storage.conditional_writes(self._prefix) and storage.compares_etags(self._prefix)):
            raise ConfigError(f"video jobs need a store with conditional writes (If-Match); {self._prefix} has none")
        storage.sweep(self._prefix)

    def now(self) -> float:
        """Seconds since 1970 by the store's clock, as in a job's times."""
        return self._documents.now()

    def owner_folder(self, owner: str) -> str:
        """The name of an owner in the entries of the queue."""
        return self._documents.owner_folder(owner)

    def create(
        self,
        request: RenderRequest,
        *,
        owner: str,
        model: str,
        seconds: str,
        size: str,
        webhook_url: str | None = None,
        webhook_events: tuple[WebhookEvent, ...] = END_EVENTS,
        batch_id: str | None = None,
        job_id: str | None = None,
        remixed_from_video_id: str | None = None,
        idempotency_key: str | None = None,
        retry_count: int = 0,
        max_open: int | None = None,
        open_s: float = 10.0,
    ) -> VideoJob:
        """A new queued job, or the one that the same request has made before. `request.id` is not used.

        With a `job_id` the job gets that id, or is the one that has it. One `idempotency_key` makes one job per owner.
        Without a key, a client's own retry (`retry_count`, from its header x-stainless-retry-count, is above 0) gets
        the latest job of an equal request within RETRY_WINDOW_S. A client that also repeats the request on purpose
        needs a key.

        Raises:
            JobConflict: the key was used for another request.
            BadParameter: a file does not belong to a knob.
            Busy: the owner has `max_open` jobs that have not ended, one of which will have in about `open_s`.
            StorageError: the store failed; the call may be repeated.
        """
        if unknown := request.inputs.keys() - set(REFERENCE_KNOBS):
            raise BadParameter(f"{min(unknown)} is not a knob that takes a file", min(unknown))
        now, record = self.now(), ""
        if job_id is None:
            more = [model, seconds, size, webhook_url, batch_id, remixed_from_video_id]
            more += [] if webhook_events == END_EVENTS else webhook_events
            digest, is_retry = body_digest(request, more), retry_count > 0
            job_id, record, is_new = self._recorded_id(
                owner, digest, idempotency_key=idempotency_key, is_retry=is_retry
            )
            # Every further step may have been made by an earlier call, or be made by another one at the same time.
            if not is_new:
                with suppress(JobNotFound):
                    return self.get(owner, job_id)
        if max_open is not None and self.queue.num_open(owner, most=max_open) >= max_open:
            raise Busy(f"{max_open} of your videos are queued or in progress, which is the most", open_s)
        files, inputs_uri = {"image": request.image, **request.inputs}, self._job_documents.inputs_uri(job_id)
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
            inputs={name: storage.join(inputs_uri, name) for name in files},
            remixed_from_video_id=remixed_from_video_id,
            batch_id=batch_id,
            priority=max(request.priority, VIDEO_JOB),
            policy=request.policy,
            record=record,
            webhook_url=webhook_url,
            webhook_events=webhook_events,
        )
        return self._queued(job, files)

    def get(self, owner: str, job_id: str) -> VideoJob:
        """The job.

        Raises:
            JobNotFound: there is no job of that id, or it belongs to another owner.
        """
        return self._documents.read(owner, job_id).document

    def list(self, owner: str, *, after: str | None = None, limit: int = 20, order: Order = "desc") -> Page[VideoJob]:
        """An owner's jobs by creation, the newest or the oldest first; `after` is the last one of the page before.

        Raises:
            JobNotFound: `after` is not an id. One that was deleted meanwhile still says where to go on.
        """
        return self._documents.list(owner, after=after, limit=limit, order=order)

    def cancel(self, owner: str, job_id: str) -> VideoJob:
        """The job, failed with the code `cancelled`; its dispatcher stops the work at the next heartbeat.

        Raises:
            JobConflict: it has completed or failed already.
            JobNotFound: as `get`.
        """
        error = public_error(Cancelled("The video job was cancelled."))

        def stop(job: VideoJob) -> dict[str, Any]:
            if job.cancelled:
                return {}
            if job.ended:
                raise JobConflict(f"the video has {job.status} already")
            return self._job_documents.end(job, {"status": "failed", "cancelled": True, "error": error})

        cancelled = self._documents.change(owner, job_id, stop)
        self._forget(job_id)
        return cancelled

    def delete(self, owner: str, job_id: str) -> None:
        """Removes the job with its files, in any status; its dispatcher stops the work at the next heartbeat.

        Raises:
            JobNotFound: as `get`.
        """
        job = self.get(owner, job_id)
        self._remove_record(job)  # first, because nothing else leads to it
        # Its dispatcher may write files until it sees that the job is gone.
        self._documents.delete(job, late_s=0.0 if job.lease_owner is None else ABANDONED_S)
        self._forget(job_id)

    def find(self, job_id: str) -> VideoJob:
        """The job of that id, whoever its owner is, for an operator.

        Raises:
            JobNotFound: there is none.
        """
        return self._documents.find(job_id).document

    def each(self, *, owner: str | None = None, created_before: float = math.inf) -> Iterator[VideoJob]:
        """The jobs of one owner or of all, the newest first, for an operator."""
        for found in self._documents.each(owner=owner, created_before=created_before):
            yield found.document

    def retry(self, job_id: str) -> VideoJob:
        """The failed job, queued again under its id, for an operator.

        Raises:
            JobConflict: it has not failed, or cannot be rendered again.
            JobNotFound: as `find`.
        """
        queued = self.queue.retry(self._documents.find(job_id))
        _log.info("%s queued again", queued.id)
        return queued

    def purge(self, job: VideoJob) -> None:
        """Removes an ended job before it expires. It expires first, so that nobody can queue it again meanwhile.

        Raises:
            JobConflict: it has not ended.
            JobNotFound: as `get`.
        """
        now = self.now()

        def expire(found: VideoJob) -> dict[str, Any]:
            if not found.ended:
                raise JobConflict(f"{found.id} is {found.status}: only a job that has ended can be purged")
            return {"expires_at": min(now, found.expires_at or now)}

        self._documents.change(job.owner, job.id, expire)
        self.delete(job.owner, job.id)

    def request(self, job: VideoJob, *, deadline_s: float | None = None) -> RenderRequest:
        """The request for an engine, with the files of the job.

        Raises:
            StorageError: they cannot be read.
        """
        with self._lock:
            kept = self._inputs.pop(job.id, None)
        if kept is None or kept.keys() != job.inputs.keys():
            kept = {name: storage.read_bytes(uri) for name, uri in job.inputs.items()}
        files = dict(kept)
        return RenderRequest(
            id=job.id,
            params=job.params,
            image=files.pop("image"),
            inputs=files,
            format=job.format,
            deadline_s=deadline_s,
            priority=job.priority,
            owner=job.owner,
            policy=job.policy,
        )

    def num_open(self, owner: str) -> int:
        """Number of the owner's jobs that have not ended, without those of batches; MOST_OPEN for every greater one."""
        return self.queue.num_open(owner, most=MOST_OPEN)

    def open_lines(self, owner: str) -> Collection[str]:
        """Ids of the jobs of an owner's batches that have not ended. One more may be among them for a while."""
        folder = self._documents.owner_folder(owner)
        return {entry.id for entry in self._documents.entries_of(QUEUE, folder, BATCH_LINE, limit=MOST_OPEN)}

    def sweep(self) -> int:
        """The number of expired jobs, which are removed, as are the files of requests that broke off."""
        return self._documents.sweep(before_delete=self._remove_record)

    def _recorded_id(
        self, owner: str, body_sha256: str, *, idempotency_key: str | None, is_retry: bool
    ) -> tuple[str, str, bool]:
        """The id of a request's job, the name of the record of that, and whether the id is new."""
        folder, new_id = self._documents.owner_folder(owner), self._documents.new_id()
        record = record_name(body_sha256, idempotency_key)
        if idempotency_key is not None:
            job_id = self._records.id_of_key(folder, record, new_id=new_id, body_sha256=body_sha256)
        else:
            job_id = self._records.id_of_body(folder, record, new_id=new_id, now=self.now(), is_retry=is_retry)
        return job_id, record, job_id == new_id

    def _queued(self, job: VideoJob, files: Mapping[str, bytes]) -> VideoJob:
        """The new job, stored with its files, or the one that has its id already."""
        made = self._documents.create(job, contents={uri: files[name] for name, uri in job.inputs.items()})
        if made is None:
            return self.get(job.owner, job.id)
        self.queue.remember(made)
        with self._lock:
            self._inputs[job.id] = files
        _log.info("%s queued for %s", job.id, job.owner)
        return job

    def _forget(self, job_id: str) -> None:
        """Drops what is kept in memory for the claim of a job that nobody will claim."""
        self.queue.forget(job_id)
        with self._lock:
            self._inputs.pop(job_id, None)

    def _remove_record(self, job: VideoJob) -> None:
        if not job.record:
            return
        self._records.remove(self._documents.owner_folder(job.owner), job.record, job_id=job.id)


def _size_of(files: Mapping[str, bytes]) -> int:
    """The bytes that the files of a job count for, at most all that is kept."""
    return min(KEPT_BYTES, 1 + sum(map(len, files.values())))
