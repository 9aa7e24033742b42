"""The queue of video jobs for dispatchers: read, claimed, kept by heartbeats, ended."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Sequence
from typing import Final

from cachetools import LRUCache

from pia_ray import storage
from pia_ray.errors import JobConflict, JobNotFound, PiaRayError
from pia_ray.media import video
from pia_ray.media.finish.posters import MIME as POSTER_MIME
from pia_ray.online.documents.document import IndexEntry, Revision
from pia_ray.online.public_errors import public_error
from pia_ray.online.rendering.renderer import BATCH_LINE, VIDEO_JOB, Rendered
from pia_ray.online.requests.aliases import seconds_text, size_text
from pia_ray.online.video_jobs.document import QUEUE, VideoJob, VideoResult
from pia_ray.online.video_jobs.documents import QUEUED, JobDocuments

EXPIRES_SOON_S: Final = 60.0
"""A job that expires within this time is not queued again, because a sweep may be deleting it."""

MOST_OF_OWNER: Final = 128
"""Open jobs of one owner that are read in a long queue: all lines of its batches that may be open."""
_MOST_MADE: Final = 1000


class JobQueue:
    """The open jobs of all owners. Of several workers one claims a job, and one ends it."""

    def __init__(self, documents: JobDocuments) -> None:
        self._documents = documents
        self._lock = threading.Lock()
        self._made: LRUCache[str, Revision[VideoJob]] = LRUCache(_MOST_MADE)
        self._has_earlier = True
        """Whether there may be entries of 0.1.0, which lie in no folder of an owner."""

    @property
    def lease_s(self) -> float:
        """Seconds without a renewal after which another worker may claim the job."""
        return self._documents.lease_s

    def entries(self, limit: int | None = None) -> tuple[IndexEntry, ...]:
        """The jobs that have not ended, by priority and then by age; with a `limit` so many of some owners."""
        return self._documents.store.entries(QUEUE, limit)

    def heads(self, in_turn: Callable[[Sequence[str]], Sequence[str]], *, num_owners: int) -> tuple[IndexEntry, ...]:
        """The oldest open jobs of the owners that come first in turn, of a queue that is too long to be read.

        Jobs of a lower priority are among them only where no owner is left out of a higher one.
        """
        ranks, earlier = self._documents.store.ranks(QUEUE)
        found = list(earlier)
        for rank in ranks:
            owners = in_turn(self._documents.store.owner_folders(QUEUE, rank))
            for owner in owners[:num_owners]:
                found += self._documents.store.entries_of(QUEUE, owner, rank, limit=MOST_OF_OWNER)
            if len(owners) > num_owners:
                break
        return tuple(sorted(found, key=lambda entry: (entry.rank, entry.id)))

    def num_open(self, owner: str, *, most: int) -> int:
        """Number of the owner's jobs that have not ended, without those of batches; at most `most`."""
        folder, store = self._documents.store.owner_folder(owner), self._documents.store
        num = sum(len(store.entries_of(QUEUE, folder, rank, limit=most)) for rank in range(VIDEO_JOB, BATCH_LINE))
        if self._has_earlier:
            earlier = store.ranks(QUEUE)[1]
            self._has_earlier = bool(earlier)
            num += sum(entry.owner_folder == folder and entry.rank < BATCH_LINE for entry in earlier)
        return min(num, most)

    def remember(self, made: Revision[VideoJob]) -> None:
        """Keeps a job that this process has made, for `made`."""
        with self._lock:
            self._made[made.document.id] = made

    def forget(self, job_id: str) -> None:
        """Drops a job that `remember` has kept, because nobody will claim it."""
        with self._lock:
            self._made.pop(job_id, None)

    def made(self, entry: IndexEntry) -> Revision[VideoJob] | None:
        """The job of an entry as this process made it, once; a claim is refused where it has changed since."""
        with self._lock:
            return self._made.pop(entry.id, None)

    def read(self, entry: IndexEntry) -> Revision[VideoJob]:
        """The job of an entry. An entry whose job has ended is removed, unless the job is queued again meanwhile.

        Raises:
            JobNotFound: there is no such job, or not yet.
        """
        now = self._documents.store.read_entry(entry)
        if now.document.ended:
            self._documents.store.delete_entry(entry)
            now = self._documents.store.read_entry(entry)
            if not now.document.ended:  # `retry` wrote its document between the two reads
                self._documents.store.add_entry(QUEUE, now.document)
        return now

    def retry(self, at: Revision[VideoJob]) -> VideoJob:
        """The failed job, queued again under its id with all its attempts, for an operator.

        Raises:
            JobConflict: it has not failed, cannot be rendered again, or was changed since `at`.
        """
        job = at.document
        self._check_retry(job)
        change = {
            **QUEUED,
            "completed_at": None,
            "expires_at": None,
            "error": None,
            "attempt": 0,
            "retries": job.retries + 1,
            "not_before": 0.0,
            "webhook_state": "none",
            "webhook_attempts": 0,
        }
        queued = self._documents.store.replace(at, change).document
        # A worker that read the job before this change may have removed the entry as one of an ended job.
        self._documents.store.add_entry(QUEUE, queued)
        return queued

    def _check_retry(self, job: VideoJob) -> None:
        if job.status != "failed":
            raise JobConflict(f"{job.id} is {job.status}: only a failed job can be tried again")
        if job.cancelled:
            raise JobConflict(f"{job.id} was cancelled: only a job that failed by itself can be tried again")
        if job.batch_id is not None:
            raise JobConflict(f"{job.id} is a line of {job.batch_id}, which has its result: send the line again")
        if job.expires_at is not None and job.expires_at - self._documents.store.now() < EXPIRES_SOON_S:
            raise JobConflict(f"{job.id} is about to be deleted, because it has expired")
        if missing := sorted(name for name, uri in job.inputs.items() if not storage.exists(uri)):
            raise JobConflict(f"{job.id} cannot be tried again: its {', '.join(missing)} is no longer stored")

    def claim(self, at: Revision[VideoJob], *, worker: str) -> Revision[VideoJob]:
        """The job, claimed for this worker until its lease runs out; one more attempt is counted.

        Raises:
            JobConflict: it cannot be claimed now, or was changed since `at`.
        """
        if at.document.claimable_at > self._documents.store.now():
            raise JobConflict(f"{at.document.id} has ended, or another worker has claimed it")
        change = {**QUEUED, **self._documents.lease(worker), "attempt": at.document.attempt + 1}
        return self._documents.store.replace(at, change)

    def heartbeat(
        self, at: Revision[VideoJob], *, progress: int | None = None, eta_s: float | None = None
    ) -> Revision[VideoJob]:
        """The job with its lease renewed. With a `progress`, in percent, it is in progress, and done in about `eta_s`.

        Raises:
            JobConflict: it was cancelled, or another worker has claimed it.
            JobNotFound: it was deleted.
        """
        now = self._documents.store.now()
        change: dict[str, object] = {"lease_until": now + self.lease_s}
        if progress is not None:
            change |= {"status": "in_progress", "progress": max(0, min(progress, 99))}
            change |= {"started_at": at.document.started_at or now, "eta_at": None if eta_s is None else now + eta_s}
        return self._documents.replace_held(at, change)

    def store(self, at: Revision[VideoJob], rendered: Rendered) -> VideoResult:
        """The stored video and its pictures, at URIs of this attempt of this worker."""
        folder = self._attempt_uri(at)
        result = VideoResult(
            **dict(rendered.video),
            video_uri=storage.join(folder, f"video.{rendered.format}"),
            thumbnail_uri=storage.join(folder, "thumbnail.webp"),
            spritesheet_uri=storage.join(folder, "spritesheet.webp"),
            poster_uri=None
            if rendered.poster is None
            else storage.join(folder, f"poster.{rendered.video.params.poster}"),
        )
        storage.write_bytes(result.thumbnail_uri, rendered.thumbnail, content_type="image/webp")
        storage.write_bytes(result.spritesheet_uri, rendered.spritesheet, content_type="image/webp")
        if result.poster_uri is not None and rendered.poster is not None:
            kind = POSTER_MIME[rendered.video.params.poster]
            storage.write_bytes(result.poster_uri, rendered.poster, content_type=kind)
        storage.write_bytes(result.video_uri, rendered.content, content_type=video.MIME[rendered.format])
        return result

    def complete(self, at: Revision[VideoJob], result: VideoResult) -> VideoJob:
        """The completed job, with the result of `store`.

        Raises:
            JobConflict, JobNotFound: as `heartbeat`; the files are removed again.
        """
        change = {
            "status": "completed",
            "progress": 100,
            "result": result,
            "seconds": seconds_text(result.num_frames, result.fps),
            "size": size_text(result.width, result.height),
        }
        try:
            return self._documents.end_held(at, change)
        except (JobConflict, JobNotFound):
            self.discard(at)
            raise

    def discard(self, at: Revision[VideoJob]) -> None:
        """Removes the files of this attempt."""
        for found in storage.list_objects(self._attempt_uri(at)):
            storage.delete(found.uri)

    def fail(self, at: Revision[VideoJob], error: PiaRayError) -> VideoJob:
        """The failed job, with what its owner may know of the error.

        Raises:
            JobConflict, JobNotFound: as `heartbeat`.
        """
        return self._documents.end_held(at, {"status": "failed", "error": public_error(error)})

    def give_back(self, at: Revision[VideoJob], *, delay_s: float = 0.0) -> None:
        """Frees the job for every worker after that time; the attempt does not count.

        Raises:
            JobConflict, JobNotFound: as `heartbeat`.
        """
        self._documents.replace_held(
            at, {**QUEUED, "attempt": at.document.attempt - 1, "not_before": self._not_before(delay_s)}
        )

    def postpone(self, at: Revision[VideoJob], *, delay_s: float) -> None:
        """Frees the job for every worker after that time; the attempt counts.

        Raises:
            JobConflict, JobNotFound: as `heartbeat`.
        """
        self._documents.replace_held(at, {**QUEUED, "not_before": self._not_before(delay_s)})

    def _not_before(self, delay_s: float) -> float:
        return self._documents.store.now() + delay_s if delay_s else 0.0

    def _attempt_uri(self, at: Revision[VideoJob]) -> str:
        attempt = hashlib.sha256(f"{at.document.lease_owner}/{at.document.attempt}".encode()).hexdigest()[:16]
        return storage.join(self._documents.content_uri(at.document.id), f"{at.document.attempt}-{attempt}")
