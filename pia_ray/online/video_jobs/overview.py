"""The jobs of all owners for the endpoint's operator: a bounded part of them, however many there are."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

from pia_ray.errors import JobNotFound, StorageError
from pia_ray.online.documents.document import IndexEntry
from pia_ray.online.rendering.renderer import BATCH_LINE
from pia_ray.online.video_jobs.document import FAILED, QUEUE, VideoJob
from pia_ray.online.video_jobs.documents import JobDocuments
from pia_ray.online.video_jobs.queue import JobQueue

MOST_ENTRIES: Final = 1000
"""Open jobs that are counted: as many as one listing of a store has."""

MOST_JOBS: Final = 50
"""Documents that are read of the open jobs, and of the failed ones."""

_READERS: Final = 8


@dataclass(frozen=True)
class OwnerQueue:
    """The open jobs of one owner."""

    owner: str
    """Its name in logs, or the digest in names of objects where none of its documents was read."""
    num_jobs: int
    num_lines: int
    """Jobs of batches."""


@dataclass(frozen=True)
class Overview:
    """The jobs of all owners at one moment."""

    owners: tuple[OwnerQueue, ...]
    """Those with the most open jobs first."""
    open: tuple[VideoJob, ...]
    """At least the first job of each owner, as far as `MOST_JOBS` reaches."""
    failed: tuple[VideoJob, ...]
    """Jobs that failed by themselves, the latest first."""
    has_more: bool
    """Whether there are open jobs beyond those that were counted."""


class JobOverview:
    """Reads the overview, and queues failed jobs again."""

    def __init__(self, documents: JobDocuments, queue: JobQueue) -> None:
        self._store = documents.store
        self._queue = queue

    def read(self) -> Overview:
        """The jobs now: two listings and at most 2 x `MOST_JOBS` documents are read."""
        entries = self._store.entries(QUEUE, MOST_ENTRIES + 1)
        counted = entries[:MOST_ENTRIES]
        first = {entry.owner_folder: entry for entry in reversed(counted)}
        others = [entry for entry in counted if first[entry.owner_folder] is not entry]
        found = self._documents([*first.values(), *others][:MOST_JOBS])
        return Overview(
            owners=self._owners(counted, found),
            open=tuple(sorted((job for job in found if not job.ended), key=lambda job: (job.priority, job.id))),
            failed=tuple(self._failed()),
            has_more=len(entries) > MOST_ENTRIES,
        )

    def retry(self, owner: str, job_id: str) -> VideoJob:
        """The failed job, queued again under its id.

        Raises:
            JobConflict: it has not failed, or cannot be rendered again.
            JobNotFound: the owner has no such job.
        """
        return self._queue.retry(self._store.read(owner, job_id))

    def _failed(self) -> list[VideoJob]:
        """The latest failed jobs. Entries of jobs that were queued again are removed, where their writer has died."""
        found = []
        entries = {entry.id: entry for entry in self._store.entries(FAILED, MOST_JOBS)}
        for job in self._documents(list(entries.values())):
            if job.status == "failed":
                found.append(job)
            elif not job.ended:
                self._store.mend_entry(entries[job.id], FAILED, job)
        return found

    def _owners(self, entries: Sequence[IndexEntry], jobs: Sequence[VideoJob]) -> tuple[OwnerQueue, ...]:
        names = {self._store.owner_folder(job.owner): job.owner for job in jobs}
        lines = dict.fromkeys((entry.owner_folder for entry in entries), 0)
        singles = dict(lines)
        for entry in entries:
            (lines if entry.rank >= BATCH_LINE else singles)[entry.owner_folder] += 1
        found = [OwnerQueue(names.get(owner, owner), num, lines[owner]) for owner, num in singles.items()]
        return tuple(sorted(found, key=lambda each: -(each.num_jobs + each.num_lines)))

    def _documents(self, entries: Sequence[IndexEntry]) -> list[VideoJob]:
        def read(entry: IndexEntry) -> VideoJob | None:
            try:
                return self._store.read_entry(entry).document
            except (JobNotFound, StorageError):  # deleted since the listing, or damaged
                return None

        with ThreadPoolExecutor(_READERS) as readers:
            return [job for job in readers.map(read, entries) if job is not None]
