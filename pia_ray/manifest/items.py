"""Work items: their schema, their keys, and the plain way from one row's cells to its items.

`planning` has the fast way for whole manifests; a test holds the two together.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from json.encoder import encode_basestring as quoted
from typing import Any, Final, NamedTuple

import pyarrow as pa

from pia_ray.config import CatalogConfig, ModelConfig
from pia_ray.errors import BadParameter
from pia_ray.manifest import references
from pia_ray.params import (
    DEFAULT_STYLE,
    KNOBS,
    AnimationParams,
    ManifestRow,
    lora_strengths,
    parse_defaults,
    parse_params,
    resolve,
    seed_from_id,
    seed_of_video,
)

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
        pa.field("error_code", pa.string()),
        pa.field("error_message", pa.string()),
    ]
)
"""One planned work item, in manifest order; a manifest's pass-through columns follow, with their own types. An
`error_message` marks a rejected row: it becomes a failed row without reaching a worker."""

MAX_ID_LENGTH: Final = 256
KEY_VERSION: Final = 1
"""Raised when the same cells shall mean another video: every earlier row is then made again."""


class Picture(NamedTuple):
    """The picture of one row."""

    uri: str
    identity: str
    """Without its version, so that an id does not change with the picture's content."""
    name: str
    """Reference to make an id from."""
    version: str = ""
    """What a listing says of its content, or an empty string."""


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
    return canonical(values)


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
        **run_spec(config, config.model_for(params.style), model_version),
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
) -> list[ManifestRow]:
    """The work items of one row; versions as in `planning.plan`.

    Raises:
        BadParameter: the row's first wrong cell.
    """
    row_id = id_text(id_cell) if has_id else ""
    style = config.defaults.get("style", DEFAULT_STYLE)
    if "style" in knobs:
        style = parse_defaults({"style": knobs["style"]})["style"]
    model = config.model_for(style)
    default_prompt = config.defaults.get("prompt", model.defaults.get("prompt"))
    params = parse_params({**({"prompt": default_prompt} if default_prompt else {}), **knobs})
    if not has_id:
        given = {name: getattr(params, name) for name in KNOBS if name in knobs}
        row_id = derived_id(picture, canonical(given))
    resolved = resolve(params, config.defaults, model_defaults=model.defaults)
    lora_strengths(resolved, model.lora_weights)
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
            model_version=model_version if style == DEFAULT_STYLE else style_versions[style],
        )
        items.append(ManifestRow(row_id, index, picture.uri, identity, own, key))
    return items


def derived_id(picture: Picture, given: str) -> str:
    """An id from the picture and the row's own knobs (canonical JSON), for rows that have none."""
    spec = f"[{quoted(picture.identity)},{given}]"
    return f"{references.stem(picture.name)}-{hashlib.sha256(spec.encode()).hexdigest()[:12]}"


def run_spec(config: CatalogConfig, model: ModelConfig, version: str) -> dict[str, Any]:
    """What the run and the row's model of that version, not the row, add to a work key."""
    settings = {
        "version": version,
        "dtype": model.dtype,
        "long_edge": model.long_edge,
        "size_step": model.size_step,
    }
    return {"background": config.background.lower(), "format": config.format, "model": settings}


def canonical(value: object) -> str:
    """JSON with sorted keys and without spaces; -0.0, which equals 0.0, is written like it."""
    if isinstance(value, dict):
        value = {name: cell + 0.0 if isinstance(cell, float) else cell for name, cell in value.items()}
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def id_text(cell: object) -> str:
    """The id that an id cell holds; whole numbers as digits, also where a column of floats holds them.

    Raises:
        BadParameter: it is null, too long, or no text.
    """
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
