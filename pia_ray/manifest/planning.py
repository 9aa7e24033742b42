"""A whole manifest -> tables of work items, in one streaming pass with bounded memory.

Rows that share their knobs share one validated template; every other row goes the plain way of `rows`.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from json.encoder import encode_basestring as quoted
from types import MappingProxyType
from typing import Any, Final, NamedTuple

import numpy as np
import pyarrow as pa

from pia_ray.config.catalog import CatalogConfig
from pia_ray.config.knob_types import MAX_SEED
from pia_ray.config.knobs import DEFAULT_STYLE
from pia_ray.config.resolving import (
    canonical,
    canonical_params,
    lora_strengths,
    parse_params,
    resolve,
    seed_from_id,
    seed_of_video,
    style_of,
)
from pia_ray.errors import BadManifestRow, BadParameter, ManifestError
from pia_ray.formatting import count_of
from pia_ray.manifest.item_columns import ItemColumns
from pia_ray.manifest.items import (
    KEY_VERSION,
    MAX_ID_LENGTH,
    Item,
    Picture,
    RunReferences,
    derived_id,
    item_from_row,
    items_of,
    reference_json,
    run_spec,
    with_absolute_references,
    with_references,
)
from pia_ray.manifest.knob_check import KnobCheck
from pia_ray.manifest.opening import Manifest
from pia_ray.manifest.rows import knobs_of, picture_of, references_of, rejected
from pia_ray.manifest.sampling import sampled
from pia_ray.manifest.tables import Chunk, Columns, TableFile
from pia_ray.manifest.versions import Versions

_EASY_CHARS: Final = 1000  # longer texts go the plain way, which knows the true limits
_MEMO_SIZE: Final = 10_000
_SHOWN_DUPLICATES: Final = 20


def plan(
    manifest: Manifest,
    config: CatalogConfig,
    *,
    model_version: str,
    style_versions: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[pa.Table]:
    """The work items of a manifest in order, in tables of some 50,000 rows at most of `manifest.items_schema`.

    `model_version` is that of the run's own model, `style_versions` those of the models in `config.styles`, by style.
    Memory is bounded but for 8 bytes per row. Duplicate ids are known at the end only: a caller keeps nothing of the
    plan before it is complete. With `config.sample` all rows are planned, and only the sample is yielded.

    Raises:
        ManifestError: a file is damaged, most values of a knob column are impossible, or ids occur more than once.
    """
    tables = _tables(manifest, config, model_version, style_versions)
    return tables if config.sample is None else iter([sampled(tables, config.sample, manifest.items_schema)])


def _tables(
    manifest: Manifest, config: CatalogConfig, model_version: str, style_versions: Mapping[str, str]
) -> Iterator[pa.Table]:
    planner = _Planner(manifest, config, model_version, style_versions)
    seen = array("q")
    check = KnobCheck(config)
    for file, columns, chunk in manifest.chunks(config):
        table, ids, spoiled = planner.plan(file, columns, chunk)
        check.add(columns, chunk, spoiled)
        seen.extend(map(hash, ids))
        yield table
    if not seen:
        raise ManifestError(f"{manifest.uri} has no rows: all its cells are empty")
    check.end()
    hashes = np.sort(np.frombuffer(seen, dtype=np.int64))
    twice = set(hashes[1:][hashes[1:] == hashes[:-1]].tolist())
    if twice and (text := _duplicates(planner, twice)):
        raise ManifestError(text)


@dataclass(frozen=True)
class _Template:
    """The resolved params, as JSON with holes, of all rows whose knobs but for prompts and seed are equal.

    A row takes some 60 us the plain way, some 5 us by its template.
    """

    start: str
    after_negative: str
    after_prompt: str
    after_seed: str
    negative: str
    """JSON of the negative prompt of rows that give none."""
    seed: int | None
    references: str | None
    """The cell of `reference_uris`: what defaults refer to."""
    num_videos: int
    style: str
    prompt: str | None
    """Of rows that give none."""
    before_params: str
    """JSON of the row's model, and what goes before its params in the work key."""
    given: Mapping[str, str]
    """The row's own knobs, each as JSON."""


