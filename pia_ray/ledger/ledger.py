"""The row ledger of one output: what is done, what is to do, and the results table that people read.

The driver alone writes here: it plans the catalogue and writes parts. Workers commit videos and hand their rows over.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import numpy as np
import pyarrow as pa

from pia_ray import storage
from pia_ray.errors import OutputError, OutputUnavailable, StorageError
from pia_ray.formatting import count_of
from pia_ray.ledger import attempts, layout, runs
from pia_ray.ledger.index import Index, split_keys
from pia_ray.ledger.parts import (
    PATIENCE_S,
    PartWriter,
    drop_parts,
    quarantine,
    read_index,
    read_winners,
    stamped,
    write_part,
)
from pia_ray.ledger.planning import Planned, Planner, rejected_rows
from pia_ray.ledger.results import to_table
from pia_ray.ledger.results_writer import ResultsWriter
from pia_ray.ledger.retaking import Retaking
from pia_ray.ledger.runs import RunRecord
from pia_ray.ledger.videos import lost_videos, move_damaged_aside
from pia_ray.result_row import ResultRow
from pia_ray.temporary_folders import temporary_folder

FULL_PART_ROWS: Final = 8192
MANY_PARTS: Final = 1000
"""Planning compacts a ledger that has more: what many killed runs leave behind."""

_STALE: Final = 0.8
_TRIES: Final = 5
_REWRITES: Final = 2

_log = logging.getLogger(__name__)


class Ledger:
    """The rows of an output by work key. Reads every part once, when it is opened, and then counts its own rows in.

    A context manager: leaving it writes the rows that wait.

    Raises:
        OutputError: wherever the store refuses or does not answer.
    """

    def __init__(self, output: str, index: Index, *, patience_s: float = PATIENCE_S) -> None:
        self.output = output
        self.index = index
        self._writer = PartWriter(output, index, patience_s=patience_s)
        self._is_shared = False
        self._num_deleted = 0

    @classmethod
    def open(cls, output: str, *, patience_s: float = PATIENCE_S) -> Self:
        """The ledger of an output, empty where nothing is there; rows wait so long for a store that is away."""
        with output_errors(output):
            return cls(output, read_index(output), patience_s=patience_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not isinstance(error, OutputError):
            self.flush()
            return
        # The store has stopped the caller and may refuse this too; what is not written is found again by its videos.
        with storage.hurry(), contextlib.suppress(OutputError):
            self.flush()

    def plan(
        self,
        tables: Iterable[pa.Table],
        *,
        run: RunRecord,
        retry: Iterable[str] = (),
        remake: Collection[str] = (),
        retaking: Retaking | None = None,
        partition: tuple[int, int] = (1, 1),
    ) -> Planned:
        """The work items of a manifest by what is to be done, which are written down.

        `tables` have the columns of ITEMS_SCHEMA, then the pass-through columns. Failed items are pending if
        `retry` holds "failed" or their error code, and those that were the world's fault always. Succeeded ones are if
        their video is missing or damaged and `remake` holds that word; a damaged video is moved aside. So are
        those that `retaking` names, whose video stays. Rejected items become failed rows at once. If `tables` raises,
        nothing is kept. Of several `partition`s all items are written down, and its own alone are pending and counted.
        """
        self._is_shared = partition[1] > 1
        with _temporary_folder() as folder:
            with output_errors(self.output):
                lost = lost_videos(self.output, self.index, remake)
            planner = Planner(self.index, frozenset(retry), folder, lost=lost, retaking=retaking, partition=partition)
            for table in tables:
                planner.add(table)
            paths = planner.close()
            with output_errors(self.output):
                self.quarantine_damaged()
                self._forget(planner.remade())
                items_uri = layout.items_uri(self.output, run.run_id)
                for path in paths:
                    storage.upload_file(path, storage.join(items_uri, path.name))
                now = storage.clock(self.output)
                for rejected in rejected_rows(paths, run, at=now) if planner.num_newly_rejected else ():
                    part = stamped(self.output, rejected, after=self.index)
                    self.index.add(write_part(self.output, part), part)
                self._end_stale_attempts()
                attempts.name_first_attempts(self.output)
                run = dataclasses.replace(run, planned_at=storage.clock(self.output), counts=planner.counts)
                runs.write_run(self.output, run)
                runs.prune_items(self.output, current=run.run_id, num_partitions=partition[1])
        if len(self.index.part_uris) > MANY_PARTS:
            self.compact()
        return Planned(run=run, items_uri=items_uri, **planner.counts)

    def quarantine_damaged(self) -> None:
        """Moves damaged parts aside, so that they are reported once."""
        for uri in list(self.index.damaged):
            quarantine(self.output, uri)
            del self.index.damaged[uri]

    def append(self, rows: Iterable[ResultRow]) -> None:
        """Takes finished rows; they are written 64 at a time or after 30 s."""
        self._writer.append(rows)

    def rewrite(self, rows: Sequence[ResultRow]) -> None:
        """Records rows in place of those with their work keys; they are written before this returns."""
        self.flush()
        with output_errors(self.output):
            for begin in range(0, len(rows), FULL_PART_ROWS):
                table = to_table(rows[begin : begin + FULL_PART_ROWS])
                part = stamped(self.output, table, after=self.index)
                self.index.add(write_part(self.output, part), part)

    def flush_if_due(self) -> None:
        """Writes rows that have waited for 30 s; to be called now and then while no rows come."""
        self._writer.flush_if_due()

    def flush(self) -> None:
        """Writes the rows that wait, now."""
        self._writer.flush()

    def finish(self, run: RunRecord) -> RunRecord:
        """The run with its end, which is written after what waits and the results table."""
        self.flush()
        self._end_stale_attempts()
        self.write_results()
        # The last partition to write leaves the rows of all: each one writes after its own rows, and again where others
        # have recorded some meanwhile.
        for _ in range(_REWRITES):
            if self._is_shared and self._has_new_parts():
                self.write_results()
        with output_errors(self.output):
            run = dataclasses.replace(run, finished_at=storage.clock(self.output))
            runs.write_run(self.output, run)
        return run

    def write_results(self, run_id: str | None = None) -> int:
        """The number of rows of `results.parquet`, which is written anew.

        One row per work item of that run's manifest (the latest run's if none is named), in its order, with the
        pass-through columns. Items that have not ended yet are left out until they have. Where no run's items are
        kept, every row of the ledger, by time. Memory is bounded: rows are sorted through files on this machine.

        In a run of a partition it has the rows of the others too, as far as they are recorded.
        """
        self.flush()
        if self._is_shared:
            with output_errors(self.output):
                self.index.replace_by(read_index(self.output))
        with output_errors(self.output), _temporary_folder() as folder:
            if run_id is None:
                latest = runs.latest_run(self.output)
                run_id = latest.run_id if latest is not None else None
            path = folder / "results.parquet"
            for _ in range(_TRIES):
                writer = ResultsWriter(self.output, self.index, run_id, folder)
                num_rows = writer.write(path)
                if not writer.num_gone:
                    break
                num_known = len(self.index.winners)
                self.index.replace_by(read_index(self.output))  # another process has compacted the ledger
                if not self._is_shared:
                    self._num_deleted += max(0, num_known - len(self.index.winners))
            storage.upload_file(path, layout.results_uri(self.output), content_type="application/vnd.apache.parquet")
        return num_rows

    def check_kept(self) -> None:
        """Nothing, where the rows that this process has read or written are still there.

        Raises:
            OutputError: something has deleted some meanwhile.
        """
        if self._num_deleted:
            raise OutputError(
                f"{count_of(self._num_deleted, 'row')} that had ended are no longer in {self.output}: something has "
                "deleted them during the run. The same command animates them anew."
            )

    def _has_new_parts(self) -> bool:
        """Whether another process has recorded rows that the index lacks."""
        with output_errors(self.output):
            known = {*self.index.part_uris, *self.index.damaged}
            return any(part.uri not in known for part in storage.list_objects(layout.parts_uri(self.output)))

    def compact(self) -> tuple[int, int]:
        """The number of parts before and after small ones, and those with many rows that lost, are put together.

        What is new is durable before anything is dropped, so a crash leaves equal rows twice, which count once.
        """
        self.flush()
        with output_errors(self.output):
            self.quarantine_damaged()
            index = read_index(self.output)
            positions = np.arange(len(index.winners))
            used = np.bincount(index.winners.part, minlength=len(index.part_uris))
            sizes = np.array(index.part_sizes, np.int64)
            old = (sizes < FULL_PART_ROWS // 2) | (used < _STALE * sizes)
            num_before = len(index.part_uris)
            if old.sum() > 1 or (used < sizes)[old].any():
                dropped = [uri for uri, is_old in zip(index.part_uris, old, strict=True) if is_old]
                self._rewrite(index, positions[old[index.winners.part]], dropped)
            self.index.replace_by(read_index(self.output))
            storage.sweep(self.output)
        return num_before, len(self.index.part_uris)

    def _forget(self, positions: np.ndarray[Any, Any]) -> None:
        """Drops the rows of these winners, and what is left of their videos, so that they are not done."""
        if not len(positions):
            return
        _log.warning("%s missing or damaged: made again", count_of(len(positions), "video"))
        high, low = self.index.winners.high[positions], self.index.winners.low[positions]
        # The video first: without its row, a damaged one would be adopted as that of a run that was killed.
        move_damaged_aside(self.output, high)
        while True:
            positions = self.index.find(high, low)
            positions = positions[positions >= 0]
            if not len(positions):
                return
            parts = self.index.winners.part
            touched = np.unique(parts[positions])
            kept = np.setdiff1d(np.flatnonzero(np.isin(parts, touched)), positions)
            self._rewrite(self.index, kept, [self.index.part_uris[part] for part in touched])
            self.index.replace_by(read_index(self.output))  # rows that had lost against these may be there still

    def _rewrite(self, index: Index, chosen: np.ndarray[Any, Any], dropped: list[str]) -> None:
        waiting: list[pa.Table] = []
        aside: set[str] = set()
        for uri, table, _ in read_winners(index, chosen):
            if isinstance(table, pa.Table):
                waiting.append(table)
            elif table is not None:  # damaged in a column that the index does not read
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
            attempts.end_stale_attempts(self.output, [keys[position] for position in np.flatnonzero(found >= 0)])


@contextlib.contextmanager
def output_errors(output: str) -> Iterator[None]:
    """Turns errors of the store into the one that stops the run."""
    try:
        yield
    except StorageError as error:
        kind = OutputUnavailable if error.retryable else OutputError
        raise kind(f"the output {output} cannot be used: {error.message}") from error


@contextlib.contextmanager
def _temporary_folder() -> Iterator[Path]:
    """A folder of this machine for the block.

    Raises:
        OutputError: the system refuses a file in it, such as for want of space; the block has no other OSErrors.
    """
    try:
        with temporary_folder() as folder:
            yield folder
    except OSError as error:
        raise OutputError(
            f"temporary files cannot be written ({error.strerror or error}): free some space, or set TMPDIR to a "
            "folder that exists and has more"
        ) from error
