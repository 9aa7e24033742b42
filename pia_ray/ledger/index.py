"""The row that wins for each work key, over all parts of a ledger.

One row per work key wins: succeeded before failed, then the one that was recorded last, by the store's clock. The
clocks of workers play no part: a row that is finished later may say an earlier time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pia_ray.errors import LedgerError
from pia_ray.result_row import APPROVED, REJECTED, SUCCEEDED

REVIEWS: Final = (APPROVED, REJECTED)

_NO_CODE: Final = -1
_HEX: Final = np.full(256, 255, np.uint8)
_HEX[np.frombuffer(b"0123456789abcdef", np.uint8)] = np.arange(16, dtype=np.uint8)

_Array = np.ndarray[Any, Any]


def split_keys(keys: pa.ChunkedArray | pa.Array) -> tuple[_Array, _Array]:
    """The first 128 bits of each work key as two uint64 arrays: 16 bytes a row where text would take 113.

    Raises:
        LedgerError: one of them is not 64 hex digits.
    """
    chunks = keys.chunks if isinstance(keys, pa.ChunkedArray) else [keys]
    halves = [_split_chunk(chunk) for chunk in chunks if len(chunk)]
    if not halves:
        return np.empty(0, np.uint64), np.empty(0, np.uint64)
    both = np.concatenate(halves)  # [N, 2]
    return np.ascontiguousarray(both[:, 0]), np.ascontiguousarray(both[:, 1])


def _split_chunk(keys: pa.Array) -> _Array:
    lengths = pc.min_max(pc.binary_length(keys))
    if keys.null_count or lengths["min"].as_py() != 64 or lengths["max"].as_py() != 64:
        raise LedgerError("a work key is not 64 hex digits")
    keys = keys.cast(pa.string())
    first = int(np.frombuffer(keys.buffers()[1], np.int32)[keys.offset])
    text = np.frombuffer(keys.buffers()[2], np.uint8, count=len(keys) * 64, offset=first)
    digits = _HEX[text.reshape(-1, 64)[:, :32]]  # [N, 32], values 0 to 15
    if (digits > 15).any():
        raise LedgerError("a work key is not 64 hex digits")
    return (digits[:, 0::2] << 4 | digits[:, 1::2]).view(">u8").astype(np.uint64)  # [N, 2]


@dataclass(frozen=True)
class Entries:
    """One entry per row of some parts, as parallel arrays: about 36 bytes a row."""

    high: _Array
    """uint64, first half of the key."""
    low: _Array
    succeeded: _Array
    code: _Array
    """int16, position in the index's list of error codes; -1 for none."""
    review: _Array
    """int8, position in REVIEWS of a person's last verdict; -1 for none."""
    recorded_us: _Array
    part: _Array
    """int32, position in the index's list of parts."""
    row: _Array

    def __len__(self) -> int:
        return len(self.high)

    def take(self, positions: _Array) -> Entries:
        """The entries at those positions."""
        return Entries(*(column[positions] for column in vars(self).values()))


def _empty() -> Entries:
    kinds = (np.uint64, np.uint64, np.bool_, np.int16, np.int8, np.int64, np.int32, np.int32)
    return Entries(*(np.empty(0, kind) for kind in kinds))


