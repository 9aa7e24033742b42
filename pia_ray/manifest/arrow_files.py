"""Arrow IPC files and streams, and Feather: rows in batches of bounded size, and single image cells for the workers."""

from __future__ import annotations

import shutil
import tempfile
import threading
import time
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Final

import pyarrow as pa

from pia_ray.manifest.tables import (
    CHUNK_BYTES,
    CHUNK_ROWS,
    IMAGE_ROWS,
    Chunk,
    TableFile,
    bytes_of,
    cast,
    holds_bytes,
    no_twins,
    nulls,
    values_of,
)
from pia_ray.storage import sources

EXTENSIONS: Final = (".arrow", ".feather", ".ipc")


def scan_arrow(file: TableFile) -> TableFile:
    """The file with its columns."""
    with bytes_of(file.uri) as stream:
        reader = _opened(stream)
        no_twins(reader.schema.names, file.name)
        filled = any(batch.num_rows for batch in _batches(reader))
        return replace(file, schema=reader.schema, num_rows=None if filled else 0)


def read_arrow(file: TableFile, cells: Sequence[str], passed: pa.Schema) -> Iterator[Chunk]:
    """As `files.read`."""
    own = [name for name in passed.names if name in file.schema.names and name not in cells]
    most = IMAGE_ROWS if any(holds_bytes(file.schema.field(name).type) for name in cells) else CHUNK_ROWS
    with bytes_of(file.uri) as stream:
        first = 1
        for whole in _batches(_opened(stream)):
            size = max(1, min(most, whole.num_rows * CHUNK_BYTES // max(1, whole.nbytes)))
            for start in range(0, whole.num_rows, size):
                batch = whole.slice(start, size)
                columns = [
                    cast(batch.column(column.name), column, file)
                    if column.name in own
                    else nulls(column, batch.num_rows)
                    for column in passed
                ]
                values = {name: values_of(batch.column(name)) for name in cells}
                yield Chunk(first, batch.num_rows, values, pa.Table.from_arrays(columns, schema=passed), {})
                first += batch.num_rows


class ArrowCells:
    """One column of an Arrow file. An object is copied to a temporary file once, as its batches have no index."""

    def __init__(self, uri: str, column: str, version: str) -> None:
        self.version = version
        self.checked_at = time.monotonic()
        self._lock = threading.Lock()
        self._source: Any
        if sources.in_store(uri):
            copy = tempfile.TemporaryFile()  # noqa: SIM115 - lives with the object
            with bytes_of(uri) as stream:
                shutil.copyfileobj(stream, copy, 2**20)
            self._source = pa.PythonFile(copy, mode="r")
            self._source.seek(0)
        else:
            self._source = pa.memory_map(uri)
        self._column = column
        self._names = _opened(self._source).schema.names
        self._reader: Any = None
        self._starts = [0]
        """Number of the first row of each batch that was met, and of the one after them."""
        self._batch: tuple[int, pa.RecordBatch] | None = None

    def read(self, row: int) -> Any:
        """The cell's value, or None for a cell that does not exist; rows count from 1."""
        if self._column not in self._names:
            return None
        with self._lock:
            while self._starts[-1] < row:
                if not self._next():
                    return None
            number = bisect_right(self._starts, row - 1) - 1
            while self._batch is None or self._batch[0] != number:
                if not self._seek(number):
                    return None
            return values_of(self._batch[1].column(0).slice(row - 1 - self._starts[number], 1))[0]

    def _seek(self, number: int) -> bool:
        """Reads the batch of this number, or one on the way to it, as streams have no index."""
        if hasattr(self._reader, "get_batch"):
            self._batch = (number, self._reader.get_batch(number))
            return True
        if self._batch is None or self._batch[0] > number:
            self._reader, self._batch = None, None
        return self._next()

    def _next(self) -> bool:
        if self._reader is None:
            self._source.seek(0)
            fields = [self._names.index(self._column)]
            self._reader = _opened(self._source, pa.ipc.IpcReadOptions(included_fields=fields))
        number = 0 if self._batch is None else self._batch[0] + 1
        try:
            if hasattr(self._reader, "get_batch"):
                if number >= self._reader.num_record_batches:
                    return False
                batch = self._reader.get_batch(number)
            else:
                batch = self._reader.read_next_batch()
        except StopIteration:
            return False
        self._batch = (number, batch)
        if number == len(self._starts) - 1:
            self._starts.append(self._starts[-1] + batch.num_rows)
        return True


def _opened(source: Any, options: pa.ipc.IpcReadOptions | None = None) -> Any:
    """The reader of a file or a stream, by its first bytes."""
    start = source.read(6)
    source.seek(0)
    if start[:4] == b"FEA1":
        raise pa.ArrowInvalid("Feather of version 1 is not read: write it as version 2 or as Parquet")
    return (pa.ipc.open_file if start == b"ARROW1" else pa.ipc.open_stream)(source, options=options)


def _batches(reader: Any) -> Iterator[pa.RecordBatch]:
    if hasattr(reader, "get_batch"):
        for number in range(reader.num_record_batches):
            yield reader.get_batch(number)
    else:
        yield from reader
