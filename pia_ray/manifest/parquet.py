"""Parquet manifests: rows in batches of bounded size.

Image bytes never travel in a plan; a cell is named by file, row and column, and workers read it where it lies.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final
from urllib.parse import quote

import pyarrow as pa
import pyarrow.parquet as pq

from pia_ray import storage
from pia_ray.manifest.cells import STREAM_BYTES
from pia_ray.manifest.tables import (
    CHUNK_BYTES,
    CHUNK_ROWS,
    Chunk,
    TableFile,
    bytes_of,
    cast,
    is_packed,
    nulls,
    plain_type,
)

_BYTES_ROWS: Final = 256
"""Rows of images read at once: Parquet stores equal images once, so that sizes in a file say nothing of memory."""


@contextmanager
def open_parquet(uri: str) -> Iterator[pq.ParquetFile]:
    """The open file. It is read where it lies, but for a packed one, which is unpacked to a temporary file first."""
    if is_packed(uri):
        with tempfile.TemporaryFile() as unpacked:
            with bytes_of(uri) as packed:
                shutil.copyfileobj(packed, unpacked, 2**20)
            unpacked.seek(0)
            yield pq.ParquetFile(unpacked)
    else:
        with _parquet_file(uri) as parquet:
            yield parquet


def read_parquet(file: TableFile, cells: Sequence[str], passed: pa.Schema) -> Iterator[Chunk]:
    """As `files.read`."""
    own = [name for name in passed.names if name in file.schema.names and name not in cells]
    with open_parquet(file.uri) as parquet:
        size = _rows_per_batch(parquet.metadata, {*cells, *own})
        if any(_holds_bytes(file.schema.field(name).type) for name in cells):
            size = min(size, _BYTES_ROWS)
        first = 1
        for batch in parquet.iter_batches(batch_size=size, columns=[*cells, *own]):
            columns = [
                cast(batch.column(column.name), column, file) if column.name in own else nulls(column, batch.num_rows)
                for column in passed
            ]
            values = {name: _values(batch.column(name)) for name in cells}
            yield Chunk(first, batch.num_rows, values, pa.Table.from_arrays(columns, schema=passed), {})
            first += batch.num_rows


def cell_reference(file: TableFile, row: int, column: str) -> str:
    """The reference of an image inside a Parquet manifest, as `cells.read_image_cell` takes it."""
    return f"{file.uri}#row={row}&column={quote(column, safe='')}"


def _parquet_file(uri: str) -> pq.ParquetFile:
    filesystem, path = storage.arrow_filesystem(uri)
    # A stream buffer instead of whole column chunks: a row group of image bytes may be larger than memory.
    return pq.ParquetFile(path, filesystem=filesystem, buffer_size=STREAM_BYTES, pre_buffer=False)


def _holds_bytes(kind: pa.DataType) -> bool:
    kind = plain_type(kind)
    return bool(pa.types.is_nested(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _rows_per_batch(metadata: pq.FileMetaData, columns: set[str]) -> int:
    size = 0
    for index in range(metadata.num_row_groups):
        group = metadata.row_group(index)
        chunks = (group.column(number) for number in range(group.num_columns))
        size += sum(c.total_uncompressed_size for c in chunks if c.path_in_schema.split(".")[0] in columns)
    fit = CHUNK_BYTES * int(metadata.num_rows) // max(1, size)
    return max(1, min(CHUNK_ROWS, fit))


def _values(column: pa.Array) -> list[Any]:
    """As `to_pylist`, but far faster for text and numbers."""
    if isinstance(column, pa.FixedShapeTensorArray):
        return [None if not value.is_valid else value.to_numpy() for value in column]
    if isinstance(column, pa.ExtensionArray):
        return list(column.to_pylist())
    if (plain := plain_type(column.type)) != column.type:
        column = column.cast(plain)
    kind = column.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        try:
            return list(column.to_numpy(zero_copy_only=False).tolist())
        except (pa.ArrowException, UnicodeDecodeError):  # not UTF-8: its lone surrogates become bad rows
            raw = column.cast(pa.large_binary()).to_pylist()
            return [None if value is None else value.decode("utf-8", "surrogateescape") for value in raw]
    if pa.types.is_integer(kind) or pa.types.is_floating(kind):
        if not column.null_count:
            return list(column.to_numpy(zero_copy_only=False).tolist())
        values = list(column.fill_null(0).to_numpy(zero_copy_only=False).tolist())  # as is, uint64 would turn to float
        for index in column.is_null().to_numpy(zero_copy_only=False).nonzero()[0].tolist():
            values[index] = None
        return values
    return list(column.to_pylist())
