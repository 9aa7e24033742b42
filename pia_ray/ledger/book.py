"""The row ledger of one output: what is done, what is to do, and the results table that people read.

The driver alone writes here: it plans the catalogue and writes parts. Workers commit videos and hand their rows over.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import tempfile
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Final, NamedTuple, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pia_ray import storage
from pia_ray.errors import LedgerError, OutputError, StorageError
from pia_ray.ledger import attempts, names, runs
from pia_ray.ledger.parts import (
    Index,
    PartWriter,
    drop_parts,
    quarantine,
    read_index,
    read_winners,
    split_keys,
    write_part,
)
from pia_ray.ledger.results import RESULTS_SCHEMA, conform
from pia_ray.ledger.runs import COLUMN_PREFIX, RunRecord
from pia_ray.manifest import ITEMS_SCHEMA
from pia_ray.types import ResultRow

ITEMS_ROWS: Final = 50_000
"""Rows of one items file, and of one row group of `results.parquet`."""
ITEMS_BYTES: Final = 128 * 2**20
"""Rows that wait for an items file take no more memory: pictures may be inside them, as data: URLs."""

FULL_PART_ROWS: Final = 8192
MANY_PARTS: Final = 1000
"""Planning compacts a ledger that has more: what many killed runs leave behind."""

_SPILLS: Final = 200
_STALE: Final = 0.8
_TRIES: Final = 5

_log = logging.getLogger(__name__)
_Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Planned:
    """The work that a run has before it; the counts add up to `num_items`."""

    run: RunRecord
    items_uri: str
    """Parquet files with the columns of ITEMS_SCHEMA, `pending`, and pass-through columns named `manifest:<name>`."""
    num_items: int
    num_pending: int
    num_succeeded_before: int
    num_failed_before: int
    """Failed in an earlier run and not to be tried again."""
    num_rejected: int


class Ledger:
    """What an output holds, by work key. Reads every part once, when it is opened, and then keeps count by itself.

    A context manager: leaving it writes the rows that wait.

    Raises:
        OutputError: wherever the store refuses or does not answer.
    """

    def __init__(self, output: str, index: Index) -> None:
        self.output = output
        self.index = index
        self._writer = PartWriter(output, index)

    @classmethod
    def open(cls, output: str) -> Self:
        """The ledger of an output, empty where nothing is there."""
        with output_errors(output):
            return cls(output, read_index(output))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.flush()

    def plan(self, tables: Iterable[pa.Table], *, run: RunRecord, retry: Iterable[str] = ()) -> Planned:
        """Writes down the work items of a manifest and which of them are pending.

        `tables` have the columns of ITEMS_SCHEMA, then the pass-through columns. Succeeded items are never pending;
        failed ones are if `retry` holds "failed" or their error code. Rejected items become failed rows at once. If
        `tables` raises, nothing is kept.
        """
        with tempfile.TemporaryDirectory(prefix="pia-ray-") as folder:
            planner = _Planner(self.index, frozenset(retry), Path(folder))
            for table in tables:
                planner.add(table)
            paths = planner.close()
            with output_errors(self.output):
                self.quarantine_damaged()
                items_uri = names.items_uri(self.output, run.run_id)
                for path in paths:
                    storage.upload_file(path, storage.join(items_uri, path.name))
                for rejected in _rejected_rows(paths, run) if planner.num_newly_rejected else ():
                    self.index.add(write_part(self.output, rejected), rejected)
                self._end_stale_attempts()
                run = dataclasses.replace(run, planned_at=storage.clock(self.output), counts=planner.counts)
                runs.write_run(self.output, run)
                runs.prune_items(self.output, current=run.run_id)
        if len(self.index.part_uris) > MANY_PARTS:
            self.compact()
        return Planned(run=run, items_uri=items_uri, **planner.counts)

    def quarantine_damaged(self) -> None:
        """Moves damaged parts aside, so that they are told of once."""
        for uri in list(self.index.damaged):
            quarantine(self.output, uri)
            del self.index.damaged[uri]

    def append(self, rows: Iterable[ResultRow]) -> None:
        """Takes finished rows; they are written 64 at a time or after 30 s."""
        self._writer.append(rows)

    def flush_if_due(self) -> None:
        """Writes rows that have waited for 30 s; to be called now and then while no rows come."""
        self._writer.flush_if_due()

    def flush(self) -> None:
        """Writes the rows that wait, now."""
        self._writer.flush()

    def finish(self, run: RunRecord) -> RunRecord:
        """Writes what waits, the results table and the end of the run."""
        self.flush()
        self._end_stale_attempts()
        self.write_results()
        run = dataclasses.replace(run, finished_at=datetime.now(UTC))
        with output_errors(self.output):
            runs.write_run(self.output, run)
        return run

    def write_results(self, run_id: str | None = None) -> int:
        """Writes `results.parquet` in place of what is there, and gives its number of rows.

        One row per work item of that run's manifest (the latest run's if none is named), in its order, with the
        pass-through columns. Items that have not ended yet are left out until they have. Where no run's items are
        kept, every row of the ledger, by time. Memory is bounded: rows are sorted through files on this machine.
        """
        self.flush()
        with output_errors(self.output), tempfile.TemporaryDirectory(prefix="pia-ray-") as folder:
            if run_id is None:
                latest = runs.latest_run(self.output)
                run_id = latest.run_id if latest is not None else None
            path = Path(folder) / "results.parquet"
            for _ in range(_TRIES):
                writer = _ResultsWriter(self, run_id, Path(folder))
                num_rows = writer.write(path)
                if not writer.num_gone:
                    break
                self.index.replace_by(read_index(self.output))  # another process has compacted the ledger
            storage.upload_file(path, names.results_uri(self.output), content_type="application/vnd.apache.parquet")
        return num_rows

    def winners_of(self, run_id: str | None) -> tuple[_Array, _Array]:
        """Of each item of a run (of every key if none is named), in order: its place in `index.winners`, or -1; and
        the items file it is in."""
        if run_id is None:
            num_keys = len(self.index.winners)
            return np.arange(num_keys), np.arange(num_keys) // ITEMS_ROWS
        places, files = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        for number, items in enumerate(runs.read_items(self.output, run_id, columns=["work_key"])):
            high, low = split_keys(items["work_key"])
            places.append(self.index.find(high, low))
            files.append(np.full(len(high), number, np.int64))
        return np.concatenate(places), np.concatenate(files)

    def compact(self) -> tuple[int, int]:
        """Puts small parts, and those with many rows that lost, together: the number of parts before and after.

        What is new is durable before anything is dropped, so a crash leaves equal rows twice, which count once.
        """
        self.flush()
        with output_errors(self.output):
            self.quarantine_damaged()
            index = read_index(self.output)
            places = np.arange(len(index.winners))
            used = np.bincount(index.winners.part, minlength=len(index.part_uris))
            sizes = np.array(index.part_sizes, np.int64)
            old = (sizes < FULL_PART_ROWS // 2) | (used < _STALE * sizes)
            num_before = len(index.part_uris)
            if old.sum() > 1 or (used < sizes)[old].any():
                dropped = [uri for uri, is_old in zip(index.part_uris, old, strict=True) if is_old]
                self._rewrite(index, places[old[index.winners.part]], dropped)
            self.index.replace_by(read_index(self.output))
            storage.sweep(self.output)
        return num_before, len(self.index.part_uris)

    def _rewrite(self, index: Index, chosen: _Array, dropped: list[str]) -> None:
        waiting: list[pa.Table] = []
        aside: set[str] = set()
        for uri, table, _ in read_winners(index, chosen):
            if isinstance(table, pa.Table):
                waiting.append(conform(table))
            elif table is not None:  # damaged where the index does not look
                quarantine(self.output, uri)
                aside.add(uri)
            if sum(map(len, waiting)) >= FULL_PART_ROWS:
                write_part(self.output, pa.concat_tables(waiting))
                waiting = []
        if waiting:
            write_part(self.output, pa.concat_tables(waiting))
        drop_parts([uri for uri in dropped if uri not in aside])

    def _end_stale_attempts(self) -> None:
        keys = [key for key in attempts.count_attempts(self.output) if len(key) == 64]
        if keys:
            found = self.index.find(*split_keys(pa.array(keys, pa.string())))
            attempts.end_stale_attempts(self.output, [keys[place] for place in np.flatnonzero(found >= 0)])


class Sorted(NamedTuple):
    """Masks over planned items."""

    known: _Array
    """Those that have ended in an earlier run."""
    succeeded: _Array
    rejected: _Array
    pending: _Array


def sort_items(index: Index, table: pa.Table, *, retry: Collection[str]) -> Sorted:
    """Which items of a table with the columns of ITEMS_SCHEMA are done, bad, or to do, as `Ledger.plan` says."""
    places = index.find(*split_keys(table["work_key"]))
    known = places >= 0
    winners = index.winners
    succeeded = np.zeros(len(places), np.bool_)
    succeeded[known] = winners.succeeded[places[known]]
    again = np.zeros(len(places), np.bool_)
    if retry:
        named = [code for code, text in enumerate(index.codes) if text in retry]
        again[known] = "failed" in retry or np.isin(winners.code[places[known]], named)
    rejected = pc.is_valid(table["error_message"]).to_numpy() & ~succeeded
    return Sorted(known, succeeded, rejected, pending=~succeeded & ~rejected & (~known | again))


class _Planner:
    """Sorts items into done and pending, and writes them to local files."""

    def __init__(self, index: Index, retry: frozenset[str], folder: Path) -> None:
        self._index = index
        self._retry = retry
        self._folder = folder
        self._waiting: list[pa.Table] = []
        self._num_waiting = 0
        self._paths: list[Path] = []
        self._schema: pa.Schema | None = None
        self.num_newly_rejected = 0
        self.counts = dict.fromkeys(
            ("num_items", "num_pending", "num_succeeded_before", "num_failed_before", "num_rejected"), 0
        )

    def add(self, table: pa.Table) -> None:
        known, succeeded, rejected, pending = sort_items(self._index, table, retry=self._retry)
        self.num_newly_rejected += int((rejected & ~known).sum())
        counts = self.counts
        counts["num_items"] += len(table)
        counts["num_pending"] += int(pending.sum())
        counts["num_succeeded_before"] += int(succeeded.sum())
        counts["num_rejected"] += int(rejected.sum())
        counts["num_failed_before"] += int((~succeeded & ~rejected & ~pending).sum())
        # Columns by place: a pass-through column may have any name that no results column has.
        own = len(ITEMS_SCHEMA)
        columns = [*table.columns[:own], pa.array(pending), pa.array(rejected & ~known), *table.columns[own:]]
        passed = [field.with_name(f"{COLUMN_PREFIX}{field.name}") for field in list(table.schema)[own:]]
        schema = pa.schema([*ITEMS_SCHEMA, ("pending", pa.bool_()), ("newly_rejected", pa.bool_()), *passed])
        if self._schema is None:
            self._schema = schema
        self._waiting.append(pa.table(columns, schema=schema).cast(self._schema))
        self._num_waiting += len(table)
        while self._num_waiting >= ITEMS_ROWS:
            self._write(ITEMS_ROWS)
        if sum(waiting.nbytes for waiting in self._waiting) > ITEMS_BYTES:
            self._write(self._num_waiting)

    def close(self) -> list[Path]:
        if self._num_waiting or not self._paths:
            self._write(self._num_waiting)
        return self._paths

    def _write(self, num_rows: int) -> None:
        if self._schema is None:
            self._schema = pa.schema([*ITEMS_SCHEMA, ("pending", pa.bool_()), ("newly_rejected", pa.bool_())])
        waiting = pa.concat_tables([self._schema.empty_table(), *self._waiting])
        path = self._folder / f"part-{len(self._paths):05d}.parquet"
        unique = {"work_key", "id", "image", "image_identity", "params", "seed"}
        pq.write_table(
            waiting.slice(0, num_rows),
            path,
            compression="zstd",
            use_dictionary=[name for name in self._schema.names if name not in unique],
            write_page_checksum=True,
        )
        self._paths.append(path)
        self._waiting = [waiting.slice(num_rows)]
        self._num_waiting -= num_rows


def _rejected_rows(paths: Iterable[Path], run: RunRecord) -> Iterator[pa.Table]:
    """Failed result rows, a table per items file, for rejected items that have no row yet."""
    for path in paths:
        items = pq.read_table(path, columns=[*ITEMS_SCHEMA.names, "newly_rejected"])
        items = items.filter(items["newly_rejected"])
        if not len(items):
            continue
        given: dict[str, Any] = {
            "status": "failed",
            "retryable": False,
            "attempts": 0,
            "model": run.model,
            "run_id": run.run_id,
            "worker": "planner",
            "finished_at": datetime.now(UTC),
        }
        columns = []
        for field in RESULTS_SCHEMA:
            source = "image" if field.name == "image_uri" else field.name
            if field.name in given:
                columns.append(pa.repeat(pa.scalar(given[field.name], field.type), len(items)))
            elif source in items.column_names:
                columns.append(items[source].cast(field.type))
            else:
                columns.append(pa.nulls(len(items), field.type))
        yield pa.table(columns, schema=RESULTS_SCHEMA)


class _ResultsWriter:
    """Writes rows that lie in parts, in the order they were finished, in the order of the manifest.

    Each part is read once: its rows go into spill files, one per stretch of the manifest, and each stretch is sorted
    by itself. So it does not matter how far the two orders differ.
    """

    def __init__(self, ledger: Ledger, run_id: str | None, folder: Path) -> None:
        self._ledger = ledger
        self._run_id = run_id
        self._folder = folder
        self.num_gone = 0

    def write(self, path: Path) -> int:
        places, files = self._ledger.winners_of(self._run_id)
        ended = np.flatnonzero(places >= 0)
        num_files = int(files[-1]) + 1 if len(files) else 0
        stretches = files[ended] // max(1, -(-num_files // _SPILLS))
        spills = self._spill(places[ended], ended, stretches)
        num_rows = 0
        passed = iter(()) if self._run_id is None else runs.read_passed(self._ledger.output, self._run_id)
        first = next(passed, None)
        schema = pa.schema([*RESULTS_SCHEMA, *(first.schema if first is not None else ())])
        items = _Rows(first, passed)
        with pq.ParquetWriter(path, schema, compression="zstd", write_page_checksum=True) as writer:
            for stretch in sorted(spills):
                with pa.ipc.open_stream(spills[stretch]) as reader:
                    table = reader.read_all().sort_by("position")
                positions = table["position"].to_numpy()
                table = table.drop_columns("position")
                for column in items.take(positions):
                    table = table.append_column(*column)
                writer.write_table(table.cast(schema), row_group_size=ITEMS_ROWS)
                num_rows += len(table)
        return num_rows

    def _spill(self, chosen: _Array, positions: _Array, stretches: _Array) -> dict[int, Path]:
        schema = RESULTS_SCHEMA.append(pa.field("position", pa.int64()))
        paths: dict[int, Path] = {}
        with contextlib.ExitStack() as stack:
            writers: dict[int, Any] = {}
            for uri, table, which in read_winners(self._ledger.index, chosen):
                if not isinstance(table, pa.Table):
                    self._lost(uri, table, len(which))
                    continue
                table = conform(table).append_column(schema.field("position"), pa.array(positions[which]))
                stretch_of = stretches[which]
                for stretch in np.unique(stretch_of).tolist():
                    if stretch not in writers:
                        paths[stretch] = self._folder / f"{stretch}.arrow"
                        writers[stretch] = stack.enter_context(pa.ipc.new_stream(paths[stretch], schema))
                    writers[stretch].write_table(table.filter(pa.array(stretch_of == stretch)))
        return paths

    def _lost(self, uri: str, error: LedgerError | None, num_rows: int) -> None:
        if error is None:
            self.num_gone += num_rows
        else:
            _log.warning("%s is damaged (%s): the next run looks for its %d rows anew", uri, error.message, num_rows)
            quarantine(self._ledger.output, uri)


class _Rows:
    """Rows of a stream of tables by position; positions only grow from call to call."""

    def __init__(self, first: pa.Table | None, rest: Iterator[pa.Table]) -> None:
        self._table = first
        self._rest = rest
        self._begin = 0

    def take(self, positions: _Array) -> list[tuple[pa.Field, pa.ChunkedArray]]:
        if self._table is None or not self._table.num_columns:
            return []
        pieces = []
        done = 0
        while done < len(positions):
            end = self._begin + len(self._table)
            upto = int(np.searchsorted(positions, end))
            pieces.append(self._table.take(pa.array(positions[done:upto] - self._begin)))
            done = upto
            if done < len(positions):
                self._table, self._begin = next(self._rest), end
        table = pa.concat_tables(pieces)
        return list(zip(table.schema, table.columns, strict=True))


@contextlib.contextmanager
def output_errors(output: str) -> Iterator[None]:
    """Turns errors of the store into the one that stops the run."""
    try:
        yield
    except StorageError as error:
        raise OutputError(f"the output {output} cannot be used: {error.message}") from error
