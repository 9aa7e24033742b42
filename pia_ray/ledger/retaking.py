"""Planned items whose video is there but is to be animated again for its numbers, as a `Retaking` decides."""

from __future__ import annotations

from typing import Any, Final, NamedTuple, Protocol

import numpy as np
import pyarrow as pa

from pia_ray.errors import NotAccepted
from pia_ray.ledger.index import Index, split_keys
from pia_ray.ledger.parts import read_winners
from pia_ray.ledger.results import RESULTS_SCHEMA
from pia_ray.result_row import SUCCEEDED

RETAKE_COLUMNS: Final = ("accept", "retakes", "takes", "review_note")
"""Columns of planned items after `pending`: the row's own policy, and of results the takes that were tried and the note
of their review."""


class Retaking(Protocol):
    """Decides which rows of the ledger are animated again for their numbers."""

    @property
    def stored_columns(self) -> tuple[str, ...]:
        """The columns of results that `again` needs, `status`, `takes` and `review_note` among them."""

    def cells(self, items: pa.Table) -> tuple[pa.Array, pa.Array] | None:
        """The items' own cells `accept` and `retakes`, as text; None where no item has bounds."""

    def again(self, items: pa.Table, *, accept: pa.Array, retakes: pa.Array, stored: pa.Table) -> np.ndarray[Any, Any]:
        """A mask of the items to animate again; `stored` are their rows in the ledger, in the same order."""


class Retakes(NamedTuple):
    """The retakes of planned items, one entry each."""

    again: np.ndarray[Any, Any]
    """A mask of those whose row in the ledger is not the end of them."""
    columns: tuple[pa.Array, ...]
    """RETAKE_COLUMNS."""


class StoredTakes:
    """The numbers and takes of an output's rows, read from its ledger once they are needed; no video is opened."""

    def __init__(self, index: Index, retaking: Retaking | None) -> None:
        self._index = index
        self._retaking = retaking
        self._table: pa.Table | None = None
        self._is_of_all = False
        self._place = np.empty(0, np.int64)

    def of(self, items: pa.Table, *, lost: np.ndarray[Any, Any]) -> Retakes:
        """The retakes of a table with the columns of ITEMS_SCHEMA; `lost` as in `sort_items`."""
        none = pa.nulls(len(items), pa.string())
        again = np.zeros(len(items), np.bool_)
        if self._retaking is None:
            return Retakes(again, (none,) * len(RETAKE_COLUMNS))
        cells = self._retaking.cells(items)
        accept, retakes = cells or (none, none)
        stored = self._stored(of_all=cells is not None)
        positions = self._index.find(*split_keys(items["work_key"]))
        places = np.full(len(items), -1, np.int64)
        places[positions >= 0] = self._place[positions[positions >= 0]]
        rows = np.flatnonzero(places >= 0)
        if not len(rows):
            return Retakes(again, (accept, retakes, none, none))
        found = stored.take(pa.array(places[rows]))
        chosen = pa.array(rows)
        is_lost = lost[positions[rows]]
        again[rows] = ~is_lost & self._retaking.again(
            items.take(chosen), accept=accept.take(chosen), retakes=retakes.take(chosen), stored=found
        )
        passed = again.copy()
        # `--retry` may want those that failed. A lost video of a reviewed row is made again as the take that it was.
        passed[rows] |= (found["status"].to_numpy() != SUCCEEDED) & ~is_lost
        passed[rows] |= is_lost & (self._index.winners.review[positions[rows]] >= 0)
        kept = pa.array(places, mask=~passed)
        texts, notes = (stored[name].combine_chunks().take(kept) for name in ("takes", "review_note"))
        return Retakes(again, (accept, retakes, texts, notes))

    def _stored(self, *, of_all: bool) -> pa.Table:
        """The rows that succeeded, or of them the reviewed ones alone, and those whose takes all missed."""
        if self._table is None or of_all > self._is_of_all:
            self._is_of_all = of_all
            assert self._retaking is not None
            winners = self._index.winners
            codes = [number for number, code in enumerate(self._index.codes) if code == NotAccepted.code]
            wanted = winners.succeeded if of_all else winners.review >= 0
            chosen = np.flatnonzero(wanted | np.isin(winners.code, codes))
            columns = list(self._retaking.stored_columns)
            tables = [pa.schema([RESULTS_SCHEMA.field(name) for name in columns]).empty_table()]
            self._place = np.full(len(winners), -1, np.int64)
            begin = 0
            for _, table, which in read_winners(self._index, chosen, columns=columns):
                if isinstance(table, pa.Table):
                    self._place[chosen[which]] = np.arange(begin, begin + len(table))
                    tables.append(table.select(columns).cast(tables[0].schema))
                    begin += len(table)
            self._table = pa.concat_tables(tables)
        return self._table