class _OwnCells(NamedTuple):
    """The cells of a row that its template leaves open."""

    id: Any
    prompt: Any
    negative_prompt: Any
    seed: Any


class _Planner:
    """Plans chunk after chunk; keeps the templates of the knobs it met."""

    def __init__(
        self, manifest: Manifest, config: CatalogConfig, model_version: str, style_versions: Mapping[str, str]
    ) -> None:
        self.manifest = manifest
        self.config = config = with_absolute_references(config)
        self._model_version = model_version
        self._style_versions = style_versions
        self._versions = Versions() if config.detect_changes else None
        self._run = RunReferences(self._versions)
        self._templates: dict[tuple[Any, ...], _Template] = {}
        spec = run_spec(config, config.model, model_version)
        self._before_id = f'{{"background":{canonical(spec["background"])},"format":{canonical(spec["format"])},"id":'
        self._before_index = f',"v":{KEY_VERSION},"video_index":'

    def plan(self, file: TableFile, columns: Columns, chunk: Chunk) -> tuple[pa.Table, list[str], list[int]]:
        """The items of a chunk, the id of each of its rows, and the positions of the rows that a cell spoils."""
        bad_rows, spoiled = chunk.bad_rows, list[int]()
        cells = {**chunk.cells, **{knob: chunk.cells[column] for knob, column in columns.knobs.items()}}
        shared = [knob for knob in columns.knobs if knob not in ("negative_prompt", "seed", *columns.references)]
        # Rows that refer to files of their own go the plain way.
        refer = {index for knob in columns.references for index, cell in enumerate(cells[knob]) if cell is not None}
        keys = zip(*(_hashable(cells[knob]) for knob in shared), strict=True) if shared else [()] * chunk.num_rows
        one_by_one = zip(keys, chunk.cells[columns.image], _own_cells(columns, chunk, cells), strict=True)
        prefix = _folder_of(file)
        has_id = columns.id is not None
        items = ItemColumns()
        for index, (key, image, own) in enumerate(one_by_one):
            if image is None and index not in bad_rows and chunk.is_blank(index):
                continue
            template = self._templates.get(key) or self._template(key, shared, cells, index)
            if template is not None and index not in bad_rows and index not in refer:
                try:
                    picture = picture_of(
                        file,
                        columns.image,
                        image,
                        row=chunk.number(index),
                        prefix=prefix,
                        of_row=chunk.picture(index),
                        versions=self._versions,
                    )
                    if self._add(items, index, template, picture, own, has_id=has_id):
                        continue
                except (BadParameter, UnicodeEncodeError):  # the plain way says what is wrong
                    pass
            made = self._plain(file, columns, chunk, index)
            items.add(index, made)
            if made[0].error_code is not None and index not in bad_rows:
                spoiled.append(index)
        return items.table(chunk.passed, self.manifest.items_schema), items.ids, spoiled

    def _template(
        self, key: tuple[Any, ...], shared: Sequence[str], cells: Mapping[str, Sequence[Any]], index: int
    ) -> _Template | None:
        given = {knob: value for knob in shared if (value := cells[knob][index]) is not None}
        try:
            params = parse_params({"prompt": "-", **given})
            style = style_of(params, self.config.defaults)
            model = self.config.model_for(style)
            resolved = resolve(params, self.config.defaults, model_defaults=model.defaults, sampling=model.sampling)
            lora_strengths(resolved, model.lora_weights)
        except BadParameter:
            return None
        if resolved.prompt_syntax != "plain":  # prompts then change other knobs
            return None
        resolved, uris = with_references(resolved, {}, self._run)
        version = self._model_version if style == DEFAULT_STYLE else self._style_versions[style]
        spec = run_spec(self.config, model, version, upscale=resolved.upscale)
        holes = {"negative_prompt": "\0negative", "prompt": "\0prompt", "seed": "\0seed"}
        rest = canonical_params(resolved.model_copy(update=holes))
        parts = []
        for hole in holes.values():
            part, _, rest = rest.partition(canonical(hole))
            parts.append(part)
        if len(self._templates) >= _MEMO_SIZE:
            self._templates.clear()
        self._templates[key] = _Template(
            start=parts[0],
            after_negative=parts[1],
            after_prompt=parts[2],
            after_seed=rest,
            negative=quoted(resolved.negative_prompt),
            seed=resolved.seed,
            references=reference_json(uris),
            num_videos=resolved.num_videos,
            style=style,
            prompt=self.config.defaults.get("prompt", model.defaults.get("prompt")),
            before_params=f',"model":{canonical(spec["model"])},"params":',
            given={knob: canonical({"": getattr(params, knob)})[4:-1] for knob in given},
        )
        return self._templates[key]

    def _add(
        self, items: ItemColumns, source: int, template: _Template, picture: Picture, own: _OwnCells, *, has_id: bool
    ) -> bool:
        """Adds a row's items as `items_of` makes them, if its cells are plainly right; else adds nothing."""
        prompt = template.prompt if own.prompt is None else own.prompt
        if type(prompt) is not str or not 0 < len(prompt) <= _EASY_CHARS or picture.uri[:5] == "http:":
            return False
        if not _are_easy(own, has_id=has_id):
            return False
        given_seed = None if own.seed is None else int(own.seed)
        row_id = own.id if has_id else derived_id(picture, _given(template, own, given_seed))
        seed = template.seed if given_seed is None else given_seed
        if seed is None:
            seed = seed_from_id(row_id)
        identity = picture.identity + picture.version
        negative_json = template.negative if own.negative_prompt is None else quoted(own.negative_prompt)
        start = f"{template.start}{negative_json}{template.after_negative}{quoted(prompt)}{template.after_prompt}"
        before = f'{self._before_id}{quoted(row_id)},"image":{quoted(identity)}{template.before_params}'
        columns = items.columns
        for index in range(template.num_videos):
            own_seed = seed_of_video(seed, index)
            params = f'{start}"{own_seed}"{template.after_seed}'
            # A lone surrogate raises here, at index 0, before anything is added.
            spec = f"{before}{params}{self._before_index}{index}}}".encode()
            columns["work_key"].append(hashlib.sha256(spec).hexdigest())
            columns["id"].append(row_id)
            columns["video_index"].append(index)
            columns["image"].append(picture.uri)
            columns["image_identity"].append(identity)
            columns["prompt"].append(prompt)
            columns["seed"].append(own_seed)
            columns["style"].append(template.style)
            columns["params"].append(params)
            columns["reference_uris"].append(template.references)
            columns["error_code"].append(None)
            columns["error_message"].append(None)
            columns["picture_index"].append(picture.number)
            items.sources.append(source)
        items.ids.append(row_id)
        return True

    def _plain(self, file: TableFile, columns: Columns, chunk: Chunk, index: int) -> list[Item]:
        number, of_row = chunk.number(index), chunk.picture(index)
        where = f"row {number} of {file.name}"
        if index in chunk.bad_rows:
            return [rejected(where, columns, {}, code=BadManifestRow.code, what=f" {chunk.bad_rows[index]}")]
        if of_row is not None and of_row.number:
            where = f"picture {of_row.number + 1} of {where}"
        cells = {name: values[index] for name, values in chunk.cells.items()}
        try:
            for name, cell in cells.items():
                if isinstance(cell, BadParameter):
                    cells[name] = None
                    raise cell
            picture = picture_of(
                file,
                columns.image,
                cells[columns.image],
                row=number,
                prefix=_folder_of(file),
                of_row=of_row,
                versions=self._versions,
            )
            rows = items_of(
                cells[columns.id] if columns.id is not None else None,
                picture,
                knobs_of(columns, cells.__getitem__),
                self.config,
                model_version=self._model_version,
                style_versions=self._style_versions,
                has_id=columns.id is not None,
                own=references_of(file, columns, cells, row=number, prefix=_folder_of(file), versions=self._versions),
                run=self._run,
            )
        except BadParameter as error:
            item = rejected(where, columns, cells, code=error.code, what=f": {error.message}")
            return [item._replace(picture_index=None if of_row is None else of_row.number)]
        return [item_from_row(row) for row in rows]


