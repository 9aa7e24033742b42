"""Parquet manifests: rows in batches of bounded size.

Image bytes never travel in a plan; a cell is named by file, row and column, and workers read it where it lies.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from urllib.parse import quote

import pyarrow as pa
import pyarrow.parquet as pq

from pia_ray.manifest.cells import STREAM_BYTES
from pia_ray.manifest.tables import (
    CHUNK_BYTES,
    CHUNK_ROWS,
    IMAGE_ROWS,
    Chunk,
    TableFile,
    bytes_of,
    cast,
    holds_bytes,
    is_packed,
    nulls,
    values_of,
)
from pia_ray.storage import sources


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
        if any(holds_bytes(file.schema.field(name).type) for name in cells):
            size = min(size, IMAGE_ROWS)
        first = 1
        for batch in parquet.iter_batches(batch_size=size, columns=[*cells, *own]):
            columns = [
                cast(batch.column(column.name), column, file) if column.name in own else nulls(column, batch.num_rows)
                for column in passed
            ]
            values = {name: values_of(batch.column(name)) for name in cells}
            yield Chunk(first, batch.num_rows, values, pa.Table.from_arrays(columns, schema=passed), {})
            first += batch.num_rows


def cell_reference(file: TableFile, row: int, column: str, position: int | None = None) -> str:
    """The reference of an image inside a Parquet or Arrow manifest, as `cells.read_image_cell` takes it.

    Of a cell with a list it is that of the element at the position.
    """
    item = "" if position is None else f"&item={position}"
    return f"{file.uri}#row={row}&column={quote(column, safe='')}{item}"


def _parquet_file(uri: str) -> pq.ParquetFile:
    filesystem, path = sources.arrow_filesystem(uri)
    # A stream buffer instead of whole column chunks: a row group of image bytes may be larger than memory.
    return pq.ParquetFile(path, filesystem=filesystem, buffer_size=STREAM_BYTES, pre_buffer=False)


def _rows_per_batch(metadata: pq.FileMetaData, columns: set[str]) -> int:
    size = 0
    for index in range(metadata.num_row_groups):
        group = metadata.row_group(index)
        chunks = (group.column(number) for number in range(group.num_columns))
        size += sum(c.total_uncompressed_size for c in chunks if c.path_in_schema.split(".")[0] in columns)
    fit = CHUNK_BYTES * int(metadata.num_rows) // max(1, size)
    return max(1, min(CHUNK_ROWS, fit))
