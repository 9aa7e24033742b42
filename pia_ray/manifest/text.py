"""CSV, TSV and plain lists of references: a line that is damaged is a bad row, never the end of the file.

Cells stay text ("007" stays "007"). Files in other encodings than UTF-8 are read as UTF-8 from a temporary copy.
"""

from __future__ import annotations

import csv
import re
import tempfile
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from io import TextIOWrapper
from typing import IO, Any, Final

import pyarrow as pa

from pia_ray.config.knobs import folded_name
from pia_ray.errors import ManifestError
from pia_ray.formatting import count_of
from pia_ray.manifest.references import is_unicode
from pia_ray.manifest.tables import CHUNK_BYTES, CHUNK_ROWS, Chunk, TableFile, bytes_of, nulls

_FIELD_CHARS: Final = 128 * 2**20  # of one CSV cell: room for a data: URL of a picture at the cap of 50 MB
_DELIMITERS: Final = (",", ";", "\t", "|")
_NOT_UTF8: Final = "is not UTF-8: save the file as UTF-8, or state its --encoding"
_OTHER_KINDS: Final = {
    b"\x1f\x8b": "a gzip file (.gz)",
    b"\x28\xb5\x2f\xfd": "a zstd file (.zst)",
    b"PK\x03\x04": "a zip file or an Excel workbook (.xlsx)",
    b"\xd0\xcf\x11\xe0": "an old Excel workbook, which has to be saved as .xlsx or CSV",
    b"PAR1": "a Parquet file (.parquet)",
    b"ARROW1": "an Arrow file (.arrow)",
    b"SQLite format 3": "an SQLite database, whose table has to be exported",
    b"%PDF-": "a PDF, which is not a table",
}
"""Kinds of files that people name as text, by their first bytes."""
_SEPARATOR: Final = re.compile(r"\ufeff?\"?sep=(.)\"?\s*", re.IGNORECASE)
"""The first line of files for Excel, which names the delimiter."""


@contextmanager
def utf8_of(file: TableFile) -> Iterator[IO[bytes]]:
    """The bytes of a text file in UTF-8, unpacked.

    Raises:
        ManifestError: the file is not text, or not in the encoding that the run states, or that its first bytes show.
    """
    with bytes_of(file.uri) as stream:
        start = stream.read(256)
        stream.seek(0)
        if (kind := next((kind for magic, kind in _OTHER_KINDS.items() if start.startswith(magic)), None)) is not None:
            raise ManifestError(f"{file.name} is {kind} by its first bytes, and not {file.kind} as its name says")
        encoding = file.encoding or _wide_encoding(start)
        if encoding in (None, "utf-8"):
            yield stream
            return
        with tempfile.TemporaryFile() as copy:
            text = TextIOWrapper(stream, encoding=encoding, newline="")
            try:
                while part := text.read(2**20):
                    copy.write(part.encode())
            except UnicodeError as error:
                raise ManifestError(f"{file.name} is not {encoding}: {error}") from None
            finally:
                text.detach()
            copy.seek(0)
            yield copy


