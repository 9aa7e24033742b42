"""The items of a run: planned, sorted into done and pending, and written down for the workers."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pia_ray.config.catalog import RETRY_ALL
from pia_ray.errors import BadParameter, row_errors
from pia_ray.ledger.index import Index, split_keys
from pia_ray.ledger.results import RESULTS_SCHEMA
from pia_ray.ledger.retaking import RETAKE_COLUMNS, Retaking, StoredTakes
from pia_ray.ledger.runs import COLUMN_PREFIX, RunRecord
from pia_ray.manifest import ITEMS_SCHEMA
from pia_ray.result_row import ResultRow

ITEMS_ROWS: Final = 50_000
"""Rows of one items file, and of one row group of `results.parquet`."""

ITEMS_BYTES: Final = 128 * 2**20
"""Rows that wait for an items file take no more memory: pictures may be inside them, as data: URLs."""


PLANNED_SCHEMA: Final = pa.schema(
    [
        *ITEMS_SCHEMA,
        ("pending", pa.bool_()),
        ("newly_rejected", pa.bool_()),
        *((name, pa.string()) for name in RETAKE_COLUMNS),
    ]
)
"""The columns of an items file before the pass-through ones."""


ROW_COLUMNS: Final = (*ITEMS_SCHEMA.names, *RETAKE_COLUMNS)
"""The columns that a worker needs of an item, for `manifest.row_from_item`."""


@dataclass(frozen=True)
class Planned:
    """The work items of a run, or of its partition, by what is to be done; the counts add up to `num_items`."""

    run: RunRecord
    items_uri: str
    """Parquet files with the columns of ITEMS_SCHEMA, `pending`, and pass-through columns named `manifest:<name>`."""
    num_items: int
    num_pending: int
    num_succeeded_before: int
    num_failed_before: int
    """Failed in an earlier run and not to be tried again."""
    num_rejected: int


class Sorted(NamedTuple):
    """Masks over planned items."""

    known: np.ndarray[Any, Any]
    """Those that have ended in an earlier run."""
    succeeded: np.ndarray[Any, Any]
    rejected: np.ndarray[Any, Any]
    pending: np.ndarray[Any, Any]


def sort_items(index: Index, table: pa.Table, *, retry: Collection[str], lost: np.ndarray[Any, Any]) -> Sorted:
    """Masks of the done, bad and pending items of a table with the columns of ITEMS_SCHEMA, as `Ledger.plan` says.

    `lost` is a mask over `index.winners`: rows that count as not done.
    """
    positions = index.find(*split_keys(table["work_key"]))
    known = positions >= 0
    known[known] = ~lost[positions[known]]
    winners = index.winners
    succeeded = np.zeros(len(positions), np.bool_)
    succeeded[known] = winners.succeeded[positions[known]]
    again = np.zeros(len(positions), np.bool_)
    wanted = {*retry, *(code for code, kind in row_errors().items() if kind.fault == "world")}
    named = [code for code, text in enumerate(index.codes) if text in wanted]
    again[known] = RETRY_ALL in retry or np.isin(winners.code[positions[known]], named)
    rejected = pc.is_valid(table["error_message"]).to_numpy() & ~succeeded
    return Sorted(known, succeeded, rejected, pending=~succeeded & ~rejected & (~known | again))


class Planner:
    """Sorts items into done and pending, and writes them to local files."""

    def __init__(
        self,
        index: Index,
        retry: frozenset[str],
        folder: Path,
        *,
        lost: np.ndarray[Any, Any],
        retaking: Retaking | None = None,
        partition: tuple[int, int] = (1, 1),
    ) -> None:
        self._index = index
        self._partition = partition
        self._lost = lost
        self._remade: list[np.ndarray[Any, Any]] = []
        self._retry = retry
        self._stored = StoredTakes(index, retaking)
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
        known, succeeded, rejected, pending = sort_items(self._index, table, retry=self._retry, lost=self._lost)
        retakes = self._stored.of(table, lost=self._lost)
        own = self._own(table)
        pending, succeeded = (pending | retakes.again) & own, succeeded & ~retakes.again
        if self._lost.any():
            positions = self._index.find(*split_keys(table["work_key"]))
            self._remade.append(positions[pending & ~known & (positions >= 0)])
        newly_rejected = rejected & ~known & own
        self.num_newly_rejected += int(newly_rejected.sum())
        counts = self.counts
        counts["num_items"] += int(own.sum())
        counts["num_pending"] += int(pending.sum())
        counts["num_succeeded_before"] += int((succeeded & own).sum())
        counts["num_rejected"] += int((rejected & own).sum())
        counts["num_failed_before"] += int((~succeeded & ~rejected & ~pending & own).sum())
        # Columns by position: a pass-through column may have any name that no results column has.
        num_own = len(ITEMS_SCHEMA)
        flags = (pa.array(pending), pa.array(newly_rejected))
        columns = [*table.columns[:num_own], *flags, *retakes.columns, *table.columns[num_own:]]
        passed = [field.with_name(f"{COLUMN_PREFIX}{field.name}") for field in list(table.schema)[num_own:]]
        schema = pa.schema([*PLANNED_SCHEMA, *passed])
        if self._schema is None:
            self._schema = schema
        self._waiting.append(pa.table(columns, schema=schema).cast(self._schema))
        self._num_waiting += len(table)
        while self._num_waiting >= ITEMS_ROWS:
            self._write(ITEMS_ROWS)
        if sum(waiting.nbytes for waiting in self._waiting) > ITEMS_BYTES:
            self._write(self._num_waiting)

    def _own(self, table: pa.Table) -> np.ndarray[Any, Any]:
        """A mask of the items in this partition: by their keys, so that they are of all styles and pictures alike."""
        number, of = self._partition
        if of == 1:
            return np.ones(len(table), np.bool_)
        own: np.ndarray[Any, Any] = split_keys(table["work_key"])[1] % of == number - 1
        return own

    def remade(self) -> np.ndarray[Any, Any]:
        """Positions in `index.winners` of the lost rows that are pending again."""
        return np.unique(np.concatenate([np.empty(0, np.int64), *self._remade]))

    def close(self) -> list[Path]:
        if self._num_waiting or not self._paths:
            self._write(self._num_waiting)
        return self._paths

    def _write(self, num_rows: int) -> None:
        if self._schema is None:
            self._schema = PLANNED_SCHEMA
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


def rejected_rows(paths: Iterable[Path], run: RunRecord, *, at: datetime) -> Iterator[pa.Table]:
    """Failed result rows, a table per items file, for rejected items that have no row yet."""
    # The cells that are the same in every row; the others are the items' own.
    same = ResultRow.failed(
        BadParameter("", ""),
        id="",
        work_key="",
        image_uri="",
        params=None,
        model=run.model,
        run_id=run.run_id,
        worker="planner",
        attempts=0,
        finished_at=at,
    )
    for path in paths:
        items = pq.read_table(path, columns=[*ITEMS_SCHEMA.names, "newly_rejected"])
        items = items.filter(items["newly_rejected"])
        if not len(items):
            continue
        columns = []
        for field in RESULTS_SCHEMA:
            source = "image" if field.name == "image_uri" else field.name
            if source in items.column_names:
                columns.append(items[source].cast(field.type))
            else:
                columns.append(pa.repeat(pa.scalar(getattr(same, field.name), field.type), len(items)))
        yield pa.table(columns, schema=RESULTS_SCHEMA)
