"""Parquet manifests: rows in batches of bounded size, and single image cells for the workers.

Image bytes never travel in a plan; a cell is named by file, row and column and read where it lies.
"""

from __future__ import annotations

import re
import shutil
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final
from urllib.parse import quote, unquote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from cachetools import LRUCache

from pia_ray import storage
from pia_ray.config.knobs import ARRAY_KNOBS, knob_named
from pia_ray.errors import ImageNotFound, StorageDenied, StorageError, StorageNotFound, StorageUnavailable
from pia_ray.manifest.arrow_files import EXTENSIONS, ArrowCells
from pia_ray.manifest.references import decode_data_url
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
from pia_ray.media import arrays

_CACHED_FILES: Final = 4
_CACHED_COLUMN_BYTES: Final = 64 * 2**20
_CELL = re.compile(
    r"(?P<uri>.+)#row=(?P<row>[1-9][0-9]{0,17})&column=(?P<column>[^&#]+)(?:&item=(?P<item>\d{1,9}))?", re.DOTALL
)


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
    """The reference of an image inside a Parquet or Arrow manifest, as `read_image_cell` takes it.

    Of a cell with a list it is that of the element at the position.
    """
    item = "" if position is None else f"&item={position}"
    return f"{file.uri}#row={row}&column={quote(column, safe='')}{item}"


def read_image_cell(reference: str) -> bytes:
    """The bytes that `<manifest uri>#row=<n>&column=<name>` names; rows count from 1, a column is percent-encoded.

    Of a cell that holds an array they are those of a .safetensors file. Reads only that column of the row's row group,
    and keeps the last one of a few files. Threads may call it together.

    Raises:
        StorageNotFound: the manifest is gone.
        ImageNotFound: no such row or column, or no bytes there: the manifest changed since it was planned.
        BadParameter: the cell holds no array any more.
        StorageError: the file cannot be read.
    """
    match = _CELL.fullmatch(reference)
    if match is None:
        raise ImageNotFound(f"{reference} is not an image cell of a manifest")
    uri, row, column = match["uri"], int(match["row"]), unquote(match["column"])
    try:
        value = _cells_of(uri, column).read(row)
    except FileNotFoundError:
        raise StorageNotFound(f"the manifest {uri} is not there any more") from None
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
        with _open_cells_lock:  # a next try opens it anew
            _open_cells.pop((uri, column), None)
        raise _storage_error(error, reference) from None
    if match["item"] is not None:
        value = value[int(match["item"])] if isinstance(value, list) and int(match["item"]) < len(value) else None
    if isinstance(value, Mapping):
        value = value.get("bytes")
    if isinstance(value, list | np.ndarray) and (knob := knob_named(column) or "") in ARRAY_KNOBS:
        return arrays.encode(value, knob)
    if isinstance(value, str) and value.strip().startswith("data:"):
        return decode_data_url(value.strip())
    if not isinstance(value, bytes) or not value:
        raise ImageNotFound(f"{reference}: there are no image bytes; the manifest changed since it was planned")
    return value


def _parquet_file(uri: str) -> pq.ParquetFile:
    filesystem, path = storage.arrow_filesystem(uri)
    # A stream buffer instead of whole column chunks: a row group of image bytes may be larger than memory.
    return pq.ParquetFile(path, filesystem=filesystem, buffer_size=2**20, pre_buffer=False)


def _encoded(uri: str, column: str) -> pq.ParquetFile:
    """The open file, in which equal values of the column are kept once: 1,000 rows may share a picture."""
    filesystem, path = storage.arrow_filesystem(uri)
    with _parquet_file(uri) as plain:
        metadata = plain.metadata
    leaves = (metadata.schema.column(index) for index in range(metadata.num_columns))
    wanted = [
        leaf.path for leaf in leaves if leaf.path in (column, f"{column}.bytes") and leaf.physical_type == "BYTE_ARRAY"
    ]
    return pq.ParquetFile(
        path, filesystem=filesystem, metadata=metadata, buffer_size=2**20, pre_buffer=False, read_dictionary=wanted
    )


def _rows_per_batch(metadata: pq.FileMetaData, columns: set[str]) -> int:
    size = 0
    for index in range(metadata.num_row_groups):
        group = metadata.row_group(index)
        chunks = (group.column(number) for number in range(group.num_columns))
        size += sum(c.total_uncompressed_size for c in chunks if c.path_in_schema.split(".")[0] in columns)
    fit = CHUNK_BYTES * int(metadata.num_rows) // max(1, size)
    return max(1, min(CHUNK_ROWS, fit))


class _Cells:
    """One column of an open Parquet file, and the values of the last row group that was asked for."""

    def __init__(self, uri: str, column: str) -> None:
        self._column = column
        self._file = _encoded(uri, column)
        self._lock = threading.Lock()  # a ParquetFile keeps one position in its source
        self._kept: tuple[int, pa.ChunkedArray] | None = None

    def read(self, row: int) -> Any:
        """The cell's value, or None for a cell that does not exist."""
        with self._lock:
            metadata = self._file.metadata
            left = row - 1
            if self._column not in self._file.schema_arrow.names:
                return None
            for group in range(metadata.num_row_groups):
                rows = metadata.row_group(group).num_rows
                if left < rows:
                    return self._read(group, left)
                left -= rows
            return None

    def _read(self, group: int, row: int) -> Any:
        column = self._column
        if self._kept is not None and self._kept[0] == group:
            return _python(self._kept[1][row])
        about = self._file.metadata.row_group(group)
        chunks = (about.column(number) for number in range(about.num_columns))
        size = sum(c.total_uncompressed_size for c in chunks if c.path_in_schema.split(".")[0] == column)
        if size <= _CACHED_COLUMN_BYTES:
            values = self._file.read_row_group(group, columns=[column]).column(column)
            self._kept = (group, values)
            return _python(values[row])
        step = max(1, about.num_rows * 2**24 // size)  # a large group is streamed up to the row, some 16 MB at a time
        for batch in self._file.iter_batches(batch_size=step, row_groups=[group], columns=[column]):
            if row < batch.num_rows:
                return _python(batch.column(column)[row])
            row -= batch.num_rows
        return None


def _python(value: pa.Scalar) -> Any:
    if isinstance(value, pa.FixedShapeTensorScalar):
        return value.to_numpy() if value.is_valid else None
    return value.as_py()


_open_cells: LRUCache[tuple[str, str], _Cells | ArrowCells] = LRUCache(_CACHED_FILES)
_open_cells_lock = threading.Lock()


def _cells_of(uri: str, column: str) -> _Cells | ArrowCells:
    with _open_cells_lock:
        if (uri, column) not in _open_cells:
            kind = ArrowCells if uri.lower().endswith(EXTENSIONS) else _Cells
            _open_cells[uri, column] = kind(uri, column)
        return _open_cells[uri, column]


def _storage_error(error: Exception, reference: str) -> StorageError:
    if isinstance(error, PermissionError) or "ACCESS_DENIED" in str(error):
        return StorageDenied(f"cannot read {reference}: {error}")
    # Arrow raises the same type for a broken connection and a broken page; over the network, trying again may help.
    kind = StorageUnavailable if isinstance(error, OSError) and storage.is_s3(reference) else StorageError
    return kind(f"cannot read {reference}: {error}")