def _wide_encoding(start: bytes) -> str | None:
    """The kind of UTF-16 or UTF-32 that the first bytes show, by their mark or by the zeros of Latin letters."""
    if start[:4] in (b"\xff\xfe\0\0", b"\0\0\xfe\xff"):
        return "utf-32"
    if start[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return "utf-16"
    half = max(1, len(start) // 2)
    for encoding, zeros in (("utf-16-le", start[1::2]), ("utf-16-be", start[::2])):
        if 2 * zeros.count(0) > half:
            return encoding
    return None


def sniffed_delimiter(file: TableFile, image_names: Collection[str]) -> str:
    """The delimiter of a CSV or TSV file: that of its extension, unless the header's names say otherwise.

    A line `sep=;` counts before the header. `image_names` are the names of image columns, as `folded_name` gives them.
    """
    with utf8_of(file) as stream:
        first = ""
        while not first.strip():
            if not (line := stream.readline(2**20)):
                break
            first = line.decode("utf-8-sig", "replace")
    if match := _SEPARATOR.fullmatch(first):
        return match[1]
    usual = "\t" if file.kind == "tsv" else ","
    found: dict[str, list[str]] = {}
    for delimiter in (usual, *_DELIMITERS):
        try:
            found[delimiter] = next(csv.reader([first], delimiter=delimiter), [])
        except csv.Error:
            found[delimiter] = []
    for delimiter, cells in found.items():
        if len(cells) > 1 and any(folded_name(cell) in image_names for cell in cells):
            return delimiter
    if len(found[usual]) > 1 or folded_name(first) in image_names:
        return usual
    return max(found, key=lambda delimiter: len(found[delimiter]))


@contextmanager
def csv_reader(file: TableFile) -> Iterator[tuple[list[str], Iterator[tuple[list[str] | str, int]]]]:
    """The header's names, and the rows with the characters read so far; for a damaged row, a message."""
    csv.field_size_limit(_FIELD_CHARS)  # of the whole process: the module has no limit per reader
    undecodable: list[int] = []
    chars = skipped = 0

    def lines(text: Iterable[str]) -> Iterator[str]:
        nonlocal chars, skipped
        for number, line in enumerate(text, 1):
            chars += len(line)
            if number == 1 and _SEPARATOR.fullmatch(line):
                skipped = 1
                continue
            if not is_unicode(line):
                undecodable.append(number)
            yield line

    with utf8_of(file) as stream:
        text = TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
        reader = csv.reader(lines(text), delimiter=file.delimiter, strict=True)
        try:
            header = [name.strip() for name in next((row for row in reader if row), [])]
        except csv.Error as error:
            raise ManifestError(f"the header of {file.name} is damaged: {error}") from None
        if undecodable:
            raise ManifestError(f"the header of {file.name} {_NOT_UTF8}")
        if not header:
            raise ManifestError(f"{file.name} is empty: it has no header")

        def rows() -> Iterator[tuple[list[str] | str, int]]:
            while True:
                start = reader.line_num + 1 + skipped
                row: list[str] | str
                try:
                    row = next(reader)
                except csv.Error as error:
                    where = _lines(start, reader.line_num + skipped)
                    row = f"({where}) cannot be split into cells: {error}; check its quotes"
                except StopIteration:
                    return
                if undecodable and not isinstance(row, str):
                    row = f"({_lines(start, reader.line_num + skipped)}) {_NOT_UTF8}"
                undecodable.clear()
                if isinstance(row, list) and not any(map(str.strip, row)):
                    continue
                if isinstance(row, list) and len(row) != len(header):
                    where = _lines(start, reader.line_num + skipped)
                    cells = count_of(len(row), "cell")
                    row = f"({where}) has {cells}, the header {len(header)}: check its quotes and separators"
                yield row, chars

        try:
            yield header, rows()
        finally:
            text.detach()


def read_csv(file: TableFile, cells: Sequence[str], passed: pa.Schema) -> Iterator[Chunk]:
    """As `files.read`; an empty cell is empty text."""
    with csv_reader(file) as (header, rows):
        yield from text_chunks(file, header, rows, cells, passed)


def text_chunks(
    file: TableFile,
    header: Sequence[str],
    rows: Iterator[tuple[list[str] | str, int]],
    cells: Sequence[str],
    passed: pa.Schema,
) -> Iterator[Chunk]:
    """As `files.read`, of rows of text with the characters read so far, or with a message in place of a row."""
    nothing = [None] * len(header)
    first = 1
    for chunk in bounded(rows):
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


def read_lines(file: TableFile, cells: Sequence[str], passed: pa.Schema) -> Iterator[Chunk]:
    """As `files.read`, of a file with a reference on each line."""

    def rows() -> Iterator[tuple[str | None, int]]:
        size = 0
        for line in stream:
            size += len(line)
            if line.strip():
                text = line.decode("utf-8-sig" if size == len(line) else "utf-8", "surrogateescape").rstrip("\r\n")
                yield text, size

    with utf8_of(file) as stream:
        first = 1
        for chunk in bounded(rows()):
            bad = {index: _NOT_UTF8 for index, row in enumerate(chunk) if not is_unicode(row)}
            arrays = [nulls(column, len(chunk)) for column in passed]
            yield Chunk(first, len(chunk), {"image": chunk}, pa.Table.from_arrays(arrays, schema=passed), bad)
            first += len(chunk)


def bounded(rows: Iterator[tuple[Any, int]]) -> Iterator[list[Any]]:
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
