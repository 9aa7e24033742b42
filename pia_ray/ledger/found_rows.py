"""Rows of a ledger by work key or by id, to be changed and recorded anew."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pia_ray.ledger import runs
from pia_ray.ledger.index import split_keys
from pia_ray.ledger.ledger import Ledger, output_errors
from pia_ray.ledger.parts import read_winners
from pia_ray.ledger.results import from_table
from pia_ray.ledger.results_writer import winners_of
from pia_ray.result_row import ResultRow


def keys_of(ledger: Ledger, ids: Collection[str]) -> dict[tuple[str, int], list[str]]:
    """The work keys of rows with these ids, by id and video index; of the latest manifest's rows that have ended."""
    found: dict[tuple[str, int], list[str]] = {}
    if not ids:
        return found
    with output_errors(ledger.output):
        run = runs.latest_run(ledger.output)
        positions, _ = winners_of(ledger.output, ledger.index, run.run_id if run is not None else None)
        positions = np.unique(positions[positions >= 0])
        wanted = pa.array(sorted(ids), pa.string())
        for _, table, _ in read_winners(ledger.index, positions, columns=["id", "video_index", "work_key"]):
            if isinstance(table, pa.Table):
                for row in table.filter(pc.is_in(table["id"], wanted)).to_pylist():
                    found.setdefault((row["id"], row["video_index"]), []).append(row["work_key"])
    return found


def rows_of(ledger: Ledger, work_keys: Collection[str]) -> dict[str, ResultRow]:
    """The rows of these work keys by work key; those that are not there are left out."""
    positions: np.ndarray[Any, Any] = ledger.index.find(*split_keys(pa.array(sorted(work_keys), pa.string())))
    found: dict[str, ResultRow] = {}
    with output_errors(ledger.output):
        for _, table, _ in read_winners(ledger.index, np.unique(positions[positions >= 0])):
            if isinstance(table, pa.Table):
                found |= {row.work_key: row for row in from_table(table)}
    return found
