"""`results.parquet`: one row per work item of the latest manifest, written atomically."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pia_ray.errors import LedgerError
from pia_ray.ledger import runs
from pia_ray.ledger.index import Index, split_keys
from pia_ray.ledger.parts import quarantine, read_winners
from pia_ray.ledger.planning import ITEMS_ROWS
from pia_ray.ledger.results import RESULTS_SCHEMA

_log = logging.getLogger(__name__)

_SPILLS: Final = 200
_STRETCH_ROWS: Final = 10_000
"""Rows of the results that are in memory at once; more where there would be more stretches than `_SPILLS`."""


class ResultsWriter:
    """Writes rows that lie in parts, in the order they were finished, in the order of the manifest.

    Each part is read once: its rows go into spill files, one per stretch of the manifest, and each stretch is sorted
    by itself. So it does not matter how far the two orders differ.
    """

    def __init__(self, output: str, index: Index, run_id: str | None, folder: Path) -> None:
        self._output = output
        self._index = index
        self._run_id = run_id
        self._folder = folder
        self.num_gone = 0

    def write(self, path: Path) -> int:
        """The number of rows that were written to the file."""
        winners, _ = winners_of(self._output, self._index, self._run_id)
        ended = np.flatnonzero(winners >= 0)
        stretches = ended // max(_STRETCH_ROWS, -(-len(winners) // _SPILLS))
        spills = self._spill(winners[ended], ended, stretches)
        num_rows = 0
        passed = iter(()) if self._run_id is None else runs.read_passed(self._output, self._run_id)
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
                writer.write_table(table.cast(schema), row_group_size=_STRETCH_ROWS)
                num_rows += len(table)
        return num_rows

    def _spill(
        self, chosen: np.ndarray[Any, Any], positions: np.ndarray[Any, Any], stretches: np.ndarray[Any, Any]
    ) -> dict[int, Path]:
        schema = RESULTS_SCHEMA.append(pa.field("position", pa.int64()))
        paths: dict[int, Path] = {}
        with contextlib.ExitStack() as stack:
            writers: dict[int, Any] = {}
            for uri, table, which in read_winners(self._index, chosen, columns=RESULTS_SCHEMA.names):
                if not isinstance(table, pa.Table):
                    self._lost(uri, table, len(which))
                    continue
                table = table.append_column(schema.field("position"), pa.array(positions[which]))
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
            _log.warning("%s is damaged (%s): the next run searches its %d rows anew", uri, error.message, num_rows)
            quarantine(self._output, uri)


def winners_of(output: str, index: Index, run_id: str | None) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """The index in `index.winners` of each item of a run, in order, or -1; and the number of its items file.

    All keys count as items where `run_id` is None.
    """
    if run_id is None:
        num_keys = len(index.winners)
        return np.arange(num_keys), np.arange(num_keys) // ITEMS_ROWS
    winners, files = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for number, items in enumerate(runs.read_items(output, run_id, columns=["work_key"])):
        high, low = split_keys(items["work_key"])
        winners.append(index.find(high, low))
        files.append(np.full(len(high), number, np.int64))
    return np.concatenate(winners), np.concatenate(files)


class _Rows:
    """Rows of a stream of tables by position; positions only grow from call to call."""

    def __init__(self, first: pa.Table | None, rest: Iterator[pa.Table]) -> None:
        self._table = first
        self._rest = rest
        self._begin = 0

    def take(self, positions: np.ndarray[Any, Any]) -> list[tuple[pa.Field, pa.ChunkedArray]]:
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
