"""Manifests -> work items: columns, ids, validation and work keys.

Reading files is `tables`' part, naming pictures `references`'. A manifest is planned in one streaming pass with bounded
memory; rows that cannot be animated become rejected items, and only what spoils the manifest as a whole raises.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from array import array
from base64 import b64encode
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from decimal import Decimal
from json.encoder import encode_basestring as _quoted
from logging import getLogger
from typing import Any, Final, NamedTuple

import numpy as np
import pyarrow as pa

from pia_ray import references, tables
from pia_ray.config import CatalogConfig
from pia_ray.errors import BadParameter, ManifestError
from pia_ray.params import (
    KNOBS,
    MAX_SEED,
    RESERVED_KNOBS,
    AnimationParams,
    ManifestRow,
    ResultRow,
    parse_params,
    resolve,
    seed_from_id,
    seed_of_video,
    suggest,
)
from pia_ray.tables import Chunk, TableFile
from pia_ray.tables import read_image_cell as read_image_cell

ITEMS_SCHEMA: Final = pa.schema(
    [
        pa.field("work_key", pa.string(), nullable=False),
        pa.field("id", pa.string(), nullable=False),
        pa.field("video_index", pa.int32(), nullable=False),
        pa.field("image", pa.string(), nullable=False),
        pa.field("image_identity", pa.string(), nullable=False),
        pa.field("prompt", pa.string()),
        pa.field("seed", pa.uint64(), nullable=False),
        pa.field("params", pa.string(), nullable=False),
        pa.field("error_code", pa.string()),
        pa.field("error_message", pa.string()),
    ]
)
"""One planned work item, in manifest order; a manifest's pass-through columns follow, with their own types. An
`error_message` marks a rejected row: it becomes a failed row without reaching a worker."""

IMAGE_COLUMNS: Final = ("image", "url", "image_url", "image_path", "file_name")
PROMPT_COLUMNS: Final = ("prompt", "caption", "text")
"""Names of the image and prompt columns; the first that is there counts."""

MAX_ID_LENGTH: Final = 256
BAD_MANIFEST_ROW: Final = "bad_manifest_row"
"""Error code of a row that could not be read at all."""

_KEY_VERSION: Final = 1
_EASY_TEXT: Final = 1000  # longer texts take the plain path, which knows the true limits
_MEMO_SIZE: Final = 10_000
_SHOWN_DUPLICATES: Final = 20
_RESULT_COLUMNS: Final = frozenset({field.name for field in fields(ResultRow)} | set(ITEMS_SCHEMA.names))

_log = getLogger(__name__)


@dataclass(frozen=True)
class Columns:
    """What the columns of one manifest file mean."""

    id: str | None
    image: str
    prompt: str | None
    knobs: tuple[str, ...]
    """All others of `AnimationParams`; their column has the knob's name."""
    passed: tuple[str, ...]

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


def open_manifest(
    uri: str,
    *,
    id_col: str | None = None,
    image_col: str | None = None,
    prompt_col: str | None = None,
    has_default_prompt: bool,
) -> Manifest:
    """Finds a manifest's files and reads their headers and footers (all of it for JSON lines, which have neither).

    Raises:
        ManifestError: there is no manifest, it has no rows, or its columns cannot work; says which and what to do.
    """
    files = tables.find(uri)
    if all(file.num_rows == 0 for file in files):
        raise ManifestError(f"{uri} has no rows")
    files = tuple(file for file in files if file.num_rows != 0)
    if files[0].kind == "pictures" and not has_default_prompt:
        raise ManifestError(f"{uri} is a folder of images, which has no prompts: give a --prompt for all")
    columns = tuple(_columns(file, id_col, image_col, prompt_col, has_default_prompt) for file in files)
    return Manifest(uri, files, columns, tables.unify(files, [found.passed for found in columns]))


