"""The OpenAPI entries of bodies, which routes cannot derive from their signatures, because `FormReader` reads them.

They are made from `AnimationParams`, as the fields are.
"""

from __future__ import annotations

from typing import Any, Final, get_args

from pia_ray.config.knob_types import MAX_COEFFICIENTS, MOTION_NAMES, VideoFormat
from pia_ray.config.knobs import ARRAY_KNOBS, KNOBS, PICTURE_KNOBS, REFERENCE_KNOBS, AnimationParams
from pia_ray.media.video import MIME
from pia_ray.online.requests.aliases import IMAGE_FIELDS

_PICTURE: Final = "data:image/png;base64,iVBORw0KGgo..."

_EXAMPLE: Final = {
    "image": "https://example.com/cat.jpg",
    "prompt": "a cat on a wall, its tail moves",
    "motion_scale": 1,
    "seed": 7,
}


def request_body() -> dict[str, Any]:
    """The body of a request in both media types."""
    return {
        "required": True,
        "content": {
            "multipart/form-data": {"schema": body_schema(files=True), "example": {**_EXAMPLE, "image": "(file)"}},
            "application/json": {
                "schema": body_schema(files=False),
                "examples": {
                    "url": {"summary": "A picture by its URL", "value": _EXAMPLE},
                    "data_url": {
                        "summary": "A picture in the request itself",
                        "value": {"image": _PICTURE, "prompt": "waves roll", "motion_scale": "loop-small"},
                    },
                },
            },
        },
    }


def body_schema(*, files: bool) -> dict[str, Any]:
    """The schema of every field of a request; with `files` that of multipart."""
    picture: dict[str, Any] = (
        {"anyOf": [{"type": "string", "format": "binary"}, {"type": "string", "format": "uri"}]}
        if files
        else {"anyOf": [{"type": "string", "format": "uri", "pattern": "^(https://|data:)"}, _by_url()]}
    )
    shape: dict[str, Any] = {
        "type": "object",
        "required": ["prompt"],
        "anyOf": [{"required": [name]} for name in IMAGE_FIELDS],
        "properties": {
            "image": {**picture, "description": "The picture: a file part, an https:// URL or a data: URL."},
            "input_reference": {**picture, "description": "The picture, under its name in the videos API."},
            "image_url": {**picture, "description": "The picture, under a third name."},
            **_VIDEO,
            **_POLICY,
            **_knob_fields(picture, files=files),
        },
        "additionalProperties": False,
    }
    if files:
        _add_folded(shape)
    return shape


_VIDEO: Final[dict[str, Any]] = {
    "model": {"type": "string", "description": "A model of /v1/models. Left out: the endpoint's default."},
    "format": {
        "type": "string",
        "enum": list(get_args(VideoFormat)),
        "description": "Format of the video. Left out: that of the Accept header, else mp4.",
    },
    "size": {
        "type": "string",
        "pattern": "^[1-9][0-9]{1,3}x[1-9][0-9]{1,3}$",
        "example": "512x384",
        "description": "width and height in one value.",
    },
    "seconds": {
        "anyOf": [{"type": "number", "exclusiveMinimum": 0}, {"type": "string", "pattern": "^[0-9]+(\\.[0-9]+)?$"}],
        "example": "2",
        "description": "Duration as generated, before it is repeated, in place of num_frames.",
    },
}
"""The fields of the video as a whole."""

_POLICY: Final[dict[str, Any]] = {
    "accept": {
        "anyOf": [{"type": "string", "maxLength": 1000}, {"type": "array", "items": {"type": "string"}}],
        "example": "likeness_min>=0.7; flicker<=0.03",
        "description": "Bounds on the numbers of the video; `model` stands for those of the model.",
    },
    "retakes": {
        "type": "integer",
        "minimum": 0,
        "default": 0,
        "description": "Times that a video which misses a bound is animated again, with other seeds.",
    },
    "unaccepted": {
        "type": "string",
        "enum": ["keep", "fail"],
        "default": "keep",
        "description": "Where all takes miss: keep the best one, or fail with not_accepted.",
    },
}


