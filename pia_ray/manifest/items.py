"""Work items: their schema, their keys, and the plain way from one row's cells to its items.

`planning` has the fast way for whole manifests; a test holds the two together.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from json.encoder import encode_basestring as quoted
from pathlib import Path
from typing import Any, Final, NamedTuple

import pyarrow as pa

from pia_ray.config.added_weights import without_upscaler
from pia_ray.config.catalog import CatalogConfig
from pia_ray.config.knobs import DEFAULT_STYLE, KNOBS, REFERENCE_KNOBS, AnimationParams
from pia_ray.config.model import ModelConfig
from pia_ray.config.resolving import (
    canonical,
    canonical_params,
    lora_strengths,
    parse_defaults,
    parse_params,
    resolve,
    seed_from_id,
    seed_of_video,
)
from pia_ray.errors import BadParameter, ConfigError
from pia_ray.manifest import references
from pia_ray.manifest.versions import Versions
from pia_ray.types import ManifestRow

ITEMS_SCHEMA: Final = pa.schema(
    [
        pa.field("work_key", pa.string(), nullable=False),
        pa.field("id", pa.string(), nullable=False),
        pa.field("video_index", pa.int32(), nullable=False),
        pa.field("image", pa.string(), nullable=False),
        pa.field("image_identity", pa.string(), nullable=False),
        pa.field("prompt", pa.string()),
        pa.field("seed", pa.uint64(), nullable=False),
        pa.field("style", pa.string(), nullable=False),
        pa.field("params", pa.string(), nullable=False),
        pa.field("reference_uris", pa.string()),
        pa.field("error_code", pa.string()),
        pa.field("error_message", pa.string()),
        pa.field("picture_index", pa.int32()),
    ]
)
"""One planned work item, in manifest order; a manifest's pass-through columns follow, with their own types.

`reference_uris` is JSON: the URIs of the files that the params refer to, by knob; null if they refer to none. An
`error_message` marks a rejected row: it becomes a failed row without reaching a worker."""

MAX_ID_LENGTH: Final = 256
KEY_VERSION: Final = 1
"""Raised when the same cells shall mean another video: every earlier row is then made again."""


_OF_ONE_ROW: Final = re.compile(r'"(?:negative_prompt|prompt|seed)":"(?:[^"\\]|\\.)*+"')
_NEGATIVE: Final = re.compile(r'"negative_prompt":("(?:[^"\\]|\\.)*+")')


class Item(NamedTuple):
    """One row of ITEMS_SCHEMA, in its order."""

    work_key: str
    id: str
    video_index: int
    image: str
    image_identity: str
    prompt: str | None
    seed: int
    style: str
    params: str
    reference_uris: str | None = None
    error_code: str | None = None
    error_message: str | None = None
    picture_index: int | None = None


class Picture(NamedTuple):
    """The picture of one row."""

    uri: str
    identity: str
    """Without its version, so that an id does not change with the picture's content."""
    name: str
    """Reference to make an id from."""
    version: str = ""
    """The version of its content from a listing, or an empty string."""
    number: int | None = None
    """Its number among the pictures of its row, from 0, where the row has several."""


def item_from_row(row: ManifestRow) -> Item:
    """The row of ITEMS_SCHEMA that describes a work item."""
    if row.params.seed is None:
        raise ValueError("the params of a work item have a seed")
    return Item(
        work_key=row.work_key,
        id=row.id,
        video_index=row.video_index,
        image=row.image,
        image_identity=row.image_identity,
        prompt=row.params.prompt,
        seed=row.params.seed,
        style=row.params.style,
        params=canonical_params(row.params),
        reference_uris=reference_json(row.references),
        picture_index=row.picture_index,
    )


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
        references=json.loads(item["reference_uris"] or "{}"),
        picture_index=item["picture_index"],
        accept=item.get("accept"),
        retakes=item.get("retakes"),
        takes=item.get("takes"),
        review_note=item.get("review_note"),
    )