def plan(manifest: Manifest, config: CatalogConfig, *, model_version: str) -> Iterator[pa.Table]:
    """The work items of a manifest in order, in tables of at most some 50,000 rows of `manifest.items_schema`.

    Memory is bounded but for 8 bytes per row. Duplicate ids are known at the end only: a caller keeps nothing of the
    plan before it is complete.

    Raises:
        ManifestError: a file is damaged, or ids occur more than once; lists them with file and row.
    """
    planner = _Planner(manifest, config, model_version)
    seen = array("q")
    for file, columns, chunk in _chunks(manifest, config.limit):
        table, ids = planner.plan(file, columns, chunk)
        seen.extend(map(hash, ids))
        yield table
    hashes = np.sort(np.frombuffer(seen, dtype=np.int64))
    if (twice := set(hashes[1:][hashes[1:] == hashes[:-1]].tolist())) and (text := _duplicates(planner, twice)):
        raise ManifestError(text)


def plan_row(cells: Mapping[str, Any], config: CatalogConfig, *, model_version: str) -> ManifestRow:
    """The work item of one row as `plan` makes it, for rows that come from elsewhere; other columns are not looked at.

    Relative references start from the folder of `config.manifest`. Image bytes travel inside the row, as a data: URL.

    Raises:
        BadParameter: a cell has no valid value, or `num_videos` asks for more than one item.
    """
    columns = _columns_of(cells.keys(), config.id_col, config.image_col, config.prompt_col)
    if columns.image not in cells:
        raise BadParameter(f"image is missing: give each row one of {', '.join(IMAGE_COLUMNS)}", "image")
    cell = cells[columns.image]
    if isinstance(cell, bytes):
        picture = _Picture("data:;base64," + b64encode(cell).decode(), references.identity_of_bytes(cell), "data:")
    else:
        picture = _picture(cell, tables.root_of(config.manifest), "")
    if config.detect_changes:
        picture = picture._replace(version=references.Versions().of(picture.uri))
    items = _items(
        cells[columns.id] if columns.id is not None else None,
        picture,
        _knobs_of(columns, cells.__getitem__),
        config,
        model_version=model_version,
        has_id=columns.id is not None,
    )
    if len(items) > 1:
        raise BadParameter("num_videos is more than 1: repeat the row with other seeds instead", "num_videos")
    return items[0]


def row_from_item(item: Mapping[str, Any]) -> ManifestRow:
    """The work item that a row of ITEMS_SCHEMA describes."""
    values = json.loads(item["params"])
    values["seed"] = int(values["seed"])
    return ManifestRow(
        id=item["id"],
        video_index=item["video_index"],
        image=item["image"],
        image_identity=item["image_identity"],
        params=AnimationParams.model_validate({**values, "num_videos": 1}),
        work_key=item["work_key"],
    )


def canonical_params(params: AnimationParams) -> str:
    """One item's resolved params as JSON that is equal for equal params: sorted, without spaces, the seed a string.

    `num_videos` is not in it: an item is one video, whatever number its row asks for.
    """
    values = {name: getattr(params, name) for name in KNOBS if name != "num_videos"}
    values["seed"] = None if params.seed is None else str(params.seed)
    return _canonical(values)


def work_key(
    *,
    row_id: str,
    video_index: int,
    image_identity: str,
    params: AnimationParams,
    config: CatalogConfig,
    model_version: str,
) -> str:
    """sha256 of everything that changes the video: 64 hex digits. `params` are resolved, with this item's seed."""
    spec = {
        "v": _KEY_VERSION,
        "id": row_id,
        "video_index": video_index,
        "image": image_identity,
        "params": json.loads(canonical_params(params)),
        **_run_spec(config, model_version),
    }
    return hashlib.sha256(_canonical(spec).encode()).hexdigest()


# Columns