def _knob_fields(picture: dict[str, Any], *, files: bool) -> dict[str, Any]:
    """The schema of each knob; `picture` is that of a picture."""
    declared = AnimationParams.model_json_schema()["properties"]
    fields: dict[str, Any] = {}
    for name in KNOBS:
        if name in PICTURE_KNOBS:
            fields[name] = {**picture, "description": KNOBS[name].meaning}
        elif name in ARRAY_KNOBS:
            numbers = {"type": "array", "items": {}, "description": f"Nested lists of floats {ARRAY_KNOBS[name]}."}
            options = picture["anyOf"] if files else [*picture["anyOf"], numbers]
            fields[name] = {"anyOf": options, "description": KNOBS[name].meaning}
        else:
            fields[name] = _field(name, declared[name])
    return fields


def _by_url() -> dict[str, Any]:
    return {
        "type": "object",
        "required": ["image_url"],
        "properties": {"image_url": {"type": "string", "format": "uri"}},
        "additionalProperties": False,
    }


def _field(name: str, declared: dict[str, Any]) -> dict[str, Any]:
    knob = KNOBS[name]
    field = {key: value for key, value in declared.items() if key not in ("title", "unit", "bounds", "since")}
    field["description"] = knob.meaning + (f" Unit: {knob.unit}." if knob.unit else "")
    if name == "motion_scale":
        return {
            "anyOf": [{"type": "integer", "minimum": 0, "maximum": 8}, {"type": "string", "enum": list(MOTION_NAMES)}],
            "default": 0,
            "description": field["description"],
        }
    if name == "lora":
        weights = {"type": "object", "additionalProperties": {"type": "number", "minimum": -10, "maximum": 10}}
        return {**field, "anyOf": [{"type": field.pop("type", "string")}, weights]}
    if knob.many:
        numbers = {"type": "array", "items": {"type": "number"}, "minItems": 1, "maxItems": MAX_COEFFICIENTS}
        text = {"type": "string", "pattern": "^[0-9]", "description": "The numbers as text, separated by commas."}
        return {"anyOf": [numbers, text], "description": f"{field['description']} Range: {knob.bounds}."}
    return field


def _add_folded(shape: dict[str, Any]) -> None:
    """Adds the names of objects and lists in multipart, lora[name] and affinity[], to the schema of a body."""
    pictures = "|".join((*IMAGE_FIELDS, *REFERENCE_KNOBS))
    lists = "|".join(name for name in KNOBS if KNOBS[name].many)
    folded = rf"^(lora\[[^\[\]]+\]|({pictures})\[(image_url|url)\]|({lists})\[\])$"
    shape["patternProperties"] = {folded: {"type": "string"}}
    nested = [{"required": [f"{name}[{inner}]"]} for name in IMAGE_FIELDS for inner in ("image_url", "url")]
    shape["anyOf"] += nested


ANIMATION_RESPONSE: Final[dict[str, Any]] = {
    "description": "The video, or the events of its rendering.",
    "headers": {
        "x-animation-id": {"description": "Names the animation.", "schema": {"type": "string"}},
        "x-animation-model": {"description": "Model and version that made it.", "schema": {"type": "string"}},
        "x-animation-seed": {"description": "The seed that was used.", "schema": {"type": "string"}},
        "x-animation-params": {
            "description": "All knobs but the prompts, as JSON.",
            "schema": {"type": "string"},
        },
        "x-animation-frames": {"description": "Frames of the video.", "schema": {"type": "integer"}},
        "x-animation-size": {"description": "Width and height.", "schema": {"type": "string"}},
        "x-animation-gpu-seconds": {"description": "Engine time.", "schema": {"type": "number"}},
        "x-animation-motion": {"description": "Amount of motion, 0 to 1.", "schema": {"type": "number"}},
        "x-animation-accepted": {
            "description": "Whether the video meets the bounds of `accept`; with these alone.",
            "schema": {"type": "boolean"},
        },
        "x-animation-take": {"description": "Number of the take, from 0.", "schema": {"type": "integer"}},
        "x-animation-takes": {"description": "Takes that were made.", "schema": {"type": "integer"}},
        "x-animation-judgement": {
            "description": "Numbers of the video's quality, as JSON.",
            "schema": {"type": "string"},
        },
        "x-request-id": {"description": "Names the call in the server's log.", "schema": {"type": "string"}},
    },
    "content": {
        **{mime: {"schema": {"type": "string", "format": "binary"}} for mime in MIME.values()},
        "text/event-stream": {
            "schema": {"type": "string"},
            "example": 'event: queued\ndata: {"position":1}\n\nevent: step\ndata: {"done":1,"total":25}\n\n'
            'event: completed\ndata: {"id":"anim_...","seed":"7","video":"data:video/mp4;base64,..."}\n\n',
        },
    },
}
"""The answer of POST /v1/animations."""