@dataclass
class Index:
    """The part and position of the winning row of each work key, read once from all parts; then it grows by `add`."""

    part_uris: list[str] = field(default_factory=list)
    part_sizes: list[int] = field(default_factory=list)
    """Rows of each part, those that lost included."""
    codes: list[str] = field(default_factory=list)
    damaged: dict[str, str] = field(default_factory=dict)
    """Parts that could not be read, and why."""
    latest_us: int = 0
    """Time of the row that was recorded last."""
    _batches: list[Entries] = field(default_factory=list)
    _winners: Entries | None = None

    @property
    def winners(self) -> Entries:
        """One entry per work key, ordered by key."""
        if self._winners is None:
            self._winners = _choose(self._batches)
            self._batches = [self._winners]
        return self._winners

    def add(self, uri: str, table: pa.Table, *, written_at: datetime | None = None) -> None:
        """Counts the rows of a part in, which was written at that time by the store's clock.

        Raises:
            LedgerError: its columns are not those of the ledger.
        """
        try:
            high, low = split_keys(table["work_key"])
            if table["status"].null_count or table["finished_at"].null_count:
                raise LedgerError("not a part of the ledger: a row without status or time")
            succeeded = pc.equal(table["status"], SUCCEEDED).to_numpy()
            codes = table["error_code"].combine_chunks().dictionary_encode()
            review = pc.index_in(table["review"], pa.array(REVIEWS)).fill_null(-1).to_numpy().astype(np.int8)
            recorded = _recorded_us(table, written_at)
        except (KeyError, pa.ArrowException) as error:
            raise LedgerError(f"not a part of the ledger: {error}") from None
        number = len(self.part_uris)
        self.part_uris.append(uri)
        self.part_sizes.append(len(high))
        self._batches.append(
            Entries(
                high=high,
                low=low,
                succeeded=succeeded.astype(np.bool_),
                code=self._code_places(codes),
                review=review,
                recorded_us=recorded,
                part=np.full(len(high), number, np.int32),
                row=np.arange(len(high), dtype=np.int32),
            )
        )
        self.latest_us = max(self.latest_us, int(recorded.max(initial=0)))
        self._winners = None

    def replace_by(self, other: Index) -> None:
        """Becomes a copy of another index; for after parts were moved."""
        vars(self).update(vars(other))

    def find(self, high: _Array, low: _Array) -> _Array:
        """The position of each key in `winners`, or -1."""
        return find_keys(self.winners.high, self.winners.low, high=high, low=low)

    def _code_places(self, codes: pa.Array) -> _Array:
        codes = codes if isinstance(codes, pa.DictionaryArray) else codes.chunk(0)
        positions = []
        for code in codes.dictionary.to_pylist():
            if code not in self.codes:
                self.codes.append(code)
            positions.append(self.codes.index(code))
        table = np.array([*positions, _NO_CODE], np.int16)
        chosen: _Array = table[codes.indices.fill_null(len(positions)).to_numpy(zero_copy_only=False)]
        return chosen


def find_keys(known_high: _Array, known_low: _Array, *, high: _Array, low: _Array) -> _Array:
    """The position of each key among the known ones, which are in order; -1 for a key that is not among them."""
    positions = np.searchsorted(known_high, high)
    found = np.full(len(high), -1, np.int64)
    open_ = np.arange(len(high))
    while len(open_):  # once but for two keys that share their first 64 bits
        open_ = open_[positions[open_] < len(known_high)]
        open_ = open_[known_high[positions[open_]] == high[open_]]
        same = known_low[positions[open_]] == low[open_]
        found[open_[same]] = positions[open_[same]]
        open_ = open_[~same]
        positions[open_] += 1
    return found


def _recorded_us(table: pa.Table, written_at: datetime | None) -> _Array:
    """Microseconds since 1970 of when each row was recorded.

    A row of an earlier version has a worker's time of finishing only, which counts up to when its part was written.
    """
    kind = pa.timestamp("us", tz="UTC")
    times: pa.ChunkedArray = table["finished_at"].cast(kind)
    if written_at is not None:
        latest = pa.scalar(written_at, kind)
        times = pc.if_else(pc.greater(times, latest), latest, times)
    if "recorded_at" in table.column_names:
        times = pc.coalesce(table["recorded_at"].cast(kind), times)
    recorded: _Array = times.cast(pa.int64()).to_numpy()
    return recorded


def _choose(batches: Sequence[Entries]) -> Entries:
    if not batches:
        return _empty()
    columns = zip(*(vars(batch).values() for batch in batches), strict=True)
    entries = Entries(*(np.concatenate(column) for column in columns))
    order = np.lexsort((entries.recorded_us, entries.succeeded, entries.low, entries.high))
    entries = entries.take(order)
    last = np.ones(len(entries), np.bool_)
    last[:-1] = (entries.high[1:] != entries.high[:-1]) | (entries.low[1:] != entries.low[:-1])
    return entries.take(last)
