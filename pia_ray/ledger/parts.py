"""The ledger's parts: small immutable Parquet files of result rows, read, written, and moved aside where damaged."""

from __future__ import annotations

import contextvars
import logging
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pia_ray import storage
from pia_ray.errors import LedgerError, OutputError, OutputUnavailable, StorageDamaged, StorageError, StorageNotFound
from pia_ray.ledger import layout
from pia_ray.ledger.index import Index
from pia_ray.ledger.results import RESULTS_SCHEMA, conform, read_parquet, to_table
from pia_ray.result_row import ResultRow

PART_ROWS: Final = 64
PART_S: Final = 30.0
MERGED_ROWS: Final = 8192
"""A writer puts its small parts together when they have so many rows, so that a ledger of millions opens fast."""
PATIENCE_S: Final = 900.0
"""Seconds that rows wait in memory for a store that does not answer, before the run stops."""

PART_SCHEMA: Final = RESULTS_SCHEMA.append(pa.field("recorded_at", pa.timestamp("us", tz="UTC")))
"""The columns of a part. `recorded_at`, by the store's clock, orders rows; null in parts of earlier versions."""

_READERS: Final = 16
_AHEAD_ROWS: Final = 20_000
"""Rows that are read ahead at most, where their number is known; about 5 kB each with all columns."""
_LISTINGS: Final = 5
"""Times that a reader starts over while writers move parts."""
_INDEX_COLUMNS: Final = ("work_key", "status", "error_code", "review", "finished_at", "recorded_at")

_log = logging.getLogger(__name__)
_Array = np.ndarray[Any, Any]


def read_index(output: str) -> Index:
    """The index of all parts of an output. A damaged part is named in a warning; its rows count as not done.

    Raises:
        StorageError: the store does not let us read.
    """
    index = Index()
    read: set[str] = set()
    for _ in range(_LISTINGS):
        listed = storage.list_objects(layout.parts_uri(output), suffix=".parquet")
        uris = {part.uri: part.last_modified for part in listed}
        gone = False
        for uri, table in read_parts([uri for uri in uris if uri not in read], columns=_INDEX_COLUMNS):
            read.add(uri)
            try:
                if isinstance(table, LedgerError):
                    raise table
                if table is None:
                    gone = True
                else:
                    index.add(uri, table, written_at=uris[uri])
            except LedgerError as error:
                index.damaged[uri] = error.message
                _log.warning("%s is damaged (%s): its rows are restored from the videos or made again", uri, error)
        if not gone:
            break  # else a writer has put parts together: its new one may have come after the listing
    return index


def read_parts(
    uris: Sequence[str], *, columns: Sequence[str] | None = None, num_rows: Sequence[int] | None = None
) -> Iterator[tuple[str, pa.Table | LedgerError | None]]:
    """Each part's columns in the order of `uris`, read ahead by a few threads; or why it is damaged; or None if it is
    gone, because its rows were written elsewhere.

    `num_rows` holds the number of rows of each part, by which less is read ahead of large ones.
    """

    def read(uri: str) -> pa.Table | LedgerError | None:
        try:
            return read_part(uri, columns=columns)
        except StorageNotFound:
            return None
        except LedgerError as error:
            return error

    with ThreadPoolExecutor(_READERS, thread_name_prefix="ledger-read") as pool:
        ahead: deque[tuple[str, int, Future[pa.Table | LedgerError | None]]] = deque()
        held = 0
        for uri, size in zip(uris, num_rows or [0] * len(uris), strict=True):
            while ahead and (len(ahead) > _READERS or held + size > _AHEAD_ROWS):
                first, rows, result = ahead.popleft()
                held -= rows
                yield first, result.result()
            ahead.append((uri, size, pool.submit(contextvars.copy_context().run, read, uri)))
            held += size
        while ahead:
            first, _, result = ahead.popleft()
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
    np.minimum.at(first_us, entries.part, entries.recorded_us)
    rank = np.empty(len(first_us), np.int64)
    rank[np.argsort(first_us, kind="stable")] = np.arange(len(first_us))
    order = np.lexsort((entries.row, rank[entries.part]))
    parts = entries.part[order]
    bounds = np.flatnonzero(np.diff(parts, prepend=-1, append=-1)) if len(parts) else np.zeros(1, np.int64)
    uris = [index.part_uris[parts[begin]] for begin in bounds[:-1]]
    read = read_parts(uris, columns=columns, num_rows=np.diff(bounds).tolist())
    for (uri, table), begin, end in zip(read, bounds[:-1], bounds[1:], strict=True):
        which = order[begin:end]
        yield uri, table.take(pa.array(entries.row[which])) if isinstance(table, pa.Table) else table, which


