"""The documents of batches in storage: the request, how far it is, and the outcome of each line so far.

Blocking calls; knows no HTTP. `runner` does the work.
"""

from __future__ import annotations

import json
import threading
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final, Literal

from cachetools import LRUCache
from pydantic import BaseModel, ConfigDict, Field

from pia_ray import storage
from pia_ray.errors import Conflict, NotFound
from pia_ray.online.documents.document import Document, Index, Kind, Page, Revision
from pia_ray.online.documents.store import DocumentStore

BatchStatus = Literal[
    "validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"
]

_MOST_READ: Final = 100
_ENDED: Final = frozenset({"failed", "completed", "expired", "cancelled"})


class BatchLineError(BaseModel):
    """An error of a batch's input file."""

    model_config = ConfigDict(frozen=True)

    code: str
    message: str
    line: int | None = None
    """From 1."""
    param: str | None = None


class LineTries(BaseModel):
    """The tries of a line that is not a job yet."""

    model_config = ConfigDict(frozen=True)

    num_failed: int = 0
    not_before: float = 0.0
    """Time of the next try."""


class Batch(Document):
    """The document of one batch."""

    input_file_id: str
    status: BatchStatus = "validating"
    metadata: dict[str, str] | None = None
    expires_at: float
    """Time at which the remaining lines are given up."""
    in_progress_at: float | None = None
    finalizing_at: float | None = None
    completed_at: float | None = None
    failed_at: float | None = None
    expired_at: float | None = None
    cancelling_at: float | None = None
    cancelled_at: float | None = None
    errors: tuple[BatchLineError, ...] = ()
    num_lines: int = 0
    num_completed: int = 0
    num_failed: int = 0
    next_line: int = 0
    """Index of the next line; earlier lines have become jobs, have failed before that, or wait."""
    waiting: dict[int, LineTries] = Field(default_factory=dict)
    """Earlier lines that are neither jobs nor have failed, by their index."""
    jobs: dict[int, str] = Field(default_factory=dict)
    """Video jobs that have not ended, by the index of their line."""
    outcomes: tuple[str, ...] = ()
    """Names of the parts with the outcomes of lines."""
    ran_out_of_time: bool = False
    """Whether lines were given up at `expires_at`."""
    output_file_id: str | None = None
    error_file_id: str | None = None
    has_line_ids: bool = False
    """Whether the ids of its jobs come of its own id. Version 0.1.0 kept a record of each."""
    lease_owner: str = ""
    lease_until: float = 0.0

    @property
    def ended(self) -> bool:
        """Whether it is in a final status."""
        return self.status in _ENDED

    @property
    def ended_at(self) -> float | None:
        """Time at which the batch reached its final status."""
        return (self.failed_at or self.completed_at or self.expired_at or self.cancelled_at) if self.ended else None


OPEN: Final = Index[Batch]("open", lambda batch: None if batch.ended else 0, idle_s=60.0)
"""Batches that have not ended, oldest first."""


@dataclass(frozen=True)
class Outcome:
    """The outcome of one line."""

    line: int
    """Its index."""
    record: Mapping[str, Any]
    """The line of the output or error file."""
    row: Mapping[str, Any]
    """Its row of the results table, as JSON values."""
    is_given_up: bool = False
    """Whether the batch ended before the line was made. Not stored."""

    @property
    def succeeded(self) -> bool:
        """Whether there is a video."""
        return bool(self.row["status"] == "succeeded")


