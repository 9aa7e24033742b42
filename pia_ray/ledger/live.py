"""The live state of a run, for those who watch it from any machine: records of its workers, and its lease's holder.

Each worker writes one small record now and then. The worker counts ages until it writes, and the store's clock counts
them from then on, so that no two machines' clocks are compared. A lost record costs nothing but the sight of it.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any, Final, Literal, get_args

from pia_ray import storage
from pia_ray.errors import StorageDenied, StorageNotFound
from pia_ray.ledger import layout
from pia_ray.ledger.lease import read_holder

_MOST_BYTES: Final = 1_000_000

_log = logging.getLogger(__name__)

Stage = Literal["check", "fetch", "queue", "animate", "publish"]
"""check: its earlier tries are read, and it may wait to run alone; fetch: its pictures are read and decoded; queue: it
waits for the engine; animate: it is in the engine; publish: its video is encoded and written."""


@dataclass(frozen=True)
class RowInFlight:
    """A row that a worker has begun."""

    id: str
    work_key: str
    stage: Stage
    stage_s: float
    """Seconds in this stage."""
    age_s: float
    """Seconds since the worker began it."""


@dataclass(frozen=True)
class WorkerState:
    """One worker of a run."""

    worker: str
    run_id: str
    node: str
    rows: tuple[RowInFlight, ...]
    """The oldest first."""
    busy_share: float | None
    """Share of the worker's time in which its engine had a row; None before there is any."""
    outage: str
    """Says what is away that it waits for, and why; empty where it does not wait."""
    num_waiting: int
    """Finished animations that wait in its memory for the store."""
    seen_s: float = 0.0
    """Seconds since it wrote this."""


@dataclass(frozen=True)
class LiveRun:
    """The run that is at work on an output."""

    run_id: str
    driver: str
    """The process that drives it, `<host>:<pid>`; empty on a store without leases."""
    renewed_s: float | None
    """Seconds since its driver last renewed the lease; None on a store without leases."""
    expired: bool
    """Whether the lease has expired, because the driver has ended or does not reach the store."""
    workers: tuple[WorkerState, ...]

    @property
    def num_in_flight(self) -> int:
        """Rows that its workers have begun."""
        return sum(len(worker.rows) for worker in self.workers)


def write_worker(output: str, state: WorkerState) -> None:
    """Writes the worker's record over its earlier one.

    Raises:
        StorageError: the store refused or did not answer.
    """
    values = {name: value for name, value in asdict(state).items() if name != "seen_s"}
    storage.write_bytes(_uri(output, state), json.dumps(values).encode(), content_type="application/json")


def remove_worker(output: str, state: WorkerState) -> None:
    """Removes the worker's record.

    Raises:
        StorageError: the store refused or did not answer.
    """
    storage.delete(_uri(output, state))


def remove_workers_of_run(output: str, run_id: str) -> None:
    """Removes the records of a run's workers, and those that earlier runs on the output have left.

    Raises:
        StorageError: the store refused or did not answer.
    """
    for found in list(storage.list_objects(layout.workers_uri(output), suffix=".json")):
        if _run_of(found.uri) <= run_id:  # ids begin with the time
            storage.delete(found.uri)


def live_run(output: str) -> LiveRun | None:
    """The run at work on the output; None where none is.

    Raises:
        StorageError: the store refused or did not answer.
    """
    found = storage.head(layout.lease_uri(output))
    holder = read_holder(layout.lease_uri(output)) if found is not None else None
    records = list(storage.list_objects(layout.workers_uri(output), suffix=".json"))
    if holder is None and not records:
        return None
    now = _clock(output)
    if found is None or holder is None:
        run_id = max(_run_of(record.uri) for record in records)
        return LiveRun(run_id, "", None, expired=False, workers=tuple(_workers(records, run_id, now)))
    renewed_s = max(0.0, (now - found.last_modified).total_seconds())
    workers = tuple(_workers(records, holder.run_id, now))
    driver = f"{holder.host}:{holder.pid}"
    return LiveRun(holder.run_id, driver, renewed_s, expired=renewed_s > holder.ttl_s, workers=workers)


def _workers(records: list[storage.ObjectStat], run_id: str, now: datetime) -> Iterator[WorkerState]:
    for record in records:
        if _run_of(record.uri) != run_id:
            continue
        try:
            state = _parsed(json.loads(storage.read_bytes(record.uri, max_bytes=_MOST_BYTES)))
        except StorageNotFound:  # it has ended
            continue
        except (ValueError, TypeError, KeyError) as error:
            _log.warning("the record of a worker, %s, is damaged: %s", record.uri, error)
            continue
        seen_s = max(0.0, (now - record.last_modified).total_seconds())
        rows = tuple(replace(row, stage_s=row.stage_s + seen_s, age_s=row.age_s + seen_s) for row in state.rows)
        yield replace(state, rows=rows, seen_s=seen_s)


def _parsed(values: dict[str, Any]) -> WorkerState:
    rows = tuple(
        RowInFlight(
            id=str(row["id"]),
            work_key=str(row["work_key"]),
            stage=next(stage for stage in get_args(Stage) if stage == row["stage"]),
            stage_s=float(row["stage_s"]),
            age_s=float(row["age_s"]),
        )
        for row in values["rows"]
        if row["stage"] in get_args(Stage)
    )
    share = values.get("busy_share")
    return WorkerState(
        worker=str(values["worker"]),
        run_id=str(values["run_id"]),
        node=str(values.get("node", "")),
        rows=rows,
        busy_share=None if share is None else float(share),
        outage=str(values.get("outage", "")),
        num_waiting=int(values.get("num_waiting", 0)),
    )


def _clock(output: str) -> datetime:
    """The time by the store's clock; by this machine's where it has no right to ask a file system."""
    try:
        return storage.clock(output)
    except StorageDenied:
        return datetime.now(UTC)


def _uri(output: str, state: WorkerState) -> str:
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", state.worker)
    return storage.join(layout.workers_uri(output), f"{state.run_id}.{name}.json")


def _run_of(uri: str) -> str:
    return uri.rpartition("/")[2].partition(".")[0]