def shared_params(params: str) -> str:
    """Canonical params without prompts and seed: the same text for rows that agree in all other knobs."""
    return _OF_ONE_ROW.sub("", params)


def negative_prompt_of(params: str) -> str:
    """The negative prompt of canonical params."""
    found = _NEGATIVE.search(params)
    return json.loads(found[1]) if found is not None else ""


def work_key(
    *,
    row_id: str,
    video_index: int,
    image_identity: str,
    params: AnimationParams,
    config: CatalogConfig,
    model_version: str,
) -> str:
    """sha256 of everything that changes the video: 64 hex digits.

    `params` are resolved, with this item's seed; `model_version` is that of the model their style names.
    """
    spec = {
        "v": KEY_VERSION,
        "id": row_id,
        "video_index": video_index,
        "image": image_identity,
        "params": json.loads(canonical_params(params)),
        **run_spec(config, config.model_for(params.style), model_version, upscale=params.upscale),
    }
    return hashlib.sha256(canonical(spec).encode()).hexdigest()


def items_of(
    id_cell: object,
    picture: Picture,
    knobs: Mapping[str, Any],
    config: CatalogConfig,
    *,
    model_version: str,
    style_versions: Mapping[str, str],
    has_id: bool,
    own: Mapping[str, Picture],
    run: RunReferences,
) -> list[ManifestRow]:
    """The work items of one row; versions as in `planning.plan`.

    `own` are the files that its cells refer to, by knob; `knobs` its other knobs.

    Raises:
        BadParameter: the row's first wrong cell.
    """
    row_id = id_text(id_cell) if has_id else ""
    style = config.defaults.get("style", DEFAULT_STYLE)
    if "style" in knobs:
        style = parse_defaults({"style": knobs["style"]})["style"]
    model = config.model_for(style)
    default_prompt = config.defaults.get("prompt", model.defaults.get("prompt"))
    cells = {**knobs, **{knob: found.identity for knob, found in own.items()}}
    params = parse_params({"prompt": default_prompt, **cells})
    if not has_id:
        given = {name: getattr(params, name) for name in KNOBS if name in cells}
        row_id = derived_id(picture, canonical(given))
    resolved = resolve(params, config.defaults, model_defaults=model.defaults, sampling=model.sampling)
    lora_strengths(resolved, model.lora_weights)
    resolved, uris = with_references(resolved, own, run)
    for knob, uri in {"image": picture.uri, **uris}.items():
        references.require_fetched(uri, allow_http=config.allow_http, what=knob)
    own_version = model_version if style == DEFAULT_STYLE else style_versions[style]
    return _items_of_videos(row_id, picture, resolved, uris, config, own_version)


def _items_of_videos(
    row_id: str,
    picture: Picture,
    resolved: AnimationParams,
    uris: Mapping[str, str],
    config: CatalogConfig,
    model_version: str,
) -> list[ManifestRow]:
    """The items of a row with resolved params: one for each of its videos, with a seed of its own."""
    first_seed = seed_from_id(row_id) if resolved.seed is None else resolved.seed
    identity = picture.identity + picture.version
    items = []
    for index in range(resolved.num_videos):
        own_params = resolved.model_copy(update={"seed": seed_of_video(first_seed, index), "num_videos": 1})
        key = work_key(
            row_id=row_id,
            video_index=index,
            image_identity=identity,
            params=own_params,
            config=config,
            model_version=model_version,
        )
        items.append(ManifestRow(row_id, index, picture.uri, identity, own_params, key, uris, picture.number))
    return items


