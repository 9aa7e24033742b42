"""An opened manifest: its files, the meaning of their columns, and those that pass through to the results."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from logging import getLogger
from typing import Final

import pyarrow as pa

from pia_ray.config.catalog import CatalogConfig
from pia_ray.config.knobs import ARRAY_KNOBS, KNOBS, REFERENCE_KNOBS, RESERVED_KNOBS, suggest
from pia_ray.errors import ManifestError
from pia_ray.manifest.files import find
from pia_ray.manifest.items import ITEMS_SCHEMA
from pia_ray.manifest.tables import TableFile, unify
from pia_ray.types import ResultRow

IMAGE_COLUMNS: Final = ("image", "url", "image_url", "image_path", "file_name")
PROMPT_COLUMNS: Final = ("prompt", "caption", "text")
"""Names of the image and prompt columns; the first that is there counts."""

_RESULT_COLUMNS: Final = frozenset({field.name for field in fields(ResultRow)} | set(ITEMS_SCHEMA.names))
_log = getLogger(__name__)


@dataclass(frozen=True)
class Columns:
    """The meaning of the columns of one manifest file."""

    id: str | None
    image: str
    prompt: str | None
    knobs: tuple[str, ...]
    """All others of `AnimationParams`; their column has the knob's name."""
    passed: tuple[str, ...]

    @property
    def references(self) -> tuple[str, ...]:
        """Those of the knobs that refer to files."""
        return tuple(knob for knob in self.knobs if knob in REFERENCE_KNOBS)

    @property
    def read(self) -> list[str]:
        """The columns whose values planning needs."""
        return [name for name in dict.fromkeys((self.id, self.image, self.prompt, *self.knobs)) if name is not None]


@dataclass(frozen=True)
class Manifest:
    """An opened manifest: its files, their columns, and the columns that pass through."""

    uri: str
    files: tuple[TableFile, ...]
    columns: tuple[Columns, ...]
    """One per file."""
    passed: pa.Schema

    @property
    def items_schema(self) -> pa.Schema:
        """Schema of the tables that `plan` yields."""
        return pa.schema([*ITEMS_SCHEMA, *self.passed])


def open_manifest(config: CatalogConfig) -> Manifest:
    """The manifest of a run, by its files' headers and footers (JSON lines have neither and are read whole).

    Raises:
        ManifestError: there is no manifest, it has no rows, or its columns cannot work; says which and what to do.
    """
    uri = config.manifest
    found = find(uri)
    if all(file.num_rows == 0 for file in found):
        raise ManifestError(f"{uri} has no rows")
    found = tuple(file for file in found if file.num_rows != 0)
    if found[0].kind == "pictures" and "prompt" not in config.defaults:
        raise ManifestError(f"{uri} is a folder of images, which has no prompts: give a --prompt for all")
    columns = tuple(_columns(file, config) for file in found)
    return Manifest(uri, found, columns, unify(found, [meant.passed for meant in columns]))


def _columns(file: TableFile, config: CatalogConfig) -> Columns:
    id_col, image_col, prompt_col = config.id_col, config.image_col, config.prompt_col
    names = file.schema.names
    there = f"Columns there: {', '.join(names) or 'none'}."
    for flag, name in (("--id-col", id_col), ("--image-col", image_col), ("--prompt-col", prompt_col)):
        if name is not None and name not in names and file.kind != "pictures":
            raise ManifestError(f'{file.name} has no column "{name}" ({flag}).{suggest(name, names)} {there}')
    if file.kind == "pictures":
        id_col = image_col = prompt_col = None
    found = columns_of(names, id_col, image_col, prompt_col)
    if found.image not in names:
        tip = _separator_tip(names)
        raise ManifestError(
            f"{file.name} has no image column. {there} {tip}Name one of them {', '.join(IMAGE_COLUMNS[:-1])} or "
            f"{IMAGE_COLUMNS[-1]}, or say which it is with --image-col"
        )
    if found.prompt is None and "prompt" not in config.defaults:
        raise ManifestError(
            f"{file.name} has no prompt column. {there} Name one of them {', '.join(PROMPT_COLUMNS[:-1])} or "
            f"{PROMPT_COLUMNS[-1]}, say which it is with --prompt-col, or give a --prompt for all rows"
        )
    _check_types(file, found)
    for name in found.passed:
        if name in RESERVED_KNOBS:
            raise ManifestError(
                f'column "{name}" of {file.name}: this knob is not supported by this version; drop or rename the column'
            )
        if name in _RESULT_COLUMNS:
            raise ManifestError(
                f'column "{name}" of {file.name} clashes with the column of that name in the results: rename it'
            )
        if near := difflib.get_close_matches(name, KNOBS, n=1, cutoff=0.85):
            _log.warning('%s: column "%s" passes through; did you mean the knob "%s"?', file.name, name, near[0])
    return found