def _columns(
    file: TableFile, id_col: str | None, image_col: str | None, prompt_col: str | None, has_default_prompt: bool
) -> Columns:
    names = file.schema.names
    there = f"Columns there: {', '.join(names) or 'none'}."
    for flag, name in (("--id-col", id_col), ("--image-col", image_col), ("--prompt-col", prompt_col)):
        if name is not None and name not in names and file.kind != "pictures":
            raise ManifestError(f'{file.name} has no column "{name}" ({flag}).{suggest(name, names)} {there}')
    if file.kind == "pictures":
        id_col = image_col = prompt_col = None
    found = _columns_of(names, id_col, image_col, prompt_col)
    if found.image not in names:
        tip = _separator_tip(names)
        raise ManifestError(
            f"{file.name} has no image column. {there} {tip}Name one of them {', '.join(IMAGE_COLUMNS[:-1])} or "
            f"{IMAGE_COLUMNS[-1]}, or say which it is with --image-col"
        )
    if found.prompt is None and not has_default_prompt:
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


def _columns_of(
    names: Sequence[str] | Any, id_col: str | None, image_col: str | None, prompt_col: str | None
) -> Columns:
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

    is_text = kind(columns.image)
    struct = pa.types.is_struct(is_text) and is_text.get_field_index("bytes") >= 0
    if not (_is_text(is_text) or _is_binary(is_text) or struct or pa.types.is_null(is_text)):
        refuse(columns.image, "an image is a path or URL, bytes, or a struct of bytes and path")
    if _packs_images(file, columns):
        refuse(columns.image, "unpack the .gz, image bytes are read from the file in place")
    if columns.prompt is not None and not (_is_text(kind(columns.prompt)) or pa.types.is_null(kind(columns.prompt))):
        refuse(columns.prompt, "a prompt is text")
    if columns.id is not None and (pa.types.is_nested(kind(columns.id)) or pa.types.is_boolean(kind(columns.id))):
        refuse(columns.id, "an id is text or a whole number")
    for name in columns.knobs:
        found = kind(name)
        number = pa.types.is_integer(found) or pa.types.is_floating(found) or pa.types.is_decimal(found)
        if not (number or _is_text(found) or pa.types.is_boolean(found) or pa.types.is_null(found)):
            refuse(name, "a knob is a number or text")


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _is_binary(kind: pa.DataType) -> bool:
    return bool(
        pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        or pa.types.is_fixed_size_binary(kind)
        or pa.types.is_binary_view(kind)
    )


def _packs_images(file: TableFile, columns: Columns) -> bool:
    kind = file.schema.field(columns.image).type
    return file.uri.lower().endswith(".gz") and (_is_binary(kind) or pa.types.is_struct(kind))


def _separator_tip(names: Sequence[str]) -> str:
    if len(names) == 1 and any(mark in names[0] for mark in ";\t|"):
        return "Its cells seem to be parted by another character: .csv means commas, .tsv tabs. "
    return ""


# One row, the plain way


class _Picture(NamedTuple):
    uri: str
    identity: str
    """Without its version, so that an id does not change with the picture's content."""
    name: str
    """Reference to make an id from."""
    version: str = ""


def _picture(cell: object, folder: str, prefix: str) -> _Picture:
    if cell is None or (isinstance(cell, str) and not cell.strip()):
        raise BadParameter("image is missing or null: give each row a path, URL or bytes", "image")
    if not isinstance(cell, str):
        raise BadParameter(f"image must be a path or URL, not {type(cell).__name__}", "image")
    uri, identity = references.locate(cell, folder, prefix)
    return _Picture(uri, identity, cell)


def _id_text(cell: object) -> str:
    if isinstance(cell, float) and cell.is_integer() and abs(cell) < 2**53:
        cell = int(cell)
    if isinstance(cell, bytes):
        try:
            cell = cell.decode()
        except UnicodeDecodeError:
            raise BadParameter("id holds bytes that are not UTF-8", "id") from None
    if cell is None or cell == "":
        raise BadParameter("id is missing or null: give each row one, or leave out the column", "id")
    if isinstance(cell, bool | float | list | dict):
        raise BadParameter(f"id must be text or a whole number (got {_short(cell)})", "id")
    text = str(cell)
    if len(text) > MAX_ID_LENGTH:
        raise BadParameter(f"id has {len(text)} characters, at most {MAX_ID_LENGTH} are allowed", "id")
    if "\0" in text:
        raise BadParameter("id holds a NUL character", "id")
    if any("\ud800" <= ch <= "\udfff" for ch in text):
        raise BadParameter("id must be valid Unicode text (it holds a lone surrogate)", "id")
    return text


