"""One manifest row -> its picture and knobs, its work items, or a rejected item that says what is wrong with it.

The plain way. `planning` has a fast one for whole manifests, and uses this one for each row that is not plainly right.
"""

from __future__ import annotations

import hashlib
from base64 import b64encode
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Final

import numpy as np

from pia_ray.config.catalog import CatalogConfig
from pia_ray.config.knobs import ARRAY_KNOBS, DEFAULT_STYLE, REFERENCE_KNOBS
from pia_ray.config.resolving import canonical, seed_from_id
from pia_ray.errors import BadParameter
from pia_ray.manifest import references
from pia_ray.manifest.columns import IMAGE_COLUMNS, columns_of
from pia_ray.manifest.finding import root_of
from pia_ray.manifest.items import KEY_VERSION, MAX_ID_LENGTH, Item, Picture, RunReferences, id_text, items_of
from pia_ray.manifest.parquet import cell_reference
from pia_ray.manifest.tables import Columns, PictureOfRow, TableFile, is_empty, is_packed
from pia_ray.manifest.templates import fill, templates_of
from pia_ray.manifest.versions import Versions
from pia_ray.media import arrays
from pia_ray.storage import sources
from pia_ray.types import ManifestRow

_SHOWN_CHARS: Final = 1000
_REFERENCE_BYTES: Final = 2048


def plan_row(
    cells: Mapping[str, Any],
    config: CatalogConfig,
    *,
    model_version: str,
    style_versions: Mapping[str, str] = MappingProxyType({}),
) -> ManifestRow:
    """The work item of one row as `plan` makes it, for rows that come from elsewhere; other columns are ignored.

    Relative references start from the folder of the first of `config.manifests`. Bytes and arrays travel inside the
    row, as a data: URL.

    Raises:
        BadParameter: a cell has no valid value, or `num_videos` asks for more than one item.
    """
    columns = columns_of(tuple(cells), config)
    kept = {columns.knobs.get("negative_prompt")} | (set() if config.defaults.get("prompt") else {columns.prompt})
    cells = {name: None if name not in kept and is_empty(cell) else cell for name, cell in cells.items()}
    knobs = knobs_of(columns, cells.get)
    templates = templates_of(config)
    row_id = cells.get(columns.id) if columns.id is not None else None
    if (id_template := templates.pop("id", None)) is not None:
        row_id = fill(id_template, cells, field="id")
    for knob, template in templates.items():
        if knob not in knobs:
            knobs[knob] = fill(template, cells)
    if columns.image not in cells:
        raise BadParameter(f"image is missing: give each row one of {', '.join(IMAGE_COLUMNS)}", "image")
    cell = _text_in(cells[columns.image])
    picture = _inside(cell) if isinstance(cell, bytes) else _picture_at(cell, root_of(config.manifests[0]), "")
    versions = Versions() if config.detect_changes else None
    if versions is not None:
        picture = picture._replace(version=versions.of(picture.uri))
    items = items_of(
        row_id,
        picture,
        knobs,
        config,
        model_version=model_version,
        style_versions=style_versions,
        has_id=columns.id is not None or id_template is not None,
        own=_own_references(columns, cells, config, versions),
        run=RunReferences(versions),
    )
    if len(items) > 1:
        raise BadParameter("num_videos is more than 1: repeat the row with other seeds instead", "num_videos")
    return items[0]


def picture_of(
    file: TableFile,
    column: str,
    cell: Any,
    *,
    row: int,
    prefix: str,
    of_row: PictureOfRow | None,
    versions: Versions | None,
) -> Picture:
    """The picture that a row's image cell names or holds; `prefix` as in `references.locate`.

    `of_row` says which one it is, where the row has several.

    Raises:
        BadParameter: no picture can be there.
    """
    name = "data:"
    number, position = (None, None) if of_row is None else of_row
    if isinstance(cell, dict) and file.has_types:
        name = cell.get("path") or name
        cell = cell["path"] if cell.get("bytes") is None and "path" in cell else cell.get("bytes")
    cell = _text_in(cell)
    if isinstance(cell, bytes):
        if not cell:
            raise BadParameter("image holds no bytes", "image")
        uri = cell_reference(file, row, column, position)
        return Picture(uri, references.identity_of_bytes(cell), name, number=number)
    picture = _picture_at(cell, file.folder, prefix)
    if number is not None:
        picture = picture._replace(number=number)
    if file.kind == "pictures":  # a file's own name is not a reference, because it may start with a space
        picture = picture._replace(uri=file.folder + cell, identity=cell)
    if picture.uri.startswith("data:") and file.has_types and not is_packed(file.uri):
        return picture._replace(uri=cell_reference(file, row, column, position))
    return picture if versions is None else picture._replace(version=versions.of(picture.uri))