def columns_of(names: Sequence[str], id_col: str | None, image_col: str | None, prompt_col: str | None) -> Columns:
    """The meaning of columns of these names. The image's column may be missing."""
    image = image_col or next((name for name in IMAGE_COLUMNS if name in names), IMAGE_COLUMNS[0])
    prompt = prompt_col or next((name for name in PROMPT_COLUMNS if name in names), None)
    row_id = id_col or ("id" if "id" in names else None)
    taken = {image, prompt, row_id}
    knobs = tuple(name for name in KNOBS if name in names and name != "prompt" and name not in taken)
    passed = tuple(name for name in names if name not in taken and name not in knobs)
    return Columns(row_id, image, prompt, knobs, passed)


def _check_types(file: TableFile, columns: Columns) -> None:
    def kind(name: str) -> pa.DataType:
        found = file.schema.field(name).type
        found = found.storage_type if isinstance(found, pa.BaseExtensionType) else found
        return found.value_type if pa.types.is_dictionary(found) else found

    def refuse(name: str, wanted: str) -> None:
        raise ManifestError(f'column "{name}" of {file.name} is {file.schema.field(name).type}: {wanted}')

    def may_refer(name: str) -> bool:
        found = kind(name)
        struct = pa.types.is_struct(found) and found.get_field_index("bytes") >= 0
        return _is_text(found) or _is_binary(found) or struct or bool(pa.types.is_null(found))

    if not may_refer(columns.image):
        refuse(columns.image, "an image is a path or URL, bytes, or a struct of bytes and path")
    if _packs_bytes(file, columns.image):
        refuse(columns.image, "unpack the .gz, image bytes are read from the file in place")
    for name in columns.references:
        is_array = name in ARRAY_KNOBS
        if not may_refer(name) and not (is_array and _holds_floats(kind(name))):
            lists = ", nested lists of floats" if is_array else ""
            refuse(name, f"{name} is a path or URL, bytes{lists}, or a struct of bytes and path")
        if _packs_bytes(file, name):
            refuse(name, "unpack the .gz, what cells hold is read from the file in place")
    if columns.prompt is not None and not (_is_text(kind(columns.prompt)) or pa.types.is_null(kind(columns.prompt))):
        refuse(columns.prompt, "a prompt is text")
    if columns.id is not None and (pa.types.is_nested(kind(columns.id)) or pa.types.is_boolean(kind(columns.id))):
        refuse(columns.id, "an id is text or a whole number")
    for name in columns.knobs:
        if name in columns.references:
            continue
        found = kind(name)
        if KNOBS[name].many and _is_list(found):
            found = found.value_type
        number = pa.types.is_integer(found) or pa.types.is_floating(found) or pa.types.is_decimal(found)
        if not (number or _is_text(found) or pa.types.is_boolean(found) or pa.types.is_null(found)):
            refuse(name, f"a knob is a number or text{' or a list of numbers' if KNOBS[name].many else ''}")


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _is_binary(kind: pa.DataType) -> bool:
    return bool(
        pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        or pa.types.is_fixed_size_binary(kind)
        or pa.types.is_binary_view(kind)
    )


def _holds_floats(kind: pa.DataType) -> bool:
    while _is_list(kind):
        kind = kind.value_type
        if pa.types.is_floating(kind):
            return True
    return False


def _packs_bytes(file: TableFile, name: str) -> bool:
    kind = file.schema.field(name).type
    held = _is_binary(kind) or pa.types.is_nested(kind) or isinstance(kind, pa.BaseExtensionType)
    return file.uri.lower().endswith(".gz") and held


def _separator_tip(names: Sequence[str]) -> str:
    if len(names) == 1 and any(mark in names[0] for mark in ";\t|"):
        return "Its cells seem to be parted by another character: .csv means commas, .tsv tabs. "
    return ""
