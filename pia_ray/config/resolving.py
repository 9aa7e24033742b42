"""From knobs as written to resolved `AnimationParams`: row, run, model, declared default, in that order."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import ValidationError

from pia_ray.config.faults import fault_text
from pia_ray.config.finish_checks import check_finishing
from pia_ray.config.knob_types import FIRST_VERSION, MAX_SEED, MOTION_NAMES
from pia_ray.config.knobs import (
    DEFAULT_STYLE,
    DISTILLED_STEPS,
    KNOBS,
    LOOPS,
    PICTURE_KNOBS,
    AnimationParams,
    suggest,
)
from pia_ray.config.prompt_syntax import with_loras_of_prompt
from pia_ray.errors import BadParameter


def parse_params(cells: Mapping[str, object]) -> AnimationParams:
    """The params of one row or request from its cells; null cells count as absent.

    Raises:
        BadParameter: an unknown knob (with the nearest known one) or a value out of bounds; names the field.
    """
    given = {name: value for name, value in cells.items() if value is not None}
    for name in given:
        if name not in KNOBS:
            raise BadParameter(f'there is no knob "{name}".{suggest(name, KNOBS)}', name)
    if "prompt" not in given:
        raise BadParameter("prompt is missing or null: give each row a prompt, or the run a --prompt", "prompt")
    try:
        return AnimationParams.model_validate(given)
    except ValidationError as error:
        raise _bad_parameter(error) from None


def parse_defaults(cells: Mapping[str, object]) -> dict[str, Any]:
    """Validated run or model defaults: the given knobs only, each with its proper type.

    Raises:
        BadParameter: as `parse_params`.
    """
    params = parse_params({"prompt": "-", **cells})
    if not params.prompt.strip():
        raise BadParameter("prompt must not be empty as a default: only a row may have an empty one", "prompt")
    return {name: getattr(params, name) for name in params.model_fields_set if name in cells}


def _bad_parameter(error: ValidationError) -> BadParameter:
    first = error.errors(include_url=False)[0]
    field = str(first["loc"][0]) if first["loc"] else ""
    knob = KNOBS.get(field)
    text, near = fault_text(first), ""
    value = first.get("input")
    if knob is not None and knob.choices:
        text, near = f"must be one of {', '.join(knob.choices)}", suggest(str(value), knob.choices)
    elif field == "motion_scale" and isinstance(value, str):
        near = suggest(value, MOTION_NAMES)
    elif knob is not None and knob.bounds and first["type"] != "value_error":
        whole = "a whole number from " if knob.type is int else ""
        text = f"must be {whole}{knob.bounds}"
    shown = repr(value)
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    if not text.startswith("must"):
        return BadParameter(f"{field}: {text}", field)
    return BadParameter(f"{field} {text} (got {shown})" + (f".{near}" if near else ""), field)


def resolve(
    params: AnimationParams,
    run_defaults: Mapping[str, Any],
    *,
    model_defaults: Mapping[str, Any],
    sampling: Mapping[str, Any] | None = None,
) -> AnimationParams:
    """The same params with every knob set: row, then run, then model, then the declared default.

    `sampling` is that of a few-step model, which counts before the model's other defaults.
    Idempotent. The values of `run_defaults` and `model_defaults` have been through `parse_defaults`.

    Raises:
        BadParameter: knobs that cannot go together.
    """
    given = {name: getattr(params, name) for name in params.model_fields_set}
    named = {**run_defaults, **given}
    values: dict[str, Any] = {}
    for layer in (model_defaults, sampling or {}, named):
        values.update(layer)
    for name, knob in KNOBS.items():
        values.setdefault(name, knob.default)
    if values["prompt_syntax"] == "a1111":
        values = with_loras_of_prompt(values)
    resolved = AnimationParams.model_construct(_fields_set=set(values), **values)
    _check_together(resolved)
    return resolved


def check_pictures(params: AnimationParams, *, names: Iterable[str]) -> None:
    """Refuses resolved params that do not suit a request with pictures of these names (`end_image`, `mask_image`).

    Raises:
        BadParameter: they do not; says which.
    """
    names = frozenset(names)
    if "end_image" in names and params.condition_frame >= params.num_frames - 1:
        raise BadParameter(
            f"condition_frame must be before the last frame where an end_image is that (got {params.condition_frame} "
            f"of {params.num_frames} frames)",
            "condition_frame",
        )
    if "end_image" in names and params.affinity is None and params.motion_scale in LOOPS:
        raise BadParameter(
            "motion_scale must not be a loop's with an end_image, since a loop ends on the picture itself "
            f"(got {MOTION_NAMES[params.motion_scale]})",
            "motion_scale",
        )
    if "end_image" in names and params.seam == "drop":
        raise BadParameter("seam must be keep with an end_image, because the video is not a loop (got drop)", "seam")
    if "end_image" in names and params.long_video == "chain" and params.num_frames > params.piece_frames:
        raise BadParameter("long_video must be windows with an end_image, which a chain does not know of", "long_video")
    if "mask_image" in names and params.image_guidance_scale == 0:
        raise BadParameter(
            "image_guidance_scale must be above 0 with a mask_image, which says where the picture may move (got 0)",
            "image_guidance_scale",
        )


def _check_together(params: AnimationParams) -> None:
    """Refuses resolved params that contradict each other; each of them may come from the row, the run or the model."""
    if params.condition_frame >= params.num_frames:
        raise BadParameter(
            f"condition_frame must be 0 to {params.num_frames - 1} for a video of {params.num_frames} frames "
            f"(got {params.condition_frame})",
            "condition_frame",
        )
    if params.condition_frame and params.affinity is None and params.motion_scale in LOOPS:
        raise BadParameter(
            f"condition_frame must be 0 with motion_scale {MOTION_NAMES[params.motion_scale]}, since a loop starts and "
            f"ends on the picture (got {params.condition_frame})",
            "condition_frame",
        )
    if params.seam == "drop" and not params.is_loop:
        raise BadParameter(
            "seam must be keep here, since only a loop has a frame to drop: choose motion_scale 3 to 5 or an affinity "
            "that starts and ends with 1, and at least 2 frames (got drop)",
            "seam",
        )
    check_pictures(params, names=[name for name in PICTURE_KNOBS if getattr(params, name) is not None])
    _check_sampling(params)
    check_finishing(params)


def _check_sampling(params: AnimationParams) -> None:
    if params.scheduler in ("lcm", "tcd") and params.num_inference_steps > DISTILLED_STEPS:
        raise BadParameter(
            f"num_inference_steps: scheduler {params.scheduler} cannot do {params.num_inference_steps} steps, "
            f"at most {DISTILLED_STEPS}",
            "num_inference_steps",
        )
    if params.num_frames <= params.piece_frames:
        return
    if params.long_video == "windows" and params.context_overlap >= params.piece_frames:
        raise BadParameter(
            f"context_overlap must be below context_frames (got {params.context_overlap} and {params.piece_frames})",
            "context_overlap",
        )
    if params.long_video == "chain":
        _check_chain(params)


def _check_chain(params: AnimationParams) -> None:
    """Each segment of a chain is a video of its own that starts with the picture, or with the last frame before it."""
    text = ""
    if params.is_loop:
        text = "cannot close a loop: use windows, with context_schedule uniform-loop"
    elif params.condition_frame:
        text = f"needs the picture to be the first frame (condition_frame is {params.condition_frame}): use windows"
    elif params.image_guidance_scale == 0:
        text = "goes on from pictures, which image_guidance_scale 0 leaves out: use windows"
    if text:
        raise BadParameter(f"long_video chain {text}", "long_video")


def style_of(params: AnimationParams, run_defaults: Mapping[str, Any]) -> str:
    """The style that `resolve` will give these params; it decides which model's defaults to resolve them with."""
    named = params.style if "style" in params.model_fields_set else run_defaults.get("style", DEFAULT_STYLE)
    return str(named)


