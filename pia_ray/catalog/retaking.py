"""`RetakePlan`: which rows of an earlier run are animated again for their numbers, by the rows of its ledger alone."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Final

import numpy as np
import pyarrow as pa

from pia_ray.catalog.policies import policy_of
from pia_ray.config.catalog import CatalogConfig
from pia_ray.errors import BadParameter
from pia_ray.result_row import APPROVED, JUDGED, REJECTED, SUCCEEDED
from pia_ray.takes import Policy, Take, next_take, takes_from_json

STORED: Final = ("status", "seed", "gpu_s", "run_id", *JUDGED, "take", "takes", "review", "review_note")
"""The columns of results that takes are told by."""


class RetakePlan:
    """A `ledger.Retaking` by the policy of a run and the cells `accept` and `retakes` of its rows."""

    stored_columns = STORED

    def __init__(self, config: CatalogConfig) -> None:
        self._config = config
        self._policy = lru_cache(1000)(self._policy_of)
        self._fault = lru_cache(1000)(self._fault_of)

    def cells(self, items: pa.Table) -> tuple[pa.Array, pa.Array] | None:
        """The items' own cells `accept` and `retakes`, as text; None where no item has bounds."""
        own = [name for name in ("accept", "retakes") if self._is_own(name, items)]
        if not self._config.accept and "accept" not in own:
            return None
        accept, retakes = (
            _text(items[name]) if name in own else pa.nulls(len(items), pa.string()) for name in ("accept", "retakes")
        )
        return accept, retakes

    def faults(self, items: pa.Table) -> list[BadParameter | None]:
        """The error of each item whose own cells are not valid."""
        if (cells := self.cells(items)) is None:
            return [None] * len(items)
        columns = (items["style"], *cells)
        return [self._fault(*key) for key in zip(*(column.to_pylist() for column in columns), strict=True)]

    def again(self, items: pa.Table, *, accept: pa.Array, retakes: pa.Array, stored: pa.Table) -> np.ndarray[Any, Any]:
        """A mask of the items to animate again; `stored` are their rows in the ledger, in the same order."""
        mask = np.zeros(len(items), np.bool_)
        keys = list(zip(items["style"].to_pylist(), accept.to_pylist(), retakes.to_pylist(), strict=True))
        groups: dict[tuple[str, str | None, str | None], list[int]] = {}
        for place, key in enumerate(keys):
            groups.setdefault(key, []).append(place)
        for key, places in groups.items():
            policy = self._policy(*key)
            if policy is not None:
                rows = stored.take(pa.array(places))
                review = rows["review"].to_numpy()
                doubtful = (~meets(policy, rows) & (review != APPROVED)) | (review == REJECTED)
                for row in np.flatnonzero(doubtful).tolist():
                    (record,) = rows.slice(row, 1).to_pylist()
                    mask[places[row]] = is_open(policy, record)
        return mask

    def _is_own(self, name: str, items: pa.Table) -> bool:
        """Whether the items have the column, and no setting says that it passes through only."""
        passes = self._config.knobs is not None or name in self._config.not_knobs
        return name in items.column_names and not passes

    def _policy_of(self, style: str, accept: str | None, retakes: str | None) -> Policy | None:
        """The policy of such rows; None where a cell is not valid, which the row's worker says."""
        try:
            return policy_of(self._config, style=style, accept=accept, retakes=retakes)
        except BadParameter:
            return None

    def _fault_of(self, style: str, accept: str | None, retakes: str | None) -> BadParameter | None:
        try:
            policy_of(self._config, style=style, accept=accept, retakes=retakes)
        except BadParameter as error:
            return error
        return None


def meets(policy: Policy, rows: pa.Table) -> np.ndarray[Any, Any]:
    """A mask of the rows, with the columns STORED, whose video meets every bound."""
    found: np.ndarray[Any, Any] = np.asarray(rows["status"].to_numpy() == SUCCEEDED, np.bool_)
    for bound in policy.bounds:
        values = rows[bound.number].to_numpy().astype(np.float64)  # NaN where it was not measured
        with np.errstate(invalid="ignore"):
            found &= ~(values < bound.value if bound.at_least else values > bound.value)
    return found


def is_open(policy: Policy, record: Mapping[str, Any]) -> bool:
    """Whether another take of the row with these columns STORED is to be made."""
    published = (record["take"] or 0) if record["status"] == SUCCEEDED else None
    return next_take(stored_takes(record), policy, published=published) is not None


def stored_takes(record: Mapping[str, Any]) -> tuple[Take, ...]:
    """The takes of a row with these columns STORED."""
    if record["takes"] is not None:
        return takes_from_json(record["takes"])
    if record["status"] != SUCCEEDED:
        return ()
    scores = {name: record[name] for name in JUDGED}
    return (Take(0, record["seed"], scores, gpu_s=record["gpu_s"], run_id=record["run_id"]),)


def _text(column: pa.ChunkedArray) -> pa.Array:
    """The cells as text; an empty one is null."""
    texts = [None if cell is None or str(cell).strip() == "" else str(cell) for cell in column.to_pylist()]
    return pa.array(texts, pa.string())