def _knobs_of(columns: Columns, cell: Callable[[str], Any]) -> dict[str, Any]:
    """The row's own knobs: the cells that are not null, by the knob's name."""
    names = {knob: knob for knob in columns.knobs} | ({"prompt": columns.prompt} if columns.prompt else {})
    return {knob: value for knob, column in names.items() if (value := cell(column)) is not None}


def _items(
    id_cell: object,
    picture: _Picture,
    knobs: Mapping[str, Any],
    config: CatalogConfig,
    *,
    model_version: str,
    has_id: bool,
) -> list[ManifestRow]:
    """The work items of one row.

    Raises:
        BadParameter: the row's first wrong cell.
    """
    row_id = _id_text(id_cell) if has_id else ""
    default_prompt = config.defaults.get("prompt", config.model.defaults.get("prompt"))
    params = parse_params({**({"prompt": default_prompt} if default_prompt else {}), **knobs})
    if not has_id:
        given = {name: getattr(params, name) for name in KNOBS if name in knobs}
        row_id = _derived_id(picture, _canonical(given))
    resolved = resolve(params, config.defaults, model_defaults=config.model.defaults)
    first_seed = seed_from_id(row_id) if resolved.seed is None else resolved.seed
    identity = picture.identity + picture.version
    items = []
    for index in range(resolved.num_videos):
        own = resolved.model_copy(update={"seed": seed_of_video(first_seed, index), "num_videos": 1})
        key = work_key(
            row_id=row_id,
            video_index=index,
            image_identity=identity,
            params=own,
            config=config,
            model_version=model_version,
        )
        items.append(ManifestRow(row_id, index, picture.uri, identity, own, key))
    return items


def _derived_id(picture: _Picture, given: str) -> str:
    """An id from the picture and the row's own knobs (canonical JSON), for rows that have none."""
    spec = f"[{_quoted(picture.identity)},{given}]"
    return f"{references.stem(picture.name)}-{hashlib.sha256(spec.encode()).hexdigest()[:12]}"


def _run_spec(config: CatalogConfig, model_version: str) -> dict[str, Any]:
    """What the run, not the row, adds to a work key."""
    model = {
        "version": model_version,
        "dtype": config.model.dtype,
        "long_edge": config.model.long_edge,
        "size_step": config.model.size_step,
    }
    return {"background": config.background.lower(), "format": config.format, "model": model}


def _canonical(value: object) -> str:
    """JSON with sorted keys and without spaces; -0.0, which equals 0.0, is written like it."""
    if isinstance(value, dict):
        value = {name: cell + 0.0 if isinstance(cell, float) else cell for name, cell in value.items()}
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


# A whole manifest, the fast way


@dataclass(frozen=True)
class _Template:
    """The resolved params, as JSON with holes, of all rows whose knobs but for prompts and seed are equal.

    Planning a row the plain way takes some 60 us, by its template some 5 us.
    """

    start: str
    after_negative: str
    after_prompt: str
    after_seed: str
    negative: str
    """JSON of the negative prompt of rows that give none."""
    seed: int | None
    num_videos: int
    given: Mapping[str, str]
    """The row's own knobs, each as JSON."""


