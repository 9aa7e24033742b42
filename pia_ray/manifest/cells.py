"""Image and array cells of Parquet and Arrow manifests, of which a process reads a column about once, in any order.

A row group is read on from where it was left. The cells that are passed are kept in a temporary file without a name,
equal ones of them once.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import shutil
import tempfile
import threading
import time
from array import array
from collections.abc import Iterator, Mapping
from typing import Any, Final, Literal
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from cachetools import LRUCache

from pia_ray.config.knobs import ARRAY_KNOBS, knob_named
from pia_ray.errors import ImageNotFound, StorageDenied, StorageError, StorageNotFound, StorageUnavailable
from pia_ray.manifest.arrow_files import EXTENSIONS, ArrowCells
from pia_ray.manifest.references import decode_data_url
from pia_ray.manifest.tables import plain_type
from pia_ray.media import arrays
from pia_ray.storage import sources

STREAM_BYTES: Final = 2**20
"""Bytes that one request for a part of a column asks for. Without it, Arrow reads a group's whole column at once."""

_BATCH_BYTES: Final = 16 * 2**20
_WHOLE_BYTES: Final = 64 * 2**20
"""A group with a column of at most this size is read to its end, so that its stream need not stay open."""
_OPEN_FILES: Final = 16
_OPEN_STREAMS: Final = 4
_CHECK_S: Final = 60.0
"""Seconds after which a file in a store is asked for its version again."""
_FREE_BYTES: Final = 2 * 2**30
"""Space that is left free on the disk of temporary files; beyond it cells are read from the store each time."""
_REMEMBERED: Final = 4096
_CELL = re.compile(
    r"(?P<uri>.+)#row=(?P<row>[1-9][0-9]{0,17})&column=(?P<column>[^&#]+)(?:&item=(?P<item>\d{1,9}))?", re.DOTALL
)


def read_image_cell(reference: str) -> bytes:
    """The bytes that `<manifest uri>#row=<n>&column=<name>` names; rows count from 1, a column is percent-encoded.

    `&item=<i>` names an element of a cell with a list. Of a cell that holds an array they are those of a .safetensors
    file. Threads may call it together.

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
        with _files_lock:  # a next try opens it anew
            for key in [key for key in _files if key[:2] == (uri, column)]:
                del _files[key]
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


class _Spool:
    """The temporary file of this process in which cells are kept."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(prefix="pia-ray-")  # noqa: SIM115 - open as long as the process
        self._lock = threading.Lock()
        self._end = 0

    def add(self, content: bytes) -> int:
        """The place of the content in the file; -1 where the disk has no space for it."""
        with self._lock:
            if shutil.disk_usage(tempfile.gettempdir()).free < _FREE_BYTES + len(content):
                return -1
            try:
                self._file.seek(self._end)
                self._file.write(content)
                self._file.flush()
            except OSError:
                return -1
            begin, self._end = self._end, self._end + len(content)
            return begin

    def read(self, begin: int, size: int) -> bytes:
        """The content at a place."""
        return os.pread(self._file.fileno(), size, begin)


class _Group:
    """The cells of a row group that were passed: their places in the spool, in the order of rows."""

    def __init__(self, about: pq.RowGroupMetaData, column: str) -> None:
        chunks = (about.column(number) for number in range(about.num_columns))
        self.num_rows = about.num_rows
        self.size_bytes = sum(c.total_uncompressed_size for c in chunks if c.path_in_schema.split(".")[0] == column)
        self.begins = array("q")
        """-1 where the disk had no space."""
        self.sizes = array("q")
        """-1 for a cell without a value."""
        self.stream: Iterator[pa.RecordBatch] | None = None


