"""The ledger's parts: small immutable Parquet files of result rows, and the row that wins for each work key.

One row per work key wins: succeeded before failed, then the newest.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pia_ray import storage
from pia_ray.errors import LedgerError, OutputError, StorageDamaged, StorageError, StorageNotFound
from pia_ray.ledger import layout
from pia_ray.ledger.results import conform, read_parquet, to_table
from pia_ray.types import SUCCEEDED, ResultRow

PART_ROWS: Final = 64
PART_S: Final = 30.0
MERGED_ROWS: Final = 8192
"""A writer puts its small parts together when they have so many rows, so that a ledger of millions opens fast."""
PATIENCE_S: Final = 600.0
"""Seconds that rows wait in memory for a store that does not answer, before the run stops."""

_READERS: Final = 16
_LISTINGS: Final = 5
"""Times that a reader starts over while writers move parts."""
_INDEX_COLUMNS: Final = ("work_key", "status", "error_code", "finished_at")
_NO_CODE: Final = -1
_HEX: Final = np.full(256, 255, np.uint8)
_HEX[np.frombuffer(b"0123456789abcdef", np.uint8)] = np.arange(16, dtype=np.uint8)

_log = logging.getLogger(__name__)
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
    """One entry per row of some parts, as parallel arrays: about 35 bytes a row."""

    high: _Array
    """uint64, first half of the key."""
    low: _Array
    succeeded: _Array
    code: _Array
    """int16, position in the index's list of error codes; -1 for none."""
    finished_us: _Array
    part: _Array
    """int32, position in the index's list of parts."""
    row: _Array

    def __len__(self) -> int:
        return len(self.high)

    def take(self, positions: _Array) -> Entries:
        """The entries at those positions."""
        return Entries(*(column[positions] for column in vars(self).values()))


def _empty() -> Entries:
    kinds = (np.uint64, np.uint64, np.bool_, np.int16, np.int64, np.int32, np.int32)
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
    _batches: list[Entries] = field(default_factory=list)
    _winners: Entries | None = None

    @property
    def winners(self) -> Entries:
        """One entry per work key, ordered by key."""
        if self._winners is None:
            self._winners = _choose(self._batches)
            self._batches = [self._winners]
        return self._winners

    def add(self, uri: str, table: pa.Table) -> None:
        """Counts the rows of a part in.

        Raises:
            LedgerError: its columns are not those of the ledger.
        """
        try:
            high, low = split_keys(table["work_key"])
            if table["status"].null_count or table["finished_at"].null_count:
                raise LedgerError("not a part of the ledger: a row without status or time")
            succeeded = pc.equal(table["status"], SUCCEEDED).to_numpy()
            codes = table["error_code"].combine_chunks().dictionary_encode()
            finished = table["finished_at"].cast(pa.timestamp("us", tz="UTC")).cast(pa.int64()).to_numpy()
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
                finished_us=finished,
                part=np.full(len(high), number, np.int32),
                row=np.arange(len(high), dtype=np.int32),
            )
        )
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


def _choose(batches: Sequence[Entries]) -> Entries:
    if not batches:
        return _empty()
    columns = zip(*(vars(batch).values() for batch in batches), strict=True)
    entries = Entries(*(np.concatenate(column) for column in columns))
    order = np.lexsort((entries.finished_us, entries.succeeded, entries.low, entries.high))
    entries = entries.take(order)
    last = np.ones(len(entries), np.bool_)
    last[:-1] = (entries.high[1:] != entries.high[:-1]) | (entries.low[1:] != entries.low[:-1])
    return entries.take(last)


def read_index(output: str) -> Index:
    """The index of all parts of an output. A damaged part is named in a warning; its rows count as not done.

    Raises:
        StorageError: the store does not let us read.
    """
    index = Index()
    read: set[str] = set()
    for _ in range(_LISTINGS):
        uris = [part.uri for part in storage.list_objects(layout.parts_uri(output), suffix=".parquet")]
        gone = False
        for uri, table in read_parts([uri for uri in uris if uri not in read], columns=_INDEX_COLUMNS):
            read.add(uri)
            try:
                if isinstance(table, LedgerError):
                    raise table
                if table is None:
                    gone = True
                else:
                    index.add(uri, table)
            except LedgerError as error:
                index.damaged[uri] = error.message
                _log.warning("%s is damaged (%s): its rows are restored from the videos or made again", uri, error)
        if not gone:
            break  # else a writer has put parts together: its new one may have come after the listing
    return index


def read_parts(
    uris: Iterable[str], *, columns: Sequence[str] | None = None
) -> Iterator[tuple[str, pa.Table | LedgerError | None]]:
    """Each part's columns in the order of `uris`, read ahead by a few threads; or why it is damaged; or None if it is
    gone, because its rows were written elsewhere.
    """

    def read(uri: str) -> pa.Table | LedgerError | None:
        try:
            return read_part(uri, columns=columns)
        except StorageNotFound:
            return None
        except LedgerError as error:
            return error

    with ThreadPoolExecutor(_READERS, thread_name_prefix="ledger-read") as pool:
        ahead: deque[tuple[str, Future[pa.Table | LedgerError | None]]] = deque()
        for uri in uris:
            ahead.append((uri, pool.submit(read, uri)))
            if len(ahead) > _READERS:
                first, result = ahead.popleft()
                yield first, result.result()
        for first, result in ahead:
            yield first, result.result()


