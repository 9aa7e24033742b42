"""Rows with several pictures -> a row for each picture.

Such are cells with a list, text with references between commas, Google's column `additional_image_link`, and the
continuation rows of a shop's export: rows with the handle of the product above and no title, which bring its further
pictures.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from logging import getLogger
from typing import Any, Final, Literal, NamedTuple

import pyarrow as pa

from pia_ray.config.knobs import folded_name
from pia_ray.errors import BadParameter
from pia_ray.formatting import count_of
from pia_ray.manifest.finding import PICTURES
from pia_ray.manifest.items import id_text
from pia_ray.manifest.tables import Chunk, Columns, PictureOfRow, TableFile, is_empty

_URL: Final = re.compile(r"(?:[a-zA-Z][a-zA-Z0-9+.-]*:)?//\S")
# A run of spaces is tried from its start alone: from each of them, a cell of 100,000 would take minutes.
_BETWEEN_URLS: Final = re.compile(r"(?:(?<!\s)\s+)?[,;|\n]\s*+(?=(?:[a-zA-Z][a-zA-Z0-9+.-]*:)?//\S)")
"""Separators before a scheme only, because URLs hold commas."""

_BETWEEN_FILES: Final = re.compile(r"(?:(?<!\s)\s+)?[,;|\n]\s*+")
_SEPARATOR: Final = re.compile(r"[,;|\n]")
_OF_PICTURES: Final = ("variant", "image", "option")
"""Starts of the names of a shop export's columns that belong to a row and not to its product."""

_log = getLogger(__name__)


def each_picture(
    chunks: Iterable[Chunk], file: TableFile, columns: Columns, *, pictures: Literal["all", "first"]
) -> Iterator[Chunk]:
    """The chunks with a row for each picture, or for the first one of each row or product.

    The id of a further picture is that of the row with `-p1`, `-p2`, ... Rows without an id need none, because their
    ids come from the pictures.
    """
    products = _Products(file, columns) if _is_shop_export(file, columns) else None
    further = _further_pictures(file, columns)
    for chunk in chunks:
        if further is not None:
            chunk = _joined(chunk, file, columns, further)
        owners: Sequence[int | None] = [None] * chunk.num_rows
        if products is not None:
            chunk, owners = products.filled(chunk)
        if products is None and not any(map(_may_be_several, chunk.cells[columns.image])):
            yield chunk
        else:
            yield _expanded(chunk, file, columns, owners, products, pictures)
    if products is not None and products.num_without:
        _log.warning(
            "%s: left out: %s to continue a product, without a picture",
            file.name,
            count_of(products.num_without, "row"),
        )


def _is_shop_export(file: TableFile, columns: Columns) -> bool:
    names = set(map(folded_name, file.schema.names))
    return {"handle", "title"} <= names and folded_name(columns.image).startswith("image")


def _further_pictures(file: TableFile, columns: Columns) -> str | None:
    """The name, among those that pass through, of the further pictures in a feed for Google."""
    if folded_name(columns.image) != folded_name("image_link"):
        return None
    wanted = folded_name("additional_image_link")
    return next((new for name, new in columns.passed.items() if folded_name(name) == wanted), None)


def _joined(chunk: Chunk, file: TableFile, columns: Columns, further: str) -> Chunk:
    """The chunk whose pictures are lists of the main one and the further ones."""
    images: list[Any] = list(chunk.cells[columns.image])
    for row, more in enumerate(chunk.passed[further].to_pylist()):
        if isinstance(more, list) and all(isinstance(each, str) for each in more):
            more = ",".join(more)
        if isinstance(images[row], str) and not is_empty(images[row]) and isinstance(more, str) and not is_empty(more):
            text = f"{images[row].strip()},{more.strip()}"
            images[row] = text if _pictures_in(text, file) is not None else images[row]
    return replace(chunk, cells={**chunk.cells, columns.image: images})


def _may_be_several(cell: object) -> bool:
    if isinstance(cell, str):
        return _SEPARATOR.search(cell) is not None and cell[:5].lower() != "data:"
    return isinstance(cell, list)


class _Cell(NamedTuple):
    cell: Any
    position: int | None


def _pictures_in(cell: Any, file: TableFile) -> list[_Cell] | None:
    """The pictures of a cell that holds several; None for any other cell."""
    if isinstance(cell, list):
        if not file.has_types:
            cell = [_source_of(each) for each in cell]
        return [_Cell(each, number) for number, each in enumerate(cell) if not _holds_nothing(each)]
    if not isinstance(cell, str) or not _may_be_several(cell):
        return None
    text = cell.strip()
    if _URL.match(text):
        parts = _BETWEEN_URLS.split(text)
    else:
        parts = [part for part in _BETWEEN_FILES.split(text) if part]
        if not all(part[part.rfind(".") :].lower() in PICTURES for part in parts):
            return None
    return [_Cell(part, None) for part in parts] if len(parts) > 1 else None


def _source_of(cell: object) -> object:
    """The reference in an object of a JSON list, as shops write them."""
    if isinstance(cell, Mapping):
        return next((cell[name] for name in ("src", "url", "path") if cell.get(name)), None)
    return cell


def _holds_nothing(cell: object) -> bool:
    if isinstance(cell, Mapping):
        return cell.get("bytes") is None and is_empty(cell.get("path"))
    return is_empty(cell)


class _Chosen(NamedTuple):
    """An image of a new row."""

    source: int
    """The row in the chunk that it comes from."""
    image: Any
    picture: PictureOfRow | None


