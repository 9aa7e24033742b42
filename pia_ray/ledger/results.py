"""The results table: its schema, rows to Arrow and back, and the provenance that travels inside each video.

Reads `results.parquet`; writing it is the ledger's part.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, get_args, get_type_hints

import pyarrow as pa
import pyarrow.parquet as pq

from pia_ray import storage
from pia_ray.errors import (
    LedgerError,
    OutputError,
    OutputUnavailable,
    StorageDamaged,
    StorageError,
    StorageNotFound,
    VideoError,
)
from pia_ray.ledger import layout
from pia_ray.result_row import ResultRow
from pia_ray.temporary_folders import temporary_folder

_WIDE: Final = {"seed": pa.uint64(), "size_bytes": pa.int64()}
_ARROW: Final = {
    str: pa.string(),
    int: pa.int32(),
    float: pa.float64(),
    bool: pa.bool_(),
    datetime: pa.timestamp("us", tz="UTC"),
}


def _arrow_field(name: str, hint: Any) -> pa.Field:
    kinds = [kind for kind in get_args(hint) if kind is not type(None)]
    nullable = len(kinds) < len(get_args(hint))
    kind = kinds[0] if kinds else hint
    return pa.field(name, _WIDE.get(name) or _ARROW.get(kind, pa.string()), nullable=nullable)


RESULTS_SCHEMA: Final = pa.schema([_arrow_field(name, hint) for name, hint in get_type_hints(ResultRow).items()])
"""The columns of `ResultRow`, in its order; a manifest's pass-through columns follow in `results.parquet`."""

NOT_IN_PROVENANCE: Final = frozenset(
    {
        *("video_uri", "thumbnail_uri", "input_thumbnail_uri", "poster_uri", "size_bytes", "sha256", "publish_s"),
        *("review", "review_note", "review_take"),
    }
)
"""Columns that a video cannot hold about itself: its URIs, length, hash, the time of its upload, a later review."""


def to_table(rows: Iterable[ResultRow]) -> pa.Table:
    """The rows as an Arrow table with RESULTS_SCHEMA."""
    records = [dict(vars(row)) for row in rows]
    try:
        return pa.Table.from_pylist(records, schema=RESULTS_SCHEMA)
    except UnicodeEncodeError:  # names of files may hold bytes that are no text; a row is never lost for that
        return pa.Table.from_pylist([{k: _as_text(v) for k, v in r.items()} for r in records], schema=RESULTS_SCHEMA)


def from_table(table: pa.Table) -> list[ResultRow]:
    """The rows of a table that has the columns of RESULTS_SCHEMA, in any order and among others.

    Raises:
        LedgerError: as `conform`.
    """
    return [from_record(record) for record in conform(table).to_pylist()]


def from_record(record: Mapping[str, Any]) -> ResultRow:
    """The row whose columns are in `record`, where a missing one is null; other keys are ignored.

    Raises:
        LedgerError: a column that may not be null is missing or null.
    """
    wrong = [column.name for column in RESULTS_SCHEMA if not column.nullable and record.get(column.name) is None]
    if wrong:
        raise LedgerError(f"a results row has no {', '.join(wrong)}")
    cells: dict[str, Any] = {name: record.get(name) for name in RESULTS_SCHEMA.names}
    return ResultRow(**cells)


def provenance(row: ResultRow) -> dict[str, Any]:
    """The provenance inside the row's video: plain JSON values, the seed as text."""
    values = {f.name: getattr(row, f.name) for f in dataclasses.fields(row) if f.name not in NOT_IN_PROVENANCE}
    return {**values, "seed": str(row.seed), "finished_at": row.finished_at.astimezone(UTC).isoformat()}


def tells_row(provenance: Mapping[str, Any]) -> bool:
    """Whether the provenance inside a video is that of a row; one that is reduced has no id."""
    return "id" in provenance


def row_from_provenance(
    values: Mapping[str, Any],
    *,
    video_uri: str,
    thumbnail_uri: str | None,
    input_thumbnail_uri: str | None,
    size_bytes: int,
    sha256: str,
    poster_uri: str | None = None,
    publish_s: float | None = None,
) -> ResultRow:
    """The result row of a video that is already there, from what is written inside it.

    Raises:
        VideoError: the provenance is not one of ours.
    """
    record: dict[str, Any] = {
        **dict.fromkeys(RESULTS_SCHEMA.names),
        **values,
        "video_uri": video_uri,
        "thumbnail_uri": thumbnail_uri,
        "input_thumbnail_uri": input_thumbnail_uri,
        "poster_uri": poster_uri,
        "size_bytes": size_bytes,
        "sha256": sha256,
        "publish_s": publish_s,
    }
    try:
        record["seed"] = int(record["seed"])
        record["finished_at"] = datetime.fromisoformat(record["finished_at"])
        row = from_record(record)
        to_table([row])  # values of the wrong type are found here, not when a part of many rows is written
    except (LedgerError, TypeError, ValueError, pa.ArrowException) as error:
        raise VideoError(f"{video_uri} has no provenance of pia-ray: {error}") from None
    return row


