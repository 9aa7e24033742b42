"""JSON manifests: lines of objects, or an array of them. Values keep their types, one per column over all files.

A damaged line is a bad row; a damaged array is the end of the file.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from io import TextIOWrapper
from typing import IO, Any, Final

import pyarrow as pa

from pia_ray.errors import ManifestError
from pia_ray.manifest.references import is_unicode
from pia_ray.manifest.tables import Chunk, TableFile, cast, nulls
from pia_ray.manifest.text import bounded, utf8_of

_READ_CHARS: Final = 2**20
_BETWEEN: Final = re.compile(r"\s*,?\s*")


def scan_jsonl(file: TableFile) -> TableFile:
    """The file with its columns; as JSON has no types, a first pass finds the kinds of value each column holds.

    Raises:
        ManifestError: nothing in the file is an object.
    """
    kinds: dict[str, set[str]] = {}
    num_rows, first_fault = 0, ""
    for row, _ in _json_rows(file):
        num_rows += 1
        if isinstance(row, str):
            first_fault = first_fault or row
            continue
        for name, value in row.items():
            kind = "text" if type(value) is str else _json_kind(value)
            if name not in kinds:
                kinds[name] = set()
            kinds[name].add(kind)
    if first_fault and not kinds:
        raise ManifestError(
            f"{file.name} {first_fault}. A JSON manifest has an object on each line, or is an array of objects"
        )
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
    for chunk in bounded(_json_rows(file)):
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


def _json_rows(file: TableFile) -> Iterator[tuple[dict[str, Any] | str, int]]:
    """The objects with the bytes read so far; for a line that is not an object, a message."""
    with utf8_of(file) as stream:
        start = stream.read(2**16).removeprefix(b"\xef\xbb\xbf").lstrip()
        stream.seek(0)
        if start[:1] == b"[" and not _is_line(start):
            yield from _array_rows(stream, file.name)
        else:
            yield from _line_rows(stream)


def _is_line(start: bytes) -> bool:
    """Whether a file that begins with a bracket holds JSON lines: its first line is an array without objects."""
    first, newline, rest = start.partition(b"\n")
    if not newline or not rest.strip():
        return b"{" not in first and bool(first.strip(b"[] \t\r"))
    try:
        return not any(isinstance(value, dict) for value in json.loads(first))
    except ValueError:
        return False


def _line_rows(stream: IO[bytes]) -> Iterator[tuple[dict[str, Any] | str, int]]:
    size = 0
    for number, line in enumerate(stream, 1):
        size += len(line)
        row: dict[str, Any] | str
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            if not text.strip():
                continue
            row = _checked(_JSON.decode(text), f"line {number}", may_escape="\\u" in text)
        except UnicodeDecodeError:
            row = f"(line {number}) is not UTF-8: save the file as UTF-8, or state its --encoding"
        except (ValueError, RecursionError) as error:
            row = f"(line {number}) is not valid JSON: {error}"
        yield row, size


def _checked(row: Any, where: str, *, may_escape: bool) -> dict[str, Any] | str:
    """The row, or a message for what is not an object of Unicode text."""
    if not isinstance(row, dict):
        return f"({where}) is not a JSON object"
    if may_escape and not is_unicode(json.dumps(row, ensure_ascii=False)):
        return f"({where}) holds a lone surrogate, which is not valid Unicode"
    return row


def _array_rows(stream: IO[bytes], name: str) -> Iterator[tuple[dict[str, Any] | str, int]]:
    """As `_line_rows`, of an array, which is read piece by piece."""
    text = TextIOWrapper(stream, encoding="utf-8-sig")
    try:
        number = done = at = 0
        left = text.read(_READ_CHARS).lstrip()[1:]
        while True:
            between = _BETWEEN.match(left, at)
            assert between is not None
            if left[between.end() : between.end() + 1] == "]":
                if (left[between.end() + 1 :] + text.read(_READ_CHARS)).strip():
                    raise ManifestError(f"{name} goes on behind its JSON array: write one array, or an object a line")
                return
            try:
                value, end = _JSON.raw_decode(left, between.end())
                if end == len(left):  # more digits of a number may follow
                    raise json.JSONDecodeError("it is cut off", left, end)
            except (ValueError, RecursionError) as error:
                may_be_cut = isinstance(error, json.JSONDecodeError | RecursionError)
                if not may_be_cut or not (more := text.read(max(_READ_CHARS, len(left) - at))):
                    raise ManifestError(f"{name} is not a JSON array: element {number + 1}: {error}") from None
                done, left, at = done + at, left[at:] + more, 0
                continue
            number, at = number + 1, end
            yield _checked(value, f"element {number}", may_escape=True), done + at
    except UnicodeDecodeError:
        raise ManifestError(f"{name} is not UTF-8: save it so, or state its --encoding") from None
    finally:
        text.detach()


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object. A plain decoder takes the last of equal keys without a word."""
    found = dict(pairs)
    if len(found) != len(pairs):
        ((twice, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"{twice!r} stands twice in an object")
    return found


_JSON = json.JSONDecoder(parse_constant=_no_constant, object_pairs_hook=_object)


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
