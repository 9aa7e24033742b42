"""The documents of batches in storage: what was asked, how far it is, and what became of each line so far.

Blocking calls; knows no HTTP. `batch_runner` does the work that they tell of.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pia_ray import storage
from pia_ray.errors import Conflict, NotFound, StorageError, StorageNotFound
from pia_ray.online.files import Order, ids_below, is_id, new_id, owner_folder, page
from pia_ray.online.requests.bodies import shown

BatchStatus = Literal[
    "validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"
]

_TRIES: Final = 20
_ENDED: Final = frozenset({"failed", "completed", "expired", "cancelled"})


class BatchFault(BaseModel):
    """What is wrong with a batch's input file."""

    model_config = ConfigDict(frozen=True)

    code: str
    message: str
    line: int | None = None
    """From 1."""
    param: str | None = None


class Batch(BaseModel):
    """The document of one batch. Times are seconds since 1970, UTC."""

    model_config = ConfigDict(frozen=True)

    id: str
    owner: str
    input_file_id: str
    status: BatchStatus = "validating"
    metadata: dict[str, str] | None = None
    created_at: float
    expires_at: float
    """When what has not been made by then is given up."""
    in_progress_at: float | None = None
    finalizing_at: float | None = None
    completed_at: float | None = None
    failed_at: float | None = None
    expired_at: float | None = None
    cancelling_at: float | None = None
    cancelled_at: float | None = None
    errors: tuple[BatchFault, ...] = ()
    num_lines: int = 0
    num_completed: int = 0
    num_failed: int = 0
    next_line: int = 0
    """Lines before this one have been made jobs, or have failed before they could be."""
    jobs: dict[int, str] = Field(default_factory=dict)
    """Video jobs that have not ended, by line."""
    outcomes: tuple[str, ...] = ()
    """Names of the parts with what became of lines."""
    output_file_id: str | None = None
    error_file_id: str | None = None
    lease_owner: str = ""
    lease_until: float = 0.0

    @property
    def ended(self) -> bool:
        """Whether nothing more becomes of it."""
        return self.status in _ENDED


@dataclass(frozen=True)
class Outcome:
    """What became of one line."""

    line: int
    record: Mapping[str, Any]
    """The line of the output or error file."""
    row: Mapping[str, Any]
    """Its row of the results table, as JSON values."""

    @property
    def succeeded(self) -> bool:
        """Whether there is a video."""
        return bool(self.row["status"] == "succeeded")


