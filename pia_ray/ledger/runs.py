"""Records of runs and the work items that they planned: `_ledger/runs/<run id>/{run.json, items/}`."""

from __future__ import annotations

import dataclasses
import json
import logging
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from pia_ray import storage
from pia_ray.errors import LedgerError, StorageNotFound
from pia_ray.ledger import layout
from pia_ray.ledger.results import read_parquet

KEPT_ITEMS: Final = 3
"""Runs whose work items are kept; of older ones the record alone stays."""

COLUMN_PREFIX: Final = "manifest:"
"""Before the names of pass-through columns in items files, where they could clash with the items' own."""


_CONSIDERED: Final = 20
"""Records of runs that are read to find the latest: those that were written last."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunRecord:
    """One run, as written in its `run.json`."""

    run_id: str
    manifest: str
    model: str
    started_at: datetime
    config: Mapping[str, Any] = field(default_factory=dict)
    """The run's configuration as plain JSON values."""
    planned_at: datetime | None = None
    """By the store's clock; None until the items are durable."""
    finished_at: datetime | None = None
    counts: Mapping[str, int] = field(default_factory=dict)


def new_run(
    *, manifest: str, model: str, config: Mapping[str, Any] | None = None, now: datetime | None = None
) -> RunRecord:
    """A run that starts now, with an id that no other has; `now` is the time by the output's store."""
    now = now or datetime.now(UTC)
    run_id = f"{now:%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:8]}"
    return RunRecord(run_id=run_id, manifest=manifest, model=model, started_at=now, config=config or {})


def write_run(output: str, run: RunRecord) -> None:
    """Writes the run's record over an earlier state of it."""
    values = dataclasses.asdict(run)
    times = {name: values[name].isoformat() for name in ("started_at", "planned_at", "finished_at") if values[name]}
    content = json.dumps({**values, **times}, indent=2, default=str)
    storage.write_bytes(layout.run_uri(output, run.run_id), content.encode(), content_type="application/json")


def read_run(output: str, run_id: str) -> RunRecord:
    """The record of a run.

    Raises:
        LedgerError: the run has no record, or it is damaged.
    """
    uri = layout.run_uri(output, run_id)
    try:
        values = json.loads(storage.read_bytes(uri))
        for name in ("started_at", "planned_at", "finished_at"):
            values[name] = datetime.fromisoformat(values[name]) if values.get(name) else None
        return RunRecord(**{f.name: values[f.name] for f in dataclasses.fields(RunRecord)})
    except StorageNotFound:
        raise LedgerError(f"there is no run {run_id} in {output}") from None
    except (ValueError, KeyError, TypeError):
        raise LedgerError(f"{uri} is damaged: run `pia-ray animate` again, which plans anew") from None


def latest_run(output: str) -> RunRecord | None:
    """The run that planned last, by the store's clock; None where none has planned to the end."""
    records = list(storage.list_objects(layout.runs_uri(output), suffix="/run.json"))
    records.sort(key=lambda record: record.last_modified)
    found = []
    for record in records[-_CONSIDERED:]:
        try:
            run = read_run(output, _run_id(record.uri))
        except LedgerError as error:
            _log.warning("%s", error.message)
            continue
        if run.planned_at is not None:
            found.append(run)
    return max(found, key=lambda run: (run.planned_at, run.started_at), default=None)


def read_items(output: str, run_id: str, *, columns: list[str] | None = None) -> Iterator[pa.Table]:
    """The run's work items, file by file, in manifest order."""
    for uri in item_files(layout.items_uri(output, run_id)):
        yield read_item_file(uri, columns=columns)


def item_files(items_uri: str) -> list[str]:
    """The files of a run's work items, in manifest order."""
    return sorted(found.uri for found in storage.list_objects(items_uri))


def read_item_file(uri: str, *, columns: list[str] | None = None) -> pa.Table:
    """The work items in one of these files."""
    return read_parquet(storage.read_bytes(uri), columns=columns)


def read_passed(output: str, run_id: str) -> Iterator[pa.Table]:
    """The pass-through columns of the run's work items, under their own names, file by file."""
    for uri in item_files(layout.items_uri(output, run_id)):
        content = storage.read_bytes(uri)
        schema = pq.read_schema(pa.BufferReader(content))
        passed = [name for name in schema.names if name.startswith(COLUMN_PREFIX)]
        table = read_parquet(content, columns=passed)
        yield table.rename_columns([name.removeprefix(COLUMN_PREFIX) for name in passed])


def prune_items(output: str, *, current: str, num_partitions: int = 1) -> None:
    """Drops the items of all but the latest runs of each partition, by the store's clock, and of the run `current`."""
    items = sorted(
        storage.list_objects(layout.runs_uri(output), suffix=".parquet"), key=lambda found: found.last_modified
    )
    latest = list(dict.fromkeys(_run_id(found.uri) for found in reversed(items)))
    kept = {current, *latest[: KEPT_ITEMS * num_partitions]}
    for found in items:
        if _run_id(found.uri) not in kept:
            storage.delete(found.uri)


def _run_id(uri: str) -> str:
    return uri.rpartition("/runs/")[2].partition("/")[0]