def read_part(uri: str, *, columns: Sequence[str] | None = None) -> pa.Table:
    """These columns of PART_SCHEMA, or all.

    Raises:
        LedgerError: it is damaged, or not a part.
    """
    try:
        content = storage.read_bytes(uri)
    except StorageDamaged as error:
        raise LedgerError(error.message) from None
    return conform(read_parquet(content, columns=columns), columns, schema=PART_SCHEMA)


def stamped(output: str, table: pa.Table, *, after: Index) -> pa.Table:
    """Rows with RESULTS_SCHEMA as those of a part that is recorded now.

    Raises:
        StorageError: the store, whose clock counts, refused or did not answer.
    """
    now_us = int(storage.clock(output).timestamp() * 1_000_000)
    # Clocks are coarse, and may be set back: what is recorded after other rows says so all the same.
    at = pa.scalar(max(now_us, after.latest_us + 1), pa.timestamp("us", tz="UTC"))
    return table.append_column(PART_SCHEMA.field("recorded_at"), pa.repeat(at, len(table)))


def write_part(output: str, table: pa.Table) -> str:
    """The URI of a new part, which is written in one atomic step."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    uri = layout.new_part_uri(output)
    storage.create_bytes(uri, sink.getvalue().to_pybytes(), content_type="application/vnd.apache.parquet")
    return uri


def quarantine(output: str, part_uri: str) -> str:
    """The new URI of a damaged part, which is moved aside for people to examine."""
    target = layout.quarantine_uri(output, part_uri)
    storage.move(part_uri, target)
    _log.warning("moved the damaged part %s to %s", part_uri, target)
    return target


def drop_parts(uris: Iterable[str]) -> None:
    """Removes parts whose rows are durable elsewhere."""
    with ThreadPoolExecutor(_READERS, thread_name_prefix="ledger-drop") as pool:
        for removed in [pool.submit(contextvars.copy_context().run, storage.delete, uri) for uri in uris]:
            removed.result()


class PartWriter:
    """Collects result rows and writes a part for every 64 of them, or after 30 s. One thread uses it.

    While the store does not answer, rows wait in memory for up to `patience_s`; their videos are committed anyhow.
    """

    def __init__(self, output: str, index: Index, *, patience_s: float = PATIENCE_S) -> None:
        self._output = output
        self._index = index
        self._patience_s = patience_s
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
            OutputError: the store refused, or has not answered for `patience_s`.
        """
        now = time.monotonic()
        due = len(self._rows) >= PART_ROWS or (self._rows and now - self._oldest >= PART_S)
        if not due or now < self._next_try:
            return
        try:
            self.flush()
        except OutputUnavailable as error:
            self._failing_since = self._failing_since or now
            if now - self._failing_since > self._patience_s:
                raise
            self._next_try = time.monotonic() + min(PART_S, self._patience_s)
            _log.warning("%d result rows wait for the store: %s", len(self._rows), error.message)

    def flush(self) -> None:
        """Writes what waits, now.

        Raises:
            OutputError: the store refused or did not answer; the rows are kept for another try.
        """
        if not self._rows:
            return
        table = to_table(self._rows)
        try:
            table = stamped(self._output, table, after=self._index)
            uri = write_part(self._output, table)
        except StorageError as error:
            kind = OutputUnavailable if error.retryable else OutputError
            raise kind(f"result rows cannot be written: {error.message}") from error
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
