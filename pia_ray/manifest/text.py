"""CSV, TSV and JSON lines manifests: a line that is damaged is a bad row, never the end of the file.

CSV cells stay text ("007" stays "007"); JSON values keep their types, one per column over all files.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from io import TextIOWrapper
from typing import IO, Any, Final

import pyarrow as pa

from pia_ray.errors import ManifestError
from pia_ray.manifest.references import is_unicode
from pia_ray.manifest.tables import CHUNK_BYTES, CHUNK_ROWS, Chunk, TableFile, bytes_of, cast, nulls

_FIELD_CHARS: Final = 128 * 2**20  # of one CSV cell: room for a data: URL of a picture at the cap of 50 MB


@contextmanager
def csv_reader(file: TableFile) -> Iterator[tuple[list[str], Iterator[tuple[list[str] | str, int]]]]:
    """The header's names, and the rows with the characters read so far; for a damaged row, a message."""
    csv.field_size_limit(_FIELD_CHARS)  # of the whole process: the module has no limit per reader
    undecodable: list[int] = []
    chars = 0

    def lines(text: Iterable[str]) -> Iterator[str]:
        nonlocal chars
        for number, line in enumerate(text, 1):
            chars += len(line)
            if not is_unicode(line):
                undecodable.append(number)
            yield line

    with bytes_of(file.uri) as stream:
        _refuse_utf16(stream, file.name)
        text = TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
        reader = csv.reader(lines(text), delimiter="\t" if file.kind == "tsv" else ",", strict=True)
        try:
            header = [name.strip() for name in next((row for row in reader if row), [])]
        except csv.Error as error:
            raise ManifestError(f"the header of {file.name} is damaged: {error}") from None
        if undecodable:
            raise ManifestError(f"the header of {file.name} is not UTF-8: save the file as UTF-8")
        if not header:
            raise ManifestError(f"{file.name} is empty: it has no header")

        def rows() -> Iterator[tuple[list[str] | str, int]]:
            while True:
                start = reader.line_num + 1
                row: list[str] | str
                try:
                    row = next(reader)
                except csv.Error as error:
                    row = f"({_lines(start, reader.line_num)}) cannot be split into cells: {error}; check its quotes"
                except StopIteration:
                    return
                if undecodable and not isinstance(row, str):
                    row = f"({_lines(start, reader.line_num)}) is not UTF-8: save the file as UTF-8"
                undecodable.clear()
                if isinstance(row, list) and not any(map(str.strip, row)):
                    continue
                if isinstance(row, list) and len(row) != len(header):
                    where = _lines(start, reader.line_num)
                    row = f"({where}) has {len(row)} cells, the header {len(header)}: check its quotes and separators"
                yield row, chars

        try:
            yield header, rows()
        finally:
            text.detach()


def read_csv(file: TableFile, cells: Sequence[str], passed: pa.Schema) -> Iterator[Chunk]:
    """As `files.read`; an empty cell is empty text."""
    with csv_reader(file) as (header, rows):
        nothing = [None] * len(header)
        first = 1
        for chunk in _bounded(rows):
            bad = {index: row for index, row in enumerate(chunk) if isinstance(row, str)}
            columns = dict(
                zip(header, zip(*(nothing if isinstance(r, str) else r for r in chunk), strict=True), strict=True)
            )
            arrays = [
                pa.array(columns[column.name], pa.string()).cast(column.type)
                if column.name in file.schema.names and column.name not in cells
                else nulls(column, len(chunk))
                for column in passed
            ]
            values = {name: columns[name] for name in cells}
            yield Chunk(first, len(chunk), values, pa.Table.from_arrays(arrays, schema=passed), bad)
            first += len(chunk)


def scan_jsonl(file: TableFile) -> TableFile:
    """The file with its columns; as JSON has no types, a first pass finds the kinds of value each column holds."""
    kinds: dict[str, set[str]] = {}
    num_rows = 0
    for row, _ in _json_rows(file):
        num_rows += 1
        if isinstance(row, str):
            continue
        for name, value in row.items():
            kind = "text" if type(value) is str else _json_kind(value)
            if name not in kinds:
                kinds[name] = set()
            kinds[name].add(kind)
    schema = pa.schema([pa.field(name, pa.null(), metadata={"kinds": " ".join(kinds[name])}) for name in kinds])
    return replace(file, schema=schema, num_rows=num_rows)