class BatchStore:
    """The batches below a prefix; safe in threads and in any number of processes."""

    def __init__(self, prefix: str, *, ttl_s: float) -> None:
        self._prefix = storage.join(prefix, "batches")

        def expires_at(batch: Batch) -> float | None:
            return None if batch.ended_at is None else max(batch.expires_at, batch.ended_at) + ttl_s

        kind = Kind(name="batch", model=Batch, folder="documents", expires_at=expires_at, backfill_expiry=True)
        self._documents = DocumentStore(
            self._prefix, kind, indexes=(OPEN,), remove_content=lambda _, batch_id: self._remove_output(batch_id)
        )

        self._lock = threading.Lock()
        self._read: LRUCache[str, Revision[Batch]] = LRUCache(_MOST_READ)
        """Batches as they were read or changed last."""

    def now(self) -> float:
        """Seconds since 1970 by the store's clock."""
        return self._documents.now()

    def create(self, owner: str, input_file_id: str, *, metadata: Mapping[str, str] | None, window_s: float) -> Batch:
        """A batch whose input file is not read yet."""
        now = self.now()
        batch = Batch(
            id=self._documents.new_id(),
            owner=owner,
            input_file_id=input_file_id,
            metadata=None if metadata is None else dict(metadata),
            created_at=now,
            expires_at=now + window_s,
            has_line_ids=True,
        )
        self._documents.create(batch)
        return batch

    def get(self, owner: str, batch_id: str) -> Batch:
        """One batch.

        Raises:
            NotFound: there is none of that id, or it belongs to another key.
        """
        return self._documents.read(owner, batch_id).document

    def list(self, owner: str, *, after: str | None, limit: int) -> Page[Batch]:
        """At most `limit` of the owner's batches, the newest first, behind the one with the id `after`."""
        return self._documents.list(owner, after=after, limit=limit)

    def change(self, owner: str, batch_id: str, edit: Callable[[Batch], Mapping[str, Any]]) -> Batch:
        """The batch with the fields changed that `edit` gives.

        Raises:
            NotFound, Conflict: as `DocumentStore.change`.
        """
        return self._documents.change(owner, batch_id, edit)

    def change_read(self, batch: Batch, edit: Callable[[Batch], Mapping[str, Any]]) -> Batch:
        """As `change`, for a batch of `open_batches`, which is read again only where it has changed since."""
        with self._lock:
            at = self._read.get(batch.id)
        if at is not None and at.document.revision == batch.revision and (change := edit(at.document)):
            with suppress(Conflict):
                now = self._documents.replace(at, change)
                self._remember(now)
                return now.document
        return self.change(batch.owner, batch.id, edit)

    def cancel(self, owner: str, batch_id: str) -> Batch:
        """The batch, cancelled: the remaining lines are given up, and finished videos are kept.

        Raises:
            NotFound: as `get`.
            Conflict: it has ended.
        """

        def stop(batch: Batch) -> dict[str, Any]:
            if batch.status in ("cancelling", "cancelled"):
                return {}
            if batch.ended or batch.status == "finalizing":
                raise Conflict(f"batch {batch_id} is {batch.status} and cannot be cancelled")
            return {"status": "cancelling", "cancelling_at": self.now()}

        return self.change(owner, batch_id, stop)

    def open_batches(self, *, without: Collection[str] = ()) -> Iterator[Batch]:
        """Every batch that has not ended, oldest first, without those of the ids in `without`, which are not read."""
        for entry in self._documents.entries(OPEN):
            if entry.id in without:
                continue
            try:
                found = self._documents.read_entry(entry)
            except NotFound:
                continue
            self._remember(found)
            if (batch := found.document).ended:
                self._documents.delete_entry(entry)
            else:
                yield batch

    def num_open(self, owner: str) -> int:
        """Batches of the owner that have not ended."""
        folder = self._documents.owner_folder(owner)
        return sum(entry.owner_folder == folder for entry in self._documents.entries(OPEN))

    def sweep(self) -> int:
        """The number of expired batches, which are removed with their outputs."""
        return self._documents.sweep()

    def output_uri(self, batch: Batch) -> str:
        """Folder of its outcomes, and of an output in a catalogue's layout once it has ended."""
        return storage.join(self._prefix, "outputs", batch.id)

    def write_input(self, batch: Batch, content: bytes) -> None:
        """Stores a copy of the input file, because its owner may delete it before the batch has ended."""
        storage.write_bytes(storage.join(self.output_uri(batch), "input.jsonl"), content)

    def read_input(self, batch: Batch) -> bytes:
        """The copy of the input file."""
        return storage.read_bytes(storage.join(self.output_uri(batch), "input.jsonl"))

    def write_outcomes(self, batch: Batch, outcomes: Sequence[Outcome]) -> str:
        """Name of a new part with these outcomes, which counts once it is in the document."""
        name = f"{uuid.uuid4().hex}.jsonl"
        lines = [json.dumps([each.line, each.record, each.row]) + "\n" for each in outcomes]
        storage.write_bytes(storage.join(self.output_uri(batch), "outcomes", name), "".join(lines).encode())
        return name

    def read_outcomes(self, batch: Batch) -> Sequence[Outcome]:
        """The outcomes of its lines so far, in their order."""
        found: dict[int, Outcome] = {}
        for name in batch.outcomes:
            content = storage.read_bytes(storage.join(self.output_uri(batch), "outcomes", name))
            for text in content.splitlines():
                line, record, row = json.loads(text)
                found.setdefault(line, Outcome(line=line, record=record, row=row))
        return [found[line] for line in sorted(found)]

    def _remember(self, found: Revision[Batch]) -> None:
        with self._lock:
            self._read[found.document.id] = found

    def _remove_output(self, batch_id: str) -> None:
        for found in storage.list_objects(storage.join(self._prefix, "outputs", batch_id)):
            storage.delete(found.uri)