def with_references(
    resolved: AnimationParams, own: Mapping[str, Picture], run: RunReferences
) -> tuple[AnimationParams, dict[str, str]]:
    """The params with the identities of the files that they refer to, and where those lie.

    `own` are the row's; what a default refers to is found by `run`.

    Raises:
        BadParameter: a default refers to what cannot be read.
    """
    found = dict(own)
    for knob in REFERENCE_KNOBS:
        if knob not in own and (value := getattr(resolved, knob)) is not None:
            found[knob] = run.at(value, knob)
    if not found:
        return resolved, {}
    params = resolved.model_copy(update={knob: each.identity + each.version for knob, each in found.items()})
    return params, {knob: found[knob].uri for knob in sorted(found)}


def reference_json(uris: Mapping[str, str]) -> str | None:
    """The cell of `reference_uris`."""
    return canonical(dict(uris)) if uris else None


class RunReferences:
    """The files that a run's or model's defaults refer to, each located once: relative to the working directory."""

    def __init__(self, versions: Versions | None) -> None:
        self._versions = versions
        self._found: dict[str, Picture] = {}

    def at(self, reference: str, knob: str) -> Picture:
        """The file of a default. A local one is identified by its absolute path.

        Raises:
            BadParameter: it names nothing that can be read.
        """
        if reference not in self._found:
            uri, identity = references.locate(reference, f"{Path.cwd()}/", what=knob)
            version = "" if self._versions is None else self._versions.of(uri)
            self._found[reference] = Picture(uri, uri if uri.startswith("/") else identity, reference, version)
        return self._found[reference]


def with_absolute_references(config: CatalogConfig) -> CatalogConfig:
    """The same config with the local files of its defaults by absolute path, for workers that run elsewhere.

    Raises:
        ConfigError: a default refers to what cannot be read.
    """
    run = RunReferences(None)

    def absolute(defaults: Mapping[str, Any]) -> dict[str, Any]:
        values = dict(defaults)
        for knob in REFERENCE_KNOBS:
            if values.get(knob) is None:
                continue
            try:
                uri = run.at(values[knob], knob).uri
            except BadParameter as error:
                raise ConfigError(f"defaults: {error.message}") from None
            values[knob] = uri if uri.startswith("/") else values[knob]
        return values

    def settled(model: ModelConfig) -> ModelConfig:
        return model.model_copy(update={"defaults": absolute(model.defaults)})

    every = (config.defaults, config.model.defaults, *(model.defaults for model in config.styles.values()))
    if not any(values.get(knob) for values in every for knob in REFERENCE_KNOBS):
        return config
    return config.model_copy(
        update={
            "defaults": absolute(config.defaults),
            "model": settled(config.model),
            "styles": {style: settled(model) for style, model in config.styles.items()},
        }
    )


def derived_id(picture: Picture, given: str) -> str:
    """An id from the picture and the row's own knobs (canonical JSON), for rows that have none."""
    spec = f"[{quoted(picture.identity)},{given}]"
    return f"{references.stem(picture.name)}-{hashlib.sha256(spec.encode()).hexdigest()[:12]}"


def run_spec(config: CatalogConfig, model: ModelConfig, version: str, *, upscale: int = 1) -> dict[str, Any]:
    """The part of a work key that comes from the run and the row's model of that work version.

    The upscaler counts for rows alone that `upscale` enlarges.
    """
    settings = {
        "version": version if upscale > 1 else without_upscaler(version),
        "dtype": model.dtype,
        "vae_dtype": model.vae_dtype,
        "text_encoder_dtype": model.text_encoder_dtype,
        "group_norm": model.group_norm,
        "vae_tiling": model.vae_tiling,
        "long_edge": model.long_edge,
        "size_step": model.size_step,
    }
    return {"background": config.background.lower(), "format": config.format, "model": settings}


def id_text(cell: object) -> str:
    """The id that an id cell holds; whole numbers as digits, also where a column of floats holds them.

    Raises:
        BadParameter: it is null, too long, or no text.
    """
    if isinstance(cell, BadParameter):  # of a template
        raise cell
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
    if not references.is_unicode(text):
        raise BadParameter("id must be valid Unicode text (it holds a lone surrogate)", "id")
    return text


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