def one_type_per_json_column(files: list[TableFile]) -> list[TableFile]:
    """The files with each column of JSON lines typed by the values in all of them."""
    kinds: dict[str, set[str]] = {}
    for file in files:
        for column in file.schema if file.kind == "jsonl" else ():
            kinds.setdefault(column.name, set()).update(column.metadata[b"kinds"].decode().split())
    types = {name: _json_type(found) for name, found in kinds.items()}
    as_json = frozenset(name for name, kind in types.items() if kind is None)
    return [
        replace(
            file,
            schema=pa.schema([(name, types[name] or pa.string()) for name in file.schema.names]),
            json_columns=as_json,
        )
        if file.kind == "jsonl"
        else file
        for file in files
    ]


def read_jsonl(file: TableFile, cells: Sequence[str], passed: pa.Schema) -> Iterator[Chunk]:
    """As `files.read`."""
    first = 1
    for chunk in _bounded(_json_rows(file)):
        bad = {index: row for index, row in enumerate(chunk) if isinstance(row, str)}
        rows: list[dict[str, Any]] = [{} if isinstance(row, str) else row for row in chunk]
        arrays = [
            _json_array(rows, column, file)
            if column.name in file.schema.names and column.name not in cells
            else nulls(column, len(chunk))
            for column in passed
        ]
        values = {name: [row.get(name) for row in rows] for name in cells}
        yield Chunk(first, len(chunk), values, pa.Table.from_arrays(arrays, schema=passed), bad)
        first += len(chunk)


def _bounded(rows: Iterator[tuple[Any, int]]) -> Iterator[list[Any]]:
    """Lists of rows, each of at most CHUNK_ROWS and about CHUNK_BYTES."""
    chunk: list[Any] = []
    start = 0
    for row, chars in rows:
        chunk.append(row)
        if len(chunk) >= CHUNK_ROWS or chars - start > CHUNK_BYTES:
            yield chunk
            chunk, start = [], chars
    if chunk:
        yield chunk


def _lines(start: int, end: int) -> str:
    return f"line {start}" if end <= start else f"lines {start} to {end}"


def _refuse_utf16(stream: IO[bytes], name: str) -> None:
    if stream.read(2) in (b"\xff\xfe", b"\xfe\xff"):
        raise ManifestError(f"{name} is UTF-16: save the file as UTF-8")
    stream.seek(0)


def _json_rows(file: TableFile) -> Iterator[tuple[dict[str, Any] | str, int]]:
    """The objects with the bytes read so far; for a line that is not an object, a message."""
    size = 0
    with bytes_of(file.uri) as stream:
        _refuse_utf16(stream, file.name)
        for number, line in enumerate(stream, 1):
            size += len(line)
            row: dict[str, Any] | str
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                if not text.strip():
                    continue
                row = _JSON.decode(text)
                if not isinstance(row, dict):
                    row = f"(line {number}) is no JSON object"
                elif "\\u" in text and not is_unicode(json.dumps(row, ensure_ascii=False)):
                    row = f"(line {number}) holds a lone surrogate, which is not valid Unicode"
            except UnicodeDecodeError:
                row = f"(line {number}) is not UTF-8: save the file as UTF-8"
            except (ValueError, RecursionError) as error:
                row = f"(line {number}) is no JSON: {error}"
            yield row, size


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


_JSON = json.JSONDecoder(parse_constant=_no_constant)


def _json_kind(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, float):
        return "float"
    if isinstance(value, int):
        if abs(value) <= 2**53:
            return "int"
        return "long" if -(2**63) <= value < 2**63 else "unsigned" if 0 < value < 2**64 else "huge"
    return "text" if isinstance(value, str) else "nested"


def _json_type(kinds: set[str]) -> pa.DataType | None:
    """The column type for values of these kinds, or None: JSON text."""
    kinds = kinds - {"null"}
    for kind, allowed in (
        (pa.null(), set[str]()),
        (pa.string(), {"text"}),
        (pa.bool_(), {"bool"}),
        (pa.int64(), {"int", "long"}),
        (pa.float64(), {"int", "float"}),
    ):
        if kinds <= allowed:
            return kind
    return None


def _json_array(rows: list[dict[str, Any]], column: pa.Field, file: TableFile) -> pa.Array:
    values = [row.get(column.name) for row in rows]
    if column.name in file.json_columns:
        values = [None if value is None else json.dumps(value, ensure_ascii=False) for value in values]
    kind = file.schema.field(column.name).type
    return cast(pa.array(values, pa.string() if pa.types.is_null(kind) else kind), column, file)