def _own_cells(columns: Columns, chunk: Chunk, cells: Mapping[str, Sequence[Any]]) -> Iterator[_OwnCells]:
    """The cells of each row that a template leaves open; `cells` are the chunk's, by knob too."""
    nothing = [None] * chunk.num_rows
    return map(
        _OwnCells,
        chunk.cells[columns.id] if columns.id is not None else nothing,
        chunk.cells[columns.prompt] if columns.prompt is not None else nothing,
        cells["negative_prompt"] if "negative_prompt" in columns.knobs else nothing,
        cells["seed"] if "seed" in columns.knobs else nothing,
    )


def _are_easy(own: _OwnCells, *, has_id: bool) -> bool:
    """Whether a row's own cells but the prompt are plainly right."""
    row_id, _, negative, seed = own
    if negative is not None and (type(negative) is not str or len(negative) > _EASY_CHARS):
        return False
    if type(seed) is str:
        if len(seed) >= 20 or not seed.isascii() or not seed.isdigit():
            return False
    elif seed is not None and (type(seed) is not int or not 0 <= seed <= MAX_SEED):
        return False
    return not has_id or (type(row_id) is str and 0 < len(row_id) <= MAX_ID_LENGTH and "\0" not in row_id)


def _given(template: _Template, own: _OwnCells, seed: int | None) -> str:
    """The row's own knobs as canonical JSON; `seed` as a number."""
    given = dict(template.given)
    if own.prompt is not None:
        given["prompt"] = quoted(own.prompt)
    if own.negative_prompt is not None:
        given["negative_prompt"] = quoted(own.negative_prompt)
    if seed is not None:
        given["seed"] = str(seed)
    return "{" + ",".join(f'"{knob}":{given[knob]}' for knob in sorted(given)) + "}"