class _Planner:
    """Plans chunk after chunk; keeps the templates of the knobs it met."""

    def __init__(self, manifest: Manifest, config: CatalogConfig, model_version: str) -> None:
        self.manifest = manifest
        self.config = config
        self._model_version = model_version
        self._versions = references.Versions() if config.detect_changes else None
        self._templates: dict[tuple[Any, ...], _Template] = {}
        self._prompt = config.defaults.get("prompt", config.model.defaults.get("prompt"))
        spec = {name: _canonical(value) for name, value in _run_spec(config, model_version).items()}
        self._before_id = f'{{"background":{spec["background"]},"format":{spec["format"]},"id":'
        self._before_params = f',"model":{spec["model"]},"params":'
        self._before_index = f',"v":{_KEY_VERSION},"video_index":'

    def plan(self, file: TableFile, columns: Columns, chunk: Chunk) -> tuple[pa.Table, list[str]]:
        """The items of a chunk, and the id of each of its rows."""
        cells = chunk.cells
        nothing = [None] * chunk.num_rows
        shared = [knob for knob in columns.knobs if knob not in ("negative_prompt", "seed")]
        keys = zip(*(_hashable(cells[knob]) for knob in shared), strict=True) if shared else [()] * chunk.num_rows
        one_by_one = zip(
            keys,
            cells[columns.id] if columns.id is not None else nothing,
            cells[columns.image],
            cells[columns.prompt] if columns.prompt is not None else nothing,
            cells["negative_prompt"] if "negative_prompt" in columns.knobs else nothing,
            cells["seed"] if "seed" in columns.knobs else nothing,
            strict=True,
        )
        prefix = _folder_of(file.name)
        items: list[tuple[Any, ...]] = []
        ids: list[str] = []
        sources: list[int] = []
        for index, (key, id_cell, image, prompt, negative, seed) in enumerate(one_by_one):
            own: list[tuple[Any, ...]] = []
            template = self._templates.get(key) or self._template(key, shared, cells, index)
            if template is not None and index not in chunk.bad_rows:
                try:
                    picture = self._locate(file, columns, chunk.first_row + index, image, prefix)
                    own = self._fast(template, picture, id_cell, prompt, negative, seed, has_id=columns.id is not None)
                except (BadParameter, UnicodeEncodeError):  # the plain way tells what is wrong
                    own = []
            if not own:
                own = self._plain(file, columns, chunk, index)
            ids.append(own[0][1])
            items.extend(own)
            sources.extend([index] * len(own))
        arrays = [
            pa.array(values, column.type) for values, column in zip(zip(*items, strict=True), ITEMS_SCHEMA, strict=True)
        ]
        passed = chunk.passed.columns if len(items) == chunk.num_rows else chunk.passed.take(sources).columns
        return pa.Table.from_arrays([*arrays, *passed], schema=self.manifest.items_schema), ids

    def _template(
        self, key: tuple[Any, ...], shared: Sequence[str], cells: Mapping[str, Sequence[Any]], index: int
    ) -> _Template | None:
        given = {knob: value for knob in shared if (value := cells[knob][index]) is not None}
        try:
            params = parse_params({"prompt": "-", **given})
        except BadParameter:
            return None
        resolved = resolve(params, self.config.defaults, model_defaults=self.config.model.defaults)
        holes = {"negative_prompt": "\0negative", "prompt": "\0prompt", "seed": "\0seed"}
        rest = canonical_params(resolved.model_copy(update=holes))
        parts = []
        for hole in holes.values():
            part, _, rest = rest.partition(_canonical(hole))
            parts.append(part)
        if len(self._templates) >= _MEMO_SIZE:
            self._templates.clear()
        self._templates[key] = _Template(
            start=parts[0],
            after_negative=parts[1],
            after_prompt=parts[2],
            after_seed=rest,
            negative=_quoted(resolved.negative_prompt),
            seed=resolved.seed,
            num_videos=resolved.num_videos,
            given={knob: _canonical({"": getattr(params, knob)})[4:-1] for knob in given},
        )
        return self._templates[key]

    def _fast(
        self,
        template: _Template,
        picture: _Picture,
        id_cell: Any,
        prompt_cell: Any,
        negative_cell: Any,
        seed_cell: Any,
        *,
        has_id: bool,
    ) -> list[tuple[Any, ...]]:
        """As `_items`, for rows whose cells are plainly right; an empty list for all others."""
        prompt = self._prompt if prompt_cell is None else prompt_cell
        if type(prompt) is not str or not 0 < len(prompt) <= _EASY_TEXT:
            return []
        if negative_cell is not None and (type(negative_cell) is not str or len(negative_cell) > _EASY_TEXT):
            return []
        if seed_cell is None:
            seed = template.seed
        elif type(seed_cell) is int and 0 <= seed_cell <= MAX_SEED:
            seed = seed_cell
        elif type(seed_cell) is str and len(seed_cell) < 20 and seed_cell.isascii() and seed_cell.isdigit():
            seed = int(seed_cell)
        else:
            return []
        prompt_json = _quoted(prompt)
        negative_json = template.negative if negative_cell is None else _quoted(negative_cell)
        if has_id:
            if type(id_cell) is not str or not 0 < len(id_cell) <= MAX_ID_LENGTH or "\0" in id_cell:
                return []
            row_id = id_cell
        else:
            given = dict(template.given)
            if prompt_cell is not None:
                given["prompt"] = prompt_json
            if negative_cell is not None:
                given["negative_prompt"] = negative_json
            if seed_cell is not None:
                given["seed"] = str(seed)
            row_id = _derived_id(picture, "{" + ",".join(f'"{knob}":{given[knob]}' for knob in sorted(given)) + "}")
        if seed is None:
            seed = seed_from_id(row_id)
        identity = picture.identity + picture.version
        start = f"{template.start}{negative_json}{template.after_negative}{prompt_json}{template.after_prompt}"
        before = f'{self._before_id}{_quoted(row_id)},"image":{_quoted(identity)}{self._before_params}'
        items: list[tuple[Any, ...]] = []
        for index in range(template.num_videos):
            own_seed = seed_of_video(seed, index)
            params = f'{start}"{own_seed}"{template.after_seed}'
            spec = f"{before}{params}{self._before_index}{index}}}"
            key = hashlib.sha256(spec.encode()).hexdigest()
            items.append((key, row_id, index, picture.uri, identity, prompt, own_seed, params, None, None))
        return items

    def _plain(self, file: TableFile, columns: Columns, chunk: Chunk, index: int) -> list[tuple[Any, ...]]:
        number = chunk.first_row + index
        if index in chunk.bad_rows:
            return [_rejected(file, number, columns, {}, BAD_MANIFEST_ROW, chunk.bad_rows[index])]
        cells = {name: values[index] for name, values in chunk.cells.items()}
        try:
            items = _items(
                cells[columns.id] if columns.id is not None else None,
                self._locate(file, columns, number, cells[columns.image], _folder_of(file.name)),
                _knobs_of(columns, cells.__getitem__),
                self.config,
                model_version=self._model_version,
                has_id=columns.id is not None,
            )
        except BadParameter as error:
            return [_rejected(file, number, columns, cells, error.code, f": {error.message}")]
        return [
            (
                item.work_key,
                item.id,
                item.video_index,
                item.image,
                item.image_identity,
                item.params.prompt,
                item.params.seed,
                canonical_params(item.params),
                None,
                None,
            )
            for item in items
        ]

    def _locate(self, file: TableFile, columns: Columns, row: int, cell: Any, prefix: str) -> _Picture:
        name = "data:"
        if isinstance(cell, dict) and file.kind == "parquet":
            name = cell.get("path") or name
            cell = cell["path"] if cell.get("bytes") is None and "path" in cell else cell.get("bytes")
        if isinstance(cell, bytes):
            if not cell:
                raise BadParameter("image holds no bytes", "image")
            uri = tables.cell_reference(file, row, columns.image)
            return _Picture(uri, references.identity_of_bytes(cell), name)
        picture = _picture(cell, file.folder, prefix)
        if picture.uri.startswith("data:") and file.kind == "parquet" and not file.uri.lower().endswith(".gz"):
            picture = picture._replace(uri=tables.cell_reference(file, row, columns.image))
        return picture if self._versions is None else picture._replace(version=self._versions.of(picture.uri))


