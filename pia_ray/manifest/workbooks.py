"""Excel workbooks: the first visible sheet, its cells as text, as a CSV file holds them. Owns openpyxl, an extra."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime, time
from logging import getLogger
from typing import Any
from xml.etree.ElementTree import ParseError

import pyarrow as pa

from pia_ray.errors import ManifestError
from pia_ray.formatting import count_of
from pia_ray.manifest.tables import Chunk, TableFile, bytes_of, no_twins
from pia_ray.manifest.text import text_chunks

_log = getLogger(__name__)


def scan_workbook(file: TableFile) -> TableFile:
    """The file with its columns, all of them text.

    Raises:
        ManifestError: openpyxl is missing, the file is damaged, or its first sheet has no header.
    """
    with _sheet_of(file) as (book, sheet):
        others = [each.title for each in book.worksheets if each is not sheet]
        header = next(_rows_of(sheet), None)
        if header is None:
            raise ManifestError(f'{file.name} has no header: the sheet "{sheet.title}" is empty')
        if others:
            _log.warning('%s: the sheet "%s" is read; left out are %s', file.name, sheet.title, ", ".join(others))
        names = [name for name in header if name]
        no_twins(names, file.name)
        if len(names) < len(header):
            _log.warning("%s: left out: %s without a name", file.name, count_of(len(header) - len(names), "column"))
    schema = pa.schema([(name, pa.string()) for name in names])
    first = next(read_workbook(file, names[:1], pa.schema([])), None)
    return replace(file, schema=schema, num_rows=None if first is not None else 0)


def read_workbook(file: TableFile, cells: Sequence[str], passed: pa.Schema) -> Iterator[Chunk]:
    """As `files.read`; an empty cell is empty text."""
    with _sheet_of(file) as (_, sheet):
        rows = _rows_of(sheet)
        header = next(rows)
        yield from text_chunks(file, header, _fitted(rows, len(header)), cells, passed)


def _fitted(rows: Iterator[list[str]], width: int) -> Iterator[tuple[list[str] | str, int]]:
    """The rows with as many cells as the header, and the characters read so far; for a longer row, a message."""
    chars = 0
    for row in rows:
        chars += sum(map(len, row))
        if len(row) > width:
            yield f"has {len(row)} cells, the header {width}", chars
        else:
            yield row + [""] * (width - len(row)), chars


@contextmanager
def _sheet_of(file: TableFile) -> Iterator[tuple[Any, Any]]:
    """The workbook and its first visible sheet, read row by row."""
    try:
        from openpyxl import load_workbook
    except ImportError:
        raise ManifestError(
            f"{file.name}: Excel workbooks need openpyxl: pip install 'pia-ray[xlsx]', or save the sheet as CSV"
        ) from None
    with bytes_of(file.uri) as stream:
        try:
            book = load_workbook(stream, read_only=True, data_only=True, keep_links=False)
            try:
                sheet = next(each for each in book.worksheets if each.sheet_state == "visible")
                sheet.reset_dimensions()  # some programs state them wrongly
                yield book, sheet
            finally:
                book.close()
        except (zipfile.BadZipFile, ParseError, KeyError, StopIteration, ValueError) as error:
            raise ManifestError(f"{file.name} is damaged or not an xlsx file: {error}") from None


def _rows_of(sheet: Any) -> Iterator[list[str]]:
    """The rows that hold anything, without the empty cells at their end."""
    for cells in sheet.iter_rows(values_only=True):
        row = [_text(cell).strip() for cell in cells]
        while row and not row[-1]:
            row.pop()
        if row:
            yield row


def _text(cell: object) -> str:
    """The cell as a CSV file would hold it: whole numbers without a point, days without a time."""
    if cell is None:
        return ""
    if isinstance(cell, bool):
        return str(cell).lower()
    if isinstance(cell, float) and cell.is_integer() and abs(cell) < 2**53:
        return str(int(cell))
    if isinstance(cell, datetime):
        return str(cell.date() if cell.time() == time() else cell)
    return str(cell)