def _hashable(cells: Sequence[Any]) -> Sequence[Any]:
    """Cells as part of a memo's key: true is not 1 there, and all but plain values and lists of them equal nothing."""
    easy = {str, int, float, Decimal, type(None)}
    if set(map(type, cells)) <= easy:
        return cells
    return [
        cell if type(cell) in easy else tuple(cell) if type(cell) is list and set(map(type, cell)) <= easy else object()
        for cell in cells
    ]


def _folder_of(file: TableFile) -> str:
    folder, slash, _ = file.name.rpartition("/")
    return folder + slash


def _duplicates(planner: _Planner, hashes: set[int]) -> str:
    """The message for ids that occur more than once, among those with such a hash; empty if none does."""
    rows_of: dict[str, list[str]] = {}
    for file, columns, chunk in planner.manifest.chunks(planner.config):
        for index, row_id in enumerate(planner.plan(file, columns, chunk)[1]):
            if hash(row_id) in hashes:
                rows_of.setdefault(row_id, []).append(f"row {chunk.number(index)} of {file.name}")
    twice = {row_id: rows for row_id, rows in rows_of.items() if len(rows) > 1}
    if not twice:
        return ""
    lines = [
        f'"{row_id}": {", ".join(rows[:5])}{f" and {len(rows) - 5} more" if len(rows) > 5 else ""}'
        for row_id, rows in list(twice.items())[:_SHOWN_DUPLICATES]
    ]
    if len(twice) > _SHOWN_DUPLICATES:
        lines.append(f"and {len(twice) - _SHOWN_DUPLICATES} more")
    occur = "that occurs more than once" if len(twice) == 1 else "that occur more than once"
    what = f"{count_of(len(twice), 'id')} {occur}: give each row its own"
    if all(columns.id is None for columns in planner.manifest.columns):
        what = f"{count_of(len(twice), 'row')} {occur} with the same image and knobs: drop them, or add a column of ids"
    return f"{planner.manifest.uri} has {what}\n  " + "\n  ".join(lines)