def _chunks(manifest: Manifest, limit: int | None) -> Iterator[tuple[TableFile, Columns, Chunk]]:
    left = limit
    for file, columns in zip(manifest.files, manifest.columns, strict=True):
        for chunk in tables.read(file, columns.read, passed=manifest.passed):
            yield file, columns, chunk if left is None else chunk.head(left)
            if left is not None and (left := left - chunk.num_rows) <= 0:
                return


def _hashable(cells: Sequence[Any]) -> Sequence[Any]:
    """Cells as part of a memo's key: true is not 1 there, and lists and mappings equal nothing."""
    easy = (str, int, float, Decimal, type(None))
    if set(map(type, cells)) <= set(easy):
        return cells
    return [cell if type(cell) in easy else object() for cell in cells]


def _folder_of(name: str) -> str:
    folder, slash, _ = name.rpartition("/")
    return folder + slash


def _rejected(
    file: TableFile, row: int, columns: Columns, cells: Mapping[str, Any], code: str, what: str
) -> tuple[Any, ...]:
    """The item of a row that cannot be animated; `what` follows the row's place in the message."""
    place = f"row {row} of {file.name}"
    try:
        row_id = _id_text(cells.get(columns.id)) if columns.id is not None else place[-MAX_ID_LENGTH:]
    except BadParameter:
        row_id = place[-MAX_ID_LENGTH:]
    written = {name: _written(cell) for name, cell in cells.items() if cell is not None}
    spec = _canonical({"v": _KEY_VERSION, "id": row_id, "rejected": what, "cells": written})
    image, prompt = cells.get(columns.image), cells.get(columns.prompt) if columns.prompt is not None else None
    return (
        hashlib.sha256(spec.encode()).hexdigest(),
        _valid(row_id),
        0,
        _valid(image[:_EASY_TEXT]) if isinstance(image, str) else "",
        "",
        _valid(prompt) if isinstance(prompt, str) else None,
        seed_from_id(row_id),
        _canonical({knob: written[knob][:_EASY_TEXT] for knob in columns.knobs if knob in written}),
        code,
        _valid(place + what if what.startswith(":") else f"{place} {what}"),
    )