def read_winners(
    index: Index, chosen: _Array, *, columns: Sequence[str] | None = None
) -> Iterator[tuple[str, pa.Table | LedgerError | None, _Array]]:
    """Reads winning rows part by part, the parts by the time of their first row.

    `chosen` are positions in `index.winners`. Yields the part, its chosen rows (an error or None for a part that cannot
    be read, as `read_parts`), and for each row its position in `chosen`.
    """
    entries = index.winners.take(chosen)
    first_us = np.full(len(index.part_uris), np.iinfo(np.int64).max)
    np.minimum.at(first_us, entries.part, entries.finished_us)
    rank = np.empty(len(first_us), np.int64)
    rank[np.argsort(first_us, kind="stable")] = np.arange(len(first_us))
    order = np.lexsort((entries.row, rank[entries.part]))
    parts = entries.part[order]
    bounds = np.flatnonzero(np.diff(parts, prepend=-1, append=-1)) if len(parts) else np.zeros(1, np.int64)
    uris = [index.part_uris[parts[begin]] for begin in bounds[:-1]]
    for (uri, table), begin, end in zip(read_parts(uris, columns=columns), bounds[:-1], bounds[1:], strict=True):
        which = order[begin:end]
        yield uri, table.take(pa.array(entries.row[which])) if isinstance(table, pa.Table) else table, which


def read_part(uri: str, *, columns: Sequence[str] | None = None) -> pa.Table:
    """These columns of the part, or all, as `conform` has them.

    Raises:
        LedgerError: it is damaged, or not a part.
    """
    try:
        content = storage.read_bytes(uri)
    except StorageDamaged as error:
        raise LedgerError(error.message) from None
    return conform(read_parquet(content, columns=columns), columns)


def write_part(output: str, table: pa.Table) -> str:
    """Writes one part in one atomic step; its URI."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    uri = layout.new_part_uri(output)
    storage.create_bytes(uri, sink.getvalue().to_pybytes(), content_type="application/vnd.apache.parquet")
    return uri


def quarantine(output: str, part_uri: str) -> str:
    """Moves a damaged part aside, for people to examine; its new URI."""
    target = layout.quarantine_uri(output, part_uri)
    storage.move(part_uri, target)
    _log.warning("moved the damaged part %s to %s", part_uri, target)
    return target


def drop_parts(uris: Iterable[str]) -> None:
    """Removes parts whose rows are durable elsewhere."""
    with ThreadPoolExecutor(_READERS, thread_name_prefix="ledger-drop") as pool:
        list(pool.map(storage.delete, uris))


class PartWriter:
    """Collects result rows and writes a part for every 64 of them, or after 30 s. One thread uses it.

    While the store does not answer, rows wait in memory for up to ten minutes; their videos are committed anyhow.
    """

    def __init__(self, output: str, index: Index) -> None:
        self._output = output
        self._index = index
        self._rows: list[ResultRow] = []
        self._small: list[tuple[str, pa.Table]] = []
        self._oldest = 0.0
        self._failing_since: float | None = None
        self._next_try = 0.0

    def append(self, rows: Iterable[ResultRow]) -> None:
        """Takes rows; writes them when enough have come or enough time has passed."""
        for row in rows:
            if not self._rows:
                self._oldest = time.monotonic()
            self._rows.append(row)
        self.flush_if_due()

    def flush_if_due(self) -> None:
        """Writes what waits if it is 64 rows or has waited for 30 s. Called now and then where no rows come.

        Raises:
            OutputError: the store refused, or has not answered for ten minutes.
        """
        now = time.monotonic()
        due = len(self._rows) >= PART_ROWS or (self._rows and now - self._oldest >= PART_S)
        if not due or now < self._next_try:
            return
        try:
            self.flush()
        except OutputError as error:
            cause = error.__cause__
            if not (isinstance(cause, StorageError) and cause.retryable):
                raise
            self._failing_since = self._failing_since or now
            if now - self._failing_since > PATIENCE_S:
                raise
            self._next_try = time.monotonic() + PART_S
            _log.warning("%d result rows wait for the store: %s", len(self._rows), cause.message)

    def flush(self) -> None:
        """Writes what waits, now.

        Raises:
            OutputError: the store refused or did not answer; the rows are kept for another try.
        """
        if not self._rows:
            return
        table = to_table(self._rows)
        try:
            uri = write_part(self._output, table)
        except StorageError as error:
            raise OutputError(f"result rows cannot be written: {error.message}") from error
        self._index.add(uri, table)
        self._rows.clear()
        self._failing_since = None
        self._next_try = 0.0
        self._small.append((uri, table))
        if sum(len(small) for _, small in self._small) >= MERGED_ROWS:
            self._merge()

    def _merge(self) -> None:
        """Writes the small parts of this writer as one, then drops them; a crash between leaves equal rows twice."""
        small, self._small = self._small, []
        merged = pa.concat_tables([table for _, table in small])
        try:
            self._index.add(write_part(self._output, merged), merged)
            drop_parts([uri for uri, _ in small])
        except StorageError as error:
            _log.warning("small parts stay: %s", error.message)