class BatchStore:
    """The batches below a prefix. Documents change by compare-and-swap, so any number of processes may share them."""

    def __init__(self, prefix: str, *, ttl_s: float) -> None:
        self._prefix = storage.join(prefix, "batches")
        self._ttl_s = ttl_s

    def create(self, owner: str, input_file_id: str, *, metadata: Mapping[str, str] | None, window_s: float) -> Batch:
        """A batch that waits to be read."""
        now = time.time()
        batch = Batch(
            id=new_id("batch"),
            owner=owner,
            input_file_id=input_file_id,
            metadata=None if metadata is None else dict(metadata),
            created_at=now,
            expires_at=now + window_s,
        )
        # The mark first: a mark without a document is swept, a document without a mark would wait for ever.
        storage.write_bytes(self._mark_uri(batch), owner.encode())
        storage.write_bytes(self._document_uri(owner, batch.id), _document(batch), content_type="application/json")
        return batch

    def get(self, owner: str, batch_id: str) -> Batch:
        """One batch.

        Raises:
            NotFound: there is none of that id, or it is another key's.
        """
        return self._read(owner, batch_id)[0]

    def list(self, owner: str, *, after: str | None, limit: int, order: Order) -> tuple[Sequence[Batch], bool]:
        """At most `limit` of the owner's batches behind the one with the id `after`, and whether there are more."""
        ids = ids_below(storage.join(self._prefix, "documents", owner_folder(owner)))
        chosen = list(page(ids, after=after, order=order))
        return [self.get(owner, each) for each in chosen[:limit]], len(chosen) > limit

    def change(self, owner: str, batch_id: str, edit: Callable[[Batch], Batch]) -> Batch:
        """Replaces the document by `edit` of it, again and again until no other writer came between.

        Raises:
            NotFound: as `get`.
            Conflict: whatever `edit` raises passes through; also where others never stop writing.
        """
        for _ in range(_TRIES):
            batch, etag = self._read(owner, batch_id)
            edited = edit(batch)
            if edited == batch:
                return batch
            if storage.replace_bytes(self._document_uri(owner, batch_id), _document(edited), etag=etag) is not None:
                if edited.ended:
                    storage.delete(self._mark_uri(edited))
                return edited
        raise Conflict(f"batch {batch_id} is written by too many at once: try again")

    def cancel(self, owner: str, batch_id: str) -> Batch:
        """Stops a batch: lines that wait are given up, and what is made is kept.

        Raises:
            NotFound: as `get`.
            Conflict: it has ended.
        """

        def stop(batch: Batch) -> Batch:
            if batch.status in ("cancelling", "cancelled"):
                return batch
            if batch.ended or batch.status == "finalizing":
                raise Conflict(f"batch {batch_id} is {batch.status} and cannot be cancelled")
            return batch.model_copy(update={"status": "cancelling", "cancelling_at": time.time()})

        return self.change(owner, batch_id, stop)

    def open_batches(self) -> Iterator[tuple[str, str]]:
        """Owner and id of every batch that has not ended, oldest first."""
        for found in storage.list_objects(storage.join(self._prefix, "open")):
            try:
                yield storage.read_bytes(found.uri).decode(), found.uri.rpartition("/")[2]
            except StorageNotFound:  # ended since the listing
                continue

    def num_open(self, owner: str) -> int:
        """Batches of the owner that have not ended."""
        return sum(each == owner for each, _ in self.open_batches())

    def output_uri(self, batch: Batch) -> str:
        """The folder of its outcomes; an output in a catalogue's layout once the batch has ended."""
        return storage.join(self._prefix, "outputs", batch.id)

    def write_input(self, batch: Batch, content: bytes) -> None:
        """Keeps a copy of the input file, which its owner may delete before the batch has ended."""
        storage.write_bytes(storage.join(self.output_uri(batch), "input.jsonl"), content)

    def read_input(self, batch: Batch) -> bytes:
        """That copy."""
        return storage.read_bytes(storage.join(self.output_uri(batch), "input.jsonl"))

    def write_outcomes(self, batch: Batch, outcomes: Sequence[Outcome]) -> str:
        """Writes a part with these outcomes and gives its name, which counts once it is in the document."""
        name = f"{uuid.uuid4().hex}.jsonl"
        lines = [json.dumps([each.line, each.record, each.row]) + "\n" for each in outcomes]
        storage.write_bytes(storage.join(self.output_uri(batch), "outcomes", name), "".join(lines).encode())
        return name

    def read_outcomes(self, batch: Batch) -> Sequence[Outcome]:
        """What has become of its lines so far, in their order."""
        found: dict[int, Outcome] = {}
        for name in batch.outcomes:
            content = storage.read_bytes(storage.join(self.output_uri(batch), "outcomes", name))
            for text in content.splitlines():
                line, record, row = json.loads(text)
                found.setdefault(line, Outcome(line=line, record=record, row=row))
        return [found[line] for line in sorted(found)]

    def sweep(self) -> int:
        """Removes batches that ended longer ago than they are kept, with their outputs; how many."""
        removed = 0
        for found in storage.list_objects(storage.join(self._prefix, "open")):
            # Only old ones: the document of a new mark is still to be written.
            if time.time() - found.last_modified.timestamp() > self._ttl_s:
                owner, batch_id = storage.read_bytes(found.uri).decode(), found.uri.rpartition("/")[2]
                if storage.head(self._document_uri(owner, batch_id)) is None:
                    storage.delete(found.uri)
        for found in storage.list_objects(storage.join(self._prefix, "documents"), suffix=".json"):
            try:
                batch = Batch.model_validate_json(storage.read_bytes(found.uri))
            except (StorageNotFound, ValidationError):
                continue
            if batch.ended and max(batch.expires_at, found.last_modified.timestamp()) + self._ttl_s < time.time():
                for part in storage.list_objects(self.output_uri(batch)):
                    storage.delete(part.uri)
                storage.delete(found.uri)
                removed += 1
        return removed

    def _read(self, owner: str, batch_id: str) -> tuple[Batch, str]:
        if is_id(batch_id, "batch"):
            uri = self._document_uri(owner, batch_id)
            # The ETag first: content that is newer than it makes the swap fail, never the other way round.
            facts = storage.head(uri)
            if facts is not None:
                try:
                    return Batch.model_validate_json(storage.read_bytes(uri)), facts.etag
                except StorageNotFound:
                    pass
                except ValidationError:
                    raise StorageError(f"the document of batch {batch_id} is damaged") from None
        raise NotFound(f'there is no batch "{shown(batch_id)}"')

    def _document_uri(self, owner: str, batch_id: str) -> str:
        return storage.join(self._prefix, "documents", owner_folder(owner), f"{batch_id}.json")

    def _mark_uri(self, batch: Batch) -> str:
        return storage.join(self._prefix, "open", batch.id)


def _document(batch: Batch) -> bytes:
    return batch.model_dump_json().encode()
