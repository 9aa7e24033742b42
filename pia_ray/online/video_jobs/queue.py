"""The queue of video jobs for dispatchers: read, claimed, kept by heartbeats, ended."""

from __future__ import annotations

import hashlib

from pia_ray import storage
from pia_ray.errors import JobConflict, JobNotFound, PiaRayError
from pia_ray.media import video
from pia_ray.online.documents.document import IndexEntry, Revision
from pia_ray.online.public_errors import public_error
from pia_ray.online.rendering.renderer import Rendered
from pia_ray.online.video_jobs.document import QUEUE, VideoJob, VideoResult
from pia_ray.online.video_jobs.documents import QUEUED, JobDocuments


class JobQueue:
    """The open jobs of all owners. Of several workers that want a job one gets it, and one ends it."""

    def __init__(self, documents: JobDocuments) -> None:
        self._documents = documents

    @property
    def lease_s(self) -> float:
        """A claim that was not renewed for so long may be taken over."""
        return self._documents.lease_s

    def entries(self, limit: int | None = None) -> tuple[IndexEntry, ...]:
        """The first `limit` jobs that have not ended, or all, by priority and then by age."""
        return self._documents.store.entries(QUEUE, limit)

    def read(self, entry: IndexEntry) -> Revision[VideoJob]:
        """The job of an entry. An entry whose job has ended is removed.

        Raises:
            JobNotFound: there is no such job, or not yet.
        """
        now = self._documents.store.read_entry(entry)
        if now.document.ended:
            storage.delete(entry.uri)
        return now

    def claim(self, at: Revision[VideoJob], *, worker: str) -> Revision[VideoJob]:
        """The job in this worker's hands until its lease runs out; one more attempt is counted.

        Raises:
            JobConflict: it is not to be had (any more).
        """
        if at.document.claimable_at > self._documents.store.now():
            raise JobConflict(f"{at.document.id} is in other hands, or has ended")
        change = {**QUEUED, **self._documents.lease(worker), "attempt": at.document.attempt + 1}
        return self._documents.store.replace(at, change)

    def heartbeat(
        self, at: Revision[VideoJob], *, progress: int | None = None, eta_s: float | None = None
    ) -> Revision[VideoJob]:
        """Renews the lease. With a `progress`, in percent, the job is in progress, and done in about `eta_s`.

        Raises:
            JobConflict: it was cancelled, or another worker has taken it over.
            JobNotFound: it was deleted.
        """
        now = self._documents.store.now()
        change: dict[str, object] = {"lease_until": now + self.lease_s}
        if progress is not None:
            change |= {"status": "in_progress", "progress": max(0, min(progress, 99))}
            change |= {"started_at": at.document.started_at or now, "eta_at": None if eta_s is None else now + eta_s}
        return self._documents.replace_held(at, change)

    def store(self, at: Revision[VideoJob], rendered: Rendered) -> VideoResult:
        """Stores the video and its pictures, where no other attempt of any worker does."""
        folder = self._attempt_uri(at)
        result = VideoResult(
            **dict(rendered.video),
            video_uri=storage.join(folder, f"video.{rendered.format}"),
            thumbnail_uri=storage.join(folder, "thumbnail.webp"),
            spritesheet_uri=storage.join(folder, "spritesheet.webp"),
        )
        storage.write_bytes(result.thumbnail_uri, rendered.thumbnail, content_type="image/webp")
        storage.write_bytes(result.spritesheet_uri, rendered.spritesheet, content_type="image/webp")
        storage.write_bytes(result.video_uri, rendered.content, content_type=video.MIME[rendered.format])
        return result

    def complete(self, at: Revision[VideoJob], result: VideoResult) -> VideoJob:
        """Ends the job with what `store` has stored.

        Raises:
            JobConflict, JobNotFound: as `heartbeat`; the files are removed again.
        """
        change = {
            "status": "completed",
            "progress": 100,
            "result": result,
            "seconds": f"{result.num_frames / result.fps:g}",
            "size": f"{result.width}x{result.height}",
        }
        try:
            return self._documents.end_held(at, change)
        except (JobConflict, JobNotFound):
            self.discard(at)
            raise

    def discard(self, at: Revision[VideoJob]) -> None:
        """Removes what `store` stored for this attempt."""
        for found in storage.list_objects(self._attempt_uri(at)):
            storage.delete(found.uri)

    def fail(self, at: Revision[VideoJob], error: PiaRayError) -> VideoJob:
        """Ends the job with what its owner may know of the error.

        Raises:
            JobConflict, JobNotFound: as `heartbeat`.
        """
        return self._documents.end_held(at, {"status": "failed", "error": public_error(error)})

    def give_back(self, at: Revision[VideoJob], *, delay_s: float = 0.0) -> None:
        """Lets any worker claim it after that time; the attempt does not count.

        Raises:
            JobConflict, JobNotFound: as `heartbeat`.
        """
        self._documents.replace_held(
            at, {**QUEUED, "attempt": at.document.attempt - 1, "not_before": self._not_before(delay_s)}
        )

    def postpone(self, at: Revision[VideoJob], *, delay_s: float) -> None:
        """Lets anyone try it once more after that time; the attempt counts.

        Raises:
            JobConflict, JobNotFound: as `heartbeat`.
        """
        self._documents.replace_held(at, {**QUEUED, "not_before": self._not_before(delay_s)})

    def _not_before(self, delay_s: float) -> float:
        return self._documents.store.now() + delay_s if delay_s else 0.0

    def _attempt_uri(self, at: Revision[VideoJob]) -> str:
        attempt = hashlib.sha256(f"{at.document.lease_owner}/{at.document.attempt}".encode()).hexdigest()[:16]
        return storage.join(self._documents.content_uri(at.document.id), f"{at.document.attempt}-{attempt}")
