"""The files of a manifest, each opened by its format and read in chunks of rows.

A damaged file is a `ManifestError` that names it.
"""

from __future__ import annotations

import contextvars
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from logging import getLogger
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa

from pia_ray.config.catalog import CatalogConfig
from pia_ray.errors import ManifestError, ManifestUnavailable, PiaRayError, StorageError
from pia_ray.formatting import count_of
from pia_ray.manifest.arrow_files import read_arrow, scan_arrow
from pia_ray.manifest.columns import image_names
from pia_ray.manifest.finding import Found, common_folder, find_names, kind_of, partitions_of
from pia_ray.manifest.json_rows import one_type_per_json_column, read_jsonl, scan_jsonl
from pia_ray.manifest.parquet import open_parquet, read_parquet
from pia_ray.manifest.picture_folders import read_pictures
from pia_ray.manifest.tables import Chunk, Columns, Kind, TableFile, no_twins
from pia_ray.manifest.text import csv_reader, read_csv, read_lines, sniffed_delimiter
from pia_ray.manifest.workbooks import read_workbook, scan_workbook

_log = getLogger(__name__)


def find(uris: Sequence[str], config: CatalogConfig) -> tuple[TableFile, ...]:
    """The files of a manifest or of several, each opened to learn its columns; a folder of images is one.

    Raises:
        ManifestError: nothing there, an unknown extension, or a file that cannot be read.
    """
    found = [_found(uri) for uri in uris]
    root = common_folder([each.root for each in found])
    opened: list[TableFile] = []
    with ThreadPoolExecutor(max_workers=16) as pool:  # footers are one small request each
        for each in found:
            if each.pictures:
                opened.append(_folder_of_pictures(root, each))
                continue
            names = [each.root.removeprefix(root) + name for name in each.tables]
            reads = [pool.submit(contextvars.copy_context().run, _open, root, name, config) for name in names]
            opened += [read.result() for read in reads]
    opened = [replace(file, partitions=_partitions(file)) for file in opened]
    return tuple(one_type_per_json_column(opened))


def _found(uri: str) -> Found:
    try:
        return find_names(uri)
    except OSError as error:
        raise ManifestError(f"cannot read {uri}: {error.strerror or error}") from None


def _folder_of_pictures(root: str, found: Found) -> TableFile:
    below = found.root.removeprefix(root)
    names = ["image", "prompt"] if found.captions else ["image"]
    return TableFile(
        found.root,
        below.rstrip("/") or PurePosixPath(found.root).name,
        root,
        "pictures",
        pa.schema([(name, pa.string()) for name in names]),
        len(found.pictures),
        pictures=tuple(below + name for name in found.pictures),
        captions={below + name: below + text for name, text in found.captions.items()},
    )


def _partitions(file: TableFile) -> dict[str, str | None]:
    """Partition columns that are not in the file itself."""
    return {name: value for name, value in partitions_of(file.name).items() if name not in file.schema.names}


def read(file: TableFile, columns: Columns, *, passed: pa.Schema) -> Iterator[Chunk]:
    """The rows of a file in order, in chunks of bounded size: the cells that planning needs, and `passed` of all files.

    Empty cells and cells of blanks are null, but where they pass through. An empty prompt or negative prompt that a
    format with types holds stays one, as it says that there is none.

    Raises:
        ManifestError: the file is damaged, or a value does not fit the type its column has over all files.
    """
    readers: Mapping[Kind, Callable[[TableFile, Sequence[str], pa.Schema], Iterator[Chunk]]] = {
        "parquet": read_parquet,
        "arrow": read_arrow,
        "csv": read_csv,
        "tsv": read_csv,
        "jsonl": read_jsonl,
        "txt": read_lines,
        "xlsx": read_workbook,
        "pictures": read_pictures,
    }
    sources = {new: column for column, new in columns.passed.items()}
    # A column that the file lacks gets a name that none has, and is null there.
    own = pa.schema([field.with_name(sources.get(field.name, f"\0{field.name}")) for field in passed])
    prompts = (columns.prompt, columns.knobs.get("negative_prompt"))
    try:
        for chunk in readers[file.kind](file, columns.read, own):
            cells = {
                name: _filled(values, keep_empty=name in prompts and file.keeps_empty)
                for name, values in chunk.cells.items()
            }
            if columns.id is not None and columns.index is not None:
                cells[columns.id] = list(map(_id_of_video, cells[columns.id], cells[columns.index]))
            table = _with_partitions(chunk.passed, file).rename_columns(passed.names)
            yield replace(chunk, cells=cells, passed=table)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise ManifestError(f"{file.name} is damaged or cannot be read: {error}") from None
    except (OSError, EOFError, zlib.error, StorageError) as error:
        raise _unread(file.name, error) from None


def _with_partitions(passed: pa.Table, file: TableFile) -> pa.Table:
    for name, value in file.partitions.items():
        if (index := passed.schema.get_field_index(name)) >= 0:
            field = passed.schema.field(index)
            values = pa.repeat(pa.scalar(value, pa.string()), passed.num_rows).cast(field.type)
            passed = passed.set_column(index, field, values)
    return passed


def _filled(values: Sequence[Any], *, keep_empty: bool) -> Sequence[Any]:
    """The cells with null for text that is all blanks, or empty where that is not kept."""
    if keep_empty:
        return [None if type(value) is str and value.isspace() else value for value in values]
    return [None if type(value) is str and (not value or value.isspace()) else value for value in values]


def _id_of_video(row_id: object, index: object) -> object:
    """The id of one of the videos of a row, as another run's manifest needs it: ids there occur once."""
    return row_id if str(index) in ("0", "None") else f"{row_id}-{index}"


def _open(root: str, name: str, config: CatalogConfig) -> TableFile:
    kind = kind_of(name)
    assert kind is not None
    folder = (root + name).rpartition("/")[0] + "/"
    file = TableFile(root + name, name, folder, kind, pa.schema([]), encoding=config.encoding)
    try:
        if kind == "xlsx":
            return scan_workbook(file)
        if kind == "arrow":
            return scan_arrow(file)
        if kind == "parquet":
            with open_parquet(file.uri) as parquet:
                schema, rows = parquet.schema_arrow, parquet.metadata.num_rows
            no_twins(schema.names, name)
            return replace(file, schema=schema, num_rows=rows)
        if kind == "jsonl":
            return scan_jsonl(file)
        if kind == "txt":
            count = None if next(read_lines(file, ["image"], pa.schema([])), None) is not None else 0
            return replace(file, schema=pa.schema([("image", pa.string())]), num_rows=count)
        file = replace(file, delimiter=config.delimiter or sniffed_delimiter(file, image_names(config)))
        with csv_reader(file) as (header, rows_left):
            named = [column for column in header if column]
            no_twins(named, name)
            if len(named) < len(header):
                _log.warning("%s: left out: %s without a name", name, count_of(len(header) - len(named), "column"))
            count = None if next(rows_left, None) is not None else 0
        return replace(file, schema=pa.schema([(column, pa.string()) for column in named]), num_rows=count)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise ManifestError(f"{name} is damaged or not of the kind {kind}: {error}") from None
    except (OSError, EOFError, zlib.error, StorageError) as error:
        raise _unread(name, error) from None


def _unread(name: str, error: Exception) -> ManifestError:
    """The error for a manifest whose file could not be read."""
    away = isinstance(error, PiaRayError) and error.retryable
    reason = (error.strerror if isinstance(error, OSError) else None) or error
    return (ManifestUnavailable if away else ManifestError)(f"cannot read {name}: {reason}")