def _written(cell: object) -> str:
    return references.identity_of_bytes(cell) if isinstance(cell, bytes) else _valid(str(cell))


def _valid(text: str) -> str:
    """The text with question marks for what is no valid Unicode."""
    return text.encode("utf-8", "replace").decode()


def _duplicates(planner: _Planner, hashes: set[int]) -> str:
    """What to tell of ids that occur more than once, found among those with such a hash; empty if there are none."""
    places: dict[str, list[str]] = {}
    for file, columns, chunk in _chunks(planner.manifest, planner.config.limit):
        for index, row_id in enumerate(planner.plan(file, columns, chunk)[1]):
            if hash(row_id) in hashes:
                places.setdefault(row_id, []).append(f"row {chunk.first_row + index} of {file.name}")
    twice = {row_id: rows for row_id, rows in places.items() if len(rows) > 1}
    if not twice:
        return ""
    lines = [
        f'"{row_id}": {", ".join(rows[:5])}{f" and {len(rows) - 5} more" if len(rows) > 5 else ""}'
        for row_id, rows in list(twice.items())[:_SHOWN_DUPLICATES]
    ]
    if len(twice) > _SHOWN_DUPLICATES:
        lines.append(f"and {len(twice) - _SHOWN_DUPLICATES} more")
    if all(columns.id is None for columns in planner.manifest.columns):
        what = (
            "rows with the same image and knobs, which without an id column cannot be told apart: drop them, or add one"
        )
    else:
        what = "ids that occur more than once: give each row its own"
    return f"{planner.manifest.uri} has {len(twice)} {what}\n  " + "\n  ".join(lines)