def _expanded(
    chunk: Chunk,
    file: TableFile,
    columns: Columns,
    owners: Sequence[int | None],
    products: _Products | None,
    pictures: Literal["all", "first"],
) -> Chunk:
    chosen = list(_chosen(chunk, file, columns, owners, products, pictures))
    sources, found = [each.source for each in chosen], [each.picture for each in chosen]
    cells = {name: [values[row] for row in sources] for name, values in chunk.cells.items()}
    cells[columns.image] = [each.image for each in chosen]
    if columns.id is not None:
        cells[columns.id] = [_id_of(cell, picture) for cell, picture in zip(cells[columns.id], found, strict=True)]
    bad_rows = {place: chunk.bad_rows[row] for place, row in enumerate(sources) if row in chunk.bad_rows}
    return replace(
        chunk,
        num_rows=len(sources),
        cells=cells,
        passed=chunk.passed.take(pa.array(sources, pa.int64())) if chunk.passed.num_columns else chunk.passed,
        bad_rows=bad_rows,
        numbers=[chunk.first_row + row for row in sources],
        pictures=found,
    )


def _chosen(
    chunk: Chunk,
    file: TableFile,
    columns: Columns,
    owners: Sequence[int | None],
    products: _Products | None,
    pictures: Literal["all", "first"],
) -> Iterator[_Chosen]:
    """The images of the new rows, in order; a picture that its row or product has already is left out."""
    seen: set[Any] = products.seen if products is not None else set()
    for row, cell in enumerate(chunk.cells[columns.image]):
        if owners[row] is None:
            seen.clear()
        several = None if row in chunk.bad_rows else _pictures_in(cell, file)
        if products is not None and several is None and row not in chunk.bad_rows:
            several = [] if cell is None else [_Cell(cell, None)]
        if products is not None and several == [] and owners[row] is not None:
            products.num_without += 1
            continue
        if not several:  # one picture, or one that is missing
            yield _Chosen(row, cell if several is None else None, None)
            continue
        for each in several:
            key = _key(each.cell)
            if key in seen or (seen and pictures == "first"):
                continue
            yield _Chosen(row, each.cell, PictureOfRow(len(seen), each.position))
            seen.add(key)


def _key(cell: object) -> object:
    """Equal for equal pictures, and can be in a set."""
    key = tuple(cell.values()) if isinstance(cell, Mapping) else cell
    try:
        hash(key)
    except TypeError:  # a list within a list, which is no picture, as planning says
        return repr(key)
    return key


def _id_of(cell: object, picture: PictureOfRow | None) -> object:
    if picture is None or not picture.number:
        return cell
    try:
        return picture.id_in(id_text(cell))
    except BadParameter:  # planning says so
        return cell


class _Products:
    """The products of a shop's export: their continuation rows get the cells that only the first row states."""

    def __init__(self, file: TableFile, columns: Columns) -> None:
        names = {folded_name(name): name for name in reversed(file.schema.names)}
        self._handle, self._title = names["handle"], names["title"]
        self._columns = columns
        self._last: Chunk | None = None
        """The first row of the product that was met last."""
        self._last_handle: object = None
        self.seen: set[Any] = set()
        """The pictures of that product."""
        self.num_without = 0

    def filled(self, chunk: Chunk) -> tuple[Chunk, list[int | None]]:
        """The chunk, and the row of the product that each row continues: -1 for one before this chunk."""
        owners = self._owners(chunk)
        shift = 0 if self._last is None else 1
        cells = {
            name: [
                self._value(name, owner, chunk) if owner is not None and is_empty(value) else value
                for value, owner in zip(values, owners, strict=True)
            ]
            if name != self._columns.image
            else values
            for name, values in chunk.cells.items()
        }
        before = pa.concat_tables([*([self._last.passed] if self._last is not None else []), chunk.passed])
        passed = chunk.passed
        for place, name in enumerate(passed.schema.names):
            if folded_name(name).startswith(_OF_PICTURES):
                continue
            values = passed.column(place).to_pylist()
            rows = [
                (row if owner is None or not is_empty(value) else owner) + shift
                for row, (value, owner) in enumerate(zip(values, owners, strict=True))
            ]
            passed = passed.set_column(
                place, passed.schema.field(place), before.column(place).take(pa.array(rows, pa.int64()))
            )
        found = replace(chunk, cells=cells, passed=passed)
        firsts = [row for row, owner in enumerate(owners) if owner is None]
        if firsts:
            row = firsts[-1]
            one = {name: [values[row]] for name, values in cells.items()}
            self._last = replace(chunk, num_rows=1, cells=one, passed=passed.slice(row, 1), bad_rows={})
        return found, owners

    def _owners(self, chunk: Chunk) -> list[int | None]:
        owners: list[int | None] = []
        last = -1
        for row, (handle, title) in enumerate(
            zip(self._column(chunk, self._handle), self._column(chunk, self._title), strict=True)
        ):
            continues = not is_empty(handle) and handle == self._last_handle and is_empty(title)
            if row in chunk.bad_rows or not continues:
                owners.append(None)
                last = row
                self._last_handle = None if row in chunk.bad_rows else handle
            else:
                owners.append(last)
        return owners

    def _column(self, chunk: Chunk, name: str) -> Sequence[Any]:
        if name in chunk.cells:
            return chunk.cells[name]
        values: list[Any] = chunk.passed[self._columns.passed[name]].to_pylist()
        return values

    def _value(self, name: str, owner: int, chunk: Chunk) -> Any:
        if owner >= 0:
            return chunk.cells[name][owner]
        assert self._last is not None
        return self._last.cells[name][0]