def read_results(output: str) -> pa.Table:
    """The results table of an output: one row per work item that has ended, in manifest order.

    Columns that an earlier version did not write are null.

    Raises:
        OutputError: the output has no table yet, or it cannot be read.
    """
    with open_results(output) as file:
        return _filled(file.read(), RESULTS_SCHEMA)


@contextmanager
def open_results(output: str) -> Iterator[pq.ParquetFile]:
    """The results table of an output, to be read by columns and row groups.

    A local file is read where it lies, an object from a temporary copy.

    Errors of the block that are not those of reading the table pass through.

    Raises:
        OutputError: as `read_results`, also while the table is read.
    """
    with ExitStack() as opened:
        try:
            path = opened.enter_context(_local_copy(layout.results_uri(output)))
            file = opened.enter_context(pq.ParquetFile(path))
        except (StorageNotFound, FileNotFoundError, NotADirectoryError):
            raise OutputError(
                f"there are no results in {output} yet: run `pia-ray animate ... --output {output}`, or, after a run "
                "that was killed, the same command again"
            ) from None
        except StorageDamaged as error:
            raise OutputError(f"{error.message} `pia-ray ledger rebuild {output}` writes it anew") from None
        except StorageError as error:
            kind = OutputUnavailable if error.retryable else OutputError
            raise kind(f"the results of {output} cannot be read: {error.message}") from None
        except (pa.ArrowException, OSError) as error:
            raise _unreadable(output, error) from None
        try:
            yield file
        except pa.ArrowException as error:
            raise _unreadable(output, error) from None
        except OSError as error:
            if error.errno is not None:
                raise
            raise _unreadable(output, error) from None


def _unreadable(output: str, error: Exception) -> OutputError:
    """The error for a table that Arrow does not read. Its errors for damaged files have no number of the system."""
    if isinstance(error, OSError) and error.errno is not None:
        return OutputError(f"the results of {output} cannot be read: {os.strerror(error.errno)}")
    uri = layout.results_uri(output)
    return OutputError(f"{uri} is damaged ({error}): `pia-ray ledger rebuild {output}` writes it anew")


@contextmanager
def _local_copy(uri: str) -> Iterator[Path]:
    if not storage.is_s3(uri):
        yield storage.local_path(uri)
        return
    with temporary_folder() as folder:
        path = folder / "results.parquet"
        storage.copy_to_file(uri, path)
        yield path


def read_parquet(content: bytes, *, columns: Sequence[str] | None = None) -> pa.Table:
    """The table in a Parquet file's bytes, its checksums verified.

    Raises:
        LedgerError: it is empty, cut off or damaged.
    """
    try:
        with pq.ParquetFile(pa.BufferReader(content), page_checksum_verification=True) as file:
            return file.read(columns=list(columns) if columns is not None else None, use_threads=False)
    except (pa.ArrowException, OSError) as error:
        raise LedgerError(f"not a whole Parquet file: {error}") from None


def conform(table: pa.Table, columns: Sequence[str] | None = None, *, schema: pa.Schema = RESULTS_SCHEMA) -> pa.Table:
    """These columns of the schema, or all, in its types; null where an earlier version did not write one.

    Raises:
        LedgerError: a column that may not be null is missing, or one is of another type.
    """
    schema = schema if columns is None else pa.schema([schema.field(name) for name in columns])
    if table.schema.equals(schema):
        return table  # as from a worker: a driver takes each row's table, and the rest would cost it 1 ms
    try:
        return _filled(table, schema).select(schema.names).cast(schema)
    except (KeyError, ValueError, pa.ArrowException) as error:
        raise LedgerError(f"not a table of results: {error}") from None


def _filled(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """The table with nulls for the nullable columns of the schema that it lacks, each where the schema has it."""
    names = {*table.column_names}
    for position, column in enumerate(schema):
        if column.nullable and column.name not in names:
            nulls = pa.nulls(len(table), column.type)
            table = table.add_column(min(position, table.num_columns), column, nulls)
    return table


def _as_text(value: object) -> object:
    return value.encode("utf-8", "replace").decode("utf-8") if isinstance(value, str) else value
