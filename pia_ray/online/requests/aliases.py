"""The fields of the videos API as knobs: pictures, `size`, `seconds`, LoRAs as objects."""

from __future__ import annotations

import math
import re
from typing import Final, get_args

from pia_ray.config.knob_types import VideoFormat
from pia_ray.config.knobs import KNOBS, REFERENCE_KNOBS
from pia_ray.config.model import ModelConfig
from pia_ray.config.resolving import parse_params
from pia_ray.errors import BadParameter
from pia_ray.online.public_errors import shortened
from pia_ray.online.requests.bodies import parse_json

IMAGE_FIELDS: Final = ("image", "input_reference", "image_url")
"""Names of the field with the picture: ours, that of the videos API, and one that many servers use."""


def sources_of(given: dict[str, object]) -> dict[str, object]:
    """The source of each file by knob, `image` first; they are removed from `given`.

    Raises:
        BadParameter: there is no picture, or a value is not a valid source.
    """
    images = [(name, given.pop(name)) for name in IMAGE_FIELDS if name in given]
    if not images:
        raise BadParameter("image is missing: send a file, an https:// URL or a data: URL", "image")
    if len(images) > 1:
        raise BadParameter(f"{' and '.join(name for name, _ in images)} are the same field: give one", images[1][0])
    sources: dict[str, object] = {"image": _reference(images[0][1], images[0][0])}
    for knob in REFERENCE_KNOBS:
        if knob in given:
            sources[knob] = _reference(given.pop(knob), knob)
    return sources


def spell_out_size(given: dict[str, object]) -> None:
    """Replaces `size` by `width` and `height`.

    Raises:
        BadParameter: it is not a valid size, or both are given.
    """
    size = given.pop("size", None)
    if size is None:
        return
    match = re.fullmatch(r"([1-9][0-9]{1,3})x([1-9][0-9]{1,3})", size) if isinstance(size, str) else None
    if match is None:
        raise BadParameter(
            f"size must be WIDTHxHEIGHT in pixels, such as 512x384 (got {shortened(repr(size))})", "size"
        )
    if "width" in given or "height" in given:
        raise BadParameter("size says the same as width and height: give either", "size")
    given["width"], given["height"] = int(match[1]), int(match[2])


def spell_out_seconds(given: dict[str, object], model: ModelConfig) -> None:
    """Replaces `seconds` by `num_frames` at the frame rate of the video.

    Raises:
        BadParameter: it is not a valid duration, or both are given.
    """
    seconds = given.pop("seconds", None)
    if seconds is None:
        return
    try:
        number = math.nan if isinstance(seconds, bool) else float(seconds)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not 0 < number <= 3600:
        raise BadParameter(f"seconds must be a number above 0 (got {shortened(repr(seconds))})", "seconds")
    if "num_frames" in given:
        raise BadParameter("seconds says the same as num_frames: give either", "seconds")
    fps = parse_params({"prompt": "-", "fps": given.get("fps", model.defaults.get("fps", KNOBS["fps"].default))}).fps
    frames = max(1, round(number * fps))
    try:
        parse_params({"prompt": "-", "num_frames": frames})
    except BadParameter:
        raise BadParameter(
            f"seconds: {number:g} s at {fps} frames/s are {frames} frames, and num_frames goes from "
            f"{KNOBS['num_frames'].bounds}; ask for less, or for a lower fps",
            "seconds",
        ) from None
    given["num_frames"] = frames


def size_text(width: int | None, height: int | None) -> str:
    """Width and height as the videos API has them, such as "512x384"."""
    return f"{width}x{height}"


def seconds_text(num_frames: int, fps: int) -> str:
    """The duration of a video as the videos API has it, such as "2" or "1.6"."""
    return f"{num_frames / fps:.3f}".rstrip("0").rstrip(".")


def lora_of(value: object) -> object:
    """The knob's text for an object of names and weights, which may be JSON text.

    Raises:
        BadParameter: it is not such an object.
    """
    if isinstance(value, str) and value.lstrip().startswith("{"):
        try:
            value = parse_json(value.encode("utf-8", "surrogatepass"))
        except BadParameter as error:
            raise BadParameter(f"lora: {error.message}", "lora") from None
    if not isinstance(value, dict):
        return value
    parts = []
    for name, weight in value.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float | str):
            raise BadParameter(f"lora: the weight of {shortened(name)} must be a number", "lora")
        parts.append(f"{name}:{weight}")
    return "+".join(parts) if parts else "none"


def format_of(value: object) -> VideoFormat | None:
    """The format of that name; None for None.

    Raises:
        BadParameter: there is no such format.
    """
    formats = get_args(VideoFormat)
    if value is None:
        return None
    text = value.strip().lower() if isinstance(value, str) else ""
    if text not in formats:
        raise BadParameter(f"format must be one of {', '.join(formats)} (got {shortened(repr(value))})", "format")
    return text  # type: ignore[return-value]  # one of VideoFormat, as checked above


def _reference(value: object, field: str) -> object:
    """The URL of `{"image_url": ...}` and `{"url": ...}`; other values unchanged."""
    for name in ("image_url", "url"):
        if isinstance(value, dict) and set(value) == {name}:
            value = value[name]
    if isinstance(value, dict):
        if "file_id" in value:
            reason = "and image_url exclude each other" if "image_url" in value else "is not accepted here"
            raise BadParameter(f"{field}: file_id {reason}; send a file or an image_url", field)
        raise BadParameter(f"{field} must be a file, a URL or an object with image_url alone", field)
    return value