def references_of(
    file: TableFile,
    columns: Columns,
    cells: Mapping[str, Any],
    *,
    row: int,
    prefix: str,
    versions: Versions | None,
) -> dict[str, Picture]:
    """The files that the row's own knobs refer to or hold, by knob.

    Raises:
        BadParameter: a cell names or holds nothing that can be read.
    """
    found = {}
    for knob in columns.references:
        cell = cells[columns.knobs[knob]]
        if isinstance(cell, dict) and file.has_types:
            cell = cell["path"] if cell.get("bytes") is None and "path" in cell else cell.get("bytes")
        if cell is None:
            continue
        cell = _text_in(cell)
        if knob in ARRAY_KNOBS and isinstance(cell, list | np.ndarray):
            cell = arrays.encode(cell, knob)
        in_place = file.has_types and not is_packed(file.uri)
        inside = isinstance(cell, bytes) or (isinstance(cell, str) and cell.lstrip()[:5].lower() == "data:")
        picture = _reference_in(cell, knob, file.folder, versions, prefix)
        found[knob] = (
            picture._replace(uri=cell_reference(file, row, columns.knobs[knob])) if inside and in_place else picture
        )
    return found


def knobs_of(columns: Columns, cell: Callable[[str], Any]) -> dict[str, Any]:
    """The row's own knobs that do not refer to files: the cells that are not null, by the knob's name."""
    names = {knob: column for knob, column in columns.knobs.items() if knob not in REFERENCE_KNOBS}
    names |= {"prompt": columns.prompt} if columns.prompt else {}
    return {knob: value for knob, column in names.items() if (value := cell(column)) is not None}


def rejected(where: str, columns: Columns, cells: Mapping[str, Any], *, code: str, what: str) -> Item:
    """The item of a row that cannot be animated; `what` goes on from `where`, such as "row 7 of file"."""
    try:
        row_id = id_text(cells.get(columns.id)) if columns.id is not None else where[-MAX_ID_LENGTH:]
    except BadParameter:
        row_id = where[-MAX_ID_LENGTH:]
    row_id = _valid(row_id)
    written = {name: _written(cell) for name, cell in cells.items() if cell is not None}
    spec = canonical({"v": KEY_VERSION, "id": row_id, "rejected": _valid(what), "cells": written})
    image, prompt = cells.get(columns.image), cells.get(columns.prompt) if columns.prompt is not None else None
    return Item(
        work_key=hashlib.sha256(spec.encode()).hexdigest(),
        id=row_id,
        video_index=0,
        image=_valid(references.redacted(image)[:_SHOWN_CHARS]) if isinstance(image, str) else "",
        image_identity="",
        prompt=_valid(prompt) if isinstance(prompt, str) else None,
        seed=seed_from_id(row_id),
        style=DEFAULT_STYLE,
        params=canonical(
            {knob: written[name][:_SHOWN_CHARS] for knob, name in columns.knobs.items() if name in written}
        ),
        error_code=code,
        error_message=_valid(where + what),
    )


def _own_references(
    columns: Columns, cells: Mapping[str, Any], config: CatalogConfig, versions: Versions | None
) -> dict[str, Picture]:
    """As `references_of`, for a row that is in no file."""
    return {
        knob: _reference_in(value, knob, root_of(config.manifests[0]), versions)
        for knob in columns.references
        if (value := cells[columns.knobs[knob]]) is not None
    }


def _reference_in(cell: object, knob: str, folder: str, versions: Versions | None, prefix: str = "") -> Picture:
    """The file that a cell names, or what it holds as a data: URL."""
    if knob in ARRAY_KNOBS and isinstance(cell, list | np.ndarray):
        cell = arrays.encode(cell, knob)
    if isinstance(cell, bytes):
        if not cell:
            raise BadParameter(f"{knob} holds no bytes", knob)
        return _inside(cell)
    if not isinstance(cell, str):
        array = " or an array" if knob in ARRAY_KNOBS else ""
        raise BadParameter(f"{knob} must be a path, a URL or bytes{array}, not {type(cell).__name__}", knob)
    uri, identity = references.locate(cell, folder, prefix, what=knob)
    return Picture(uri, identity, cell, "" if versions is None else versions.of(uri))


def _text_in(cell: Any) -> Any:
    """The cell, or the reference that it holds as bytes: Spark and older tools write text as binary columns."""
    if not isinstance(cell, bytes) or not 0 < len(cell) <= _REFERENCE_BYTES or cell[:1] in b"<{[":
        return cell
    try:
        text = cell.decode()
    except UnicodeDecodeError:
        return cell
    return text if text.isprintable() else cell


def _inside(content: bytes) -> Picture:
    uri = "data:;base64," + b64encode(content).decode()
    return Picture(uri, references.identity_of_bytes(content), "data:")


def _picture_at(cell: object, folder: str, prefix: str) -> Picture:
    if isinstance(cell, str):
        uri, identity = references.locate(cell, folder, prefix)
        return Picture(uri, identity, cell)
    if cell is None:
        raise BadParameter("image is missing or null: give each row a path, URL or bytes", "image")
    raise BadParameter(f"image must be a path or URL, not {type(cell).__name__}", "image")


def _written(cell: object) -> str:
    if isinstance(cell, np.ndarray):
        cell = cell.tobytes()
    if isinstance(cell, str):
        is_url = cell.startswith(("https://", "data:"))
        cell = references.redacted(cell) if is_url else sources.without_password(cell)
    return references.identity_of_bytes(cell) if isinstance(cell, bytes) else _valid(str(cell))


def _valid(text: str) -> str:
    """The text with question marks for lone surrogates."""
    return text.encode("utf-8", "replace").decode()