def lora_strengths(params: AnimationParams, weights: Mapping[str, float]) -> tuple[tuple[str, float], ...]:
    """The LoRAs that act on a row with their strengths, by name; `weights` are the model's own.

    Raises:
        BadParameter: the row names a LoRA that the model has not.
    """
    chosen: dict[str, float] = {}
    if params.lora == "default":
        chosen = dict(weights)
    elif params.lora != "none":
        for part in params.lora.split("+"):
            name, _, weight = part.partition(":")
            if name not in weights:
                known = f"this model has {', '.join(sorted(weights))}" if weights else "this model has none"
                raise BadParameter(f'lora: there is no LoRA "{name}"; {known}.{suggest(name, weights)}', "lora")
            # Named without a weight: as strong as the model has it, in full where the model leaves it off.
            chosen[name] = float(weight) if weight else weights[name] or 1.0
    scaled = {name: weight * params.lora_scale for name, weight in chosen.items()}
    return tuple((name, strength) for name, strength in sorted(scaled.items()) if strength)


def seed_from_id(row_id: str) -> int:
    """The uint64 seed of a row that names none: the first eight bytes of sha256 of its id."""
    return int.from_bytes(hashlib.sha256(row_id.encode("utf-8", "surrogatepass")).digest()[:8], "big")


def seed_of_video(seed: int, video_index: int) -> int:
    """The seed of the n-th video of a row: seed + index, modulo 2^64."""
    return (seed + video_index) % (MAX_SEED + 1)


def canonical_params(params: AnimationParams) -> str:
    """One item's resolved params as JSON that is equal for equal params: sorted, without spaces, the seed a string.

    `num_videos` is not in it: an item is one video of those that its row asks for. A knob that came after the
    first version is in it only where it has another value than its default, so that earlier work keys stay valid;
    so does the preset exact, which the first version called standard.
    """
    values = {
        name: getattr(params, name)
        for name, knob in KNOBS.items()
        if name != "num_videos" and (knob.since == FIRST_VERSION or getattr(params, name) != knob.default)
    }
    if values["preset"] == "exact":
        values["preset"] = "standard"
    values["seed"] = None if params.seed is None else str(params.seed)
    return canonical(values)


def canonical(value: object) -> str:
    """JSON with sorted keys and without spaces; -0.0, which equals 0.0, is written like it."""
    if isinstance(value, dict):
        value = {name: cell + 0.0 if isinstance(cell, float) else cell for name, cell in value.items()}
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