class _Cells:
    """One column of a Parquet file."""

    def __init__(self, uri: str, column: str, version: str) -> None:
        self.version = version
        self.checked_at = time.monotonic()
        self._uri = uri
        self._column = column
        self._lock = threading.Lock()  # a ParquetFile keeps one position in its source
        self._recent: LRUCache[bytes, int] = LRUCache(_REMEMBERED)
        self._streams: list[int] = []
        self._groups: list[_Group] = []
        opened = self._opened()
        if column in opened.schema_arrow.names:
            metadata = opened.metadata
            self._groups = [_Group(metadata.row_group(index), column) for index in range(metadata.num_row_groups)]
            self._kind = _kind_of(opened.schema_arrow.field(column).type)

    def read(self, row: int) -> Any:
        """The cell's value, or None for a cell that does not exist."""
        left = row - 1
        for index, group in enumerate(self._groups):
            if left < group.num_rows:
                content = self._read(index, left)
                return None if content is None else _value(content, self._kind)
            left -= group.num_rows
        return None

    def _opened(self) -> pq.ParquetFile:
        """The open file, in which equal values of the column are kept once: 1,000 rows may share a picture."""
        key = (self._uri, self._column, self.version)
        with _files_lock:
            if (found := _files.get(key)) is not None:
                return found
        filesystem, path = sources.arrow_filesystem(self._uri)
        how: dict[str, Any] = {"filesystem": filesystem, "buffer_size": STREAM_BYTES, "pre_buffer": False}
        with pq.ParquetFile(path, **how) as plain:
            metadata, column = plain.metadata, self._column
        leaves = (metadata.schema.column(index) for index in range(metadata.num_columns))
        wanted = [
            leaf.path
            for leaf in leaves
            if leaf.path in (column, f"{column}.bytes") and leaf.physical_type == "BYTE_ARRAY"
        ]
        opened = pq.ParquetFile(path, metadata=metadata, read_dictionary=wanted, **how)
        with _files_lock:
            _files[key] = opened
        return opened

    def _read(self, index: int, row: int) -> bytes | None:
        group = self._groups[index]
        if row >= len(group.sizes):
            with self._lock:
                self._advance(index, group.num_rows if group.size_bytes <= _WHOLE_BYTES else row + 1)
        if row >= len(group.sizes) or group.sizes[row] < 0:
            return None
        if group.begins[row] >= 0:
            return _spool().read(group.begins[row], group.sizes[row])
        with self._lock:
            for batch in self._batches(group, index):
                if row < batch.num_rows:
                    return _contents(batch.column(0).slice(row, 1))[0]
                row -= batch.num_rows
        return None

    def _advance(self, index: int, num_rows: int) -> None:
        """Reads the group on until so many of its rows are passed."""
        group, skipped = self._groups[index], 0
        if len(group.sizes) >= num_rows:
            return
        if group.stream is None:
            if len(self._streams) >= _OPEN_STREAMS:
                oldest = self._streams[0]
                self._advance(oldest, self._groups[oldest].num_rows)
            group.stream = self._batches(group, index)
            self._streams.append(index)
            skipped = len(group.sizes)  # of a stream that broke off
        try:
            while len(group.sizes) < num_rows and (batch := next(group.stream, None)) is not None:
                if skipped < batch.num_rows:
                    self._keep(group, _contents(batch.column(0).slice(skipped)))
                skipped = max(0, skipped - batch.num_rows)
        except BaseException:
            self._end(group, index)
            raise
        if len(group.sizes) >= group.num_rows:
            self._end(group, index)

    def _end(self, group: _Group, index: int) -> None:
        group.stream = None
        self._streams.remove(index)

    def _batches(self, group: _Group, index: int) -> Iterator[pa.RecordBatch]:
        step = max(1, min(group.num_rows, group.num_rows * _BATCH_BYTES // max(1, group.size_bytes)))
        return iter(self._opened().iter_batches(batch_size=step, row_groups=[index], columns=[self._column]))

    def _keep(self, group: _Group, contents: list[bytes | None]) -> None:
        """Adds cells to the spool in one write; equal ones share their place."""
        new = bytearray()
        fresh: dict[bytes, int] = {}
        keys = [None if content is None else _key(content) for content in contents]
        for content, key in zip(contents, keys, strict=True):
            if content is not None and key is not None and key not in fresh and key not in self._recent:
                fresh[key] = len(new)
                new += content
        begin = _spool().add(bytes(new))
        for content, key in zip(contents, keys, strict=True):
            if content is None or key is None:
                place = 0
            elif key in fresh:
                place = begin + fresh[key] if begin >= 0 else -1
            else:
                place = self._recent[key]
            group.begins.append(place)
            group.sizes.append(-1 if content is None else len(content))
        if begin >= 0:
            self._recent.update({key: begin + offset for key, offset in fresh.items()})


def _key(content: bytes) -> bytes:
    """A name by which equal contents are known again."""
    return content if len(content) <= hashlib.sha256().digest_size else hashlib.sha256(content).digest()


_Kind = Literal["bytes", "text", "other"]


def _kind_of(kind: pa.DataType) -> _Kind:
    """The form in which a cell of the column is kept: its bytes, its text as bytes, or a table of one cell."""
    if isinstance(kind, pa.BaseExtensionType):
        return "other"
    if pa.types.is_dictionary(kind):
        return _kind_of(kind.value_type)
    if pa.types.is_struct(kind):
        return _kind_of(kind.field("bytes").type) if kind.get_field_index("bytes") >= 0 else "bytes"
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return "text"
    return "bytes" if pa.types.is_binary(plain_type(kind)) or pa.types.is_large_binary(plain_type(kind)) else "other"


def _contents(column: pa.Array) -> list[bytes | None]:
    """The cells in the form of `_kind_of`; None for null."""
    kind = column.type
    if _kind_of(kind) == "other":
        return [_packed(column.slice(row, 1)) if column[row].is_valid else None for row in range(len(column))]
    if pa.types.is_struct(kind):
        index = kind.get_field_index("bytes")
        return _contents(column.flatten()[index]) if index >= 0 else [None] * len(column)
    if pa.types.is_dictionary(kind):
        values = _contents(column.dictionary)
        return [None if index is None else values[index] for index in column.indices.to_pylist()]
    return list(column.cast(pa.large_binary()).to_pylist())


def _packed(cell: pa.Array) -> bytes:
    sink = pa.BufferOutputStream()
    batch = pa.record_batch([cell], names=["cell"])
    with pa.ipc.new_stream(sink, batch.schema) as stream:
        stream.write_batch(batch)
    return bytes(sink.getvalue())


def _value(content: bytes, kind: _Kind) -> Any:
    """The Python value of a kept cell."""
    if kind == "bytes":
        return content
    if kind == "text":
        return content.decode("utf-8", "replace")
    (batch,) = pa.ipc.open_stream(content)
    value = batch.column(0)[0]
    return value.to_numpy() if isinstance(value, pa.FixedShapeTensorScalar) else value.as_py()


_known: dict[tuple[str, str], _Cells | ArrowCells] = {}
_known_lock = threading.Lock()
_files: LRUCache[tuple[str, str, str], pq.ParquetFile] = LRUCache(_OPEN_FILES)
_files_lock = threading.Lock()


@functools.cache
def _spool() -> _Spool:
    return _Spool()


def _cells_of(uri: str, column: str) -> _Cells | ArrowCells:
    """The column as it is in the file now; a store is asked each minute, a disk each time."""
    with _known_lock:
        cells = _known.get((uri, column))
        if cells is not None and sources.in_store(uri) and time.monotonic() - cells.checked_at < _CHECK_S:
            return cells
        found = sources.head(uri)
        if found is None:
            raise FileNotFoundError(uri)
        if cells is None or cells.version != found.etag:
            kind = ArrowCells if uri.lower().endswith(EXTENSIONS) else _Cells
            cells = _known[uri, column] = kind(uri, column, found.etag)
        cells.checked_at = time.monotonic()
        return cells


def _storage_error(error: Exception, reference: str) -> StorageError:
    if isinstance(error, PermissionError) or "ACCESS_DENIED" in str(error):
        return StorageDenied(f"cannot read {reference}: {error}")
    # Arrow raises the same type for a broken connection and a broken page; over the network, trying again may help.
    kind = StorageUnavailable if isinstance(error, OSError) and sources.in_store(reference) else StorageError
    return kind(f"cannot read {reference}: {error}")
