"""Limits of a request: its fields and files, and the length and cost of its video."""

from __future__ import annotations

from typing import Final

from pia_ray.config.finish_checks import longest_knob
from pia_ray.config.knobs import KNOBS, AnimationParams
from pia_ray.config.serve import ServeConfig
from pia_ray.config.timeline import timeline_of
from pia_ray.errors import BadParameter

MAX_FIELDS: Final = 100

MAX_FILES: Final = 10


def most_of(config: ServeConfig) -> dict[str, int]:
    """The most that this endpoint takes of knobs, by name."""
    return {"num_frames": config.max_frames, "num_inference_steps": config.max_steps}


def within(error: BadParameter, config: ServeConfig) -> BadParameter:
    """The error of a knob, with the endpoint's own bounds where it names those of the knob."""
    message = error.message
    for name, most in most_of(config).items():
        if name in message:
            message = message.replace(f"from {KNOBS[name].bounds}", f"from 1 to {most} at this endpoint")
    return BadParameter(message, error.field)


def check_length(resolved: AnimationParams, config: ServeConfig, *, field: str) -> None:
    """Refuses videos of more frames or steps than this endpoint makes. `field` gave the length: `num_frames` or
    `seconds`.

    Raises:
        BadParameter: a knob is over its limit.
    """
    if field == "seconds" and resolved.num_frames > config.max_frames:
        most_s = config.max_frames / resolved.fps
        raise BadParameter(f"seconds must be at most {most_s:g} at this endpoint and {resolved.fps} frames/s", field)
    for name, most in most_of(config).items():
        if (value := getattr(resolved, name)) > most:
            raise _above(name, most, value)
    timeline = timeline_of(resolved)
    if timeline.num_frames > max(config.max_file_frames, resolved.num_frames):
        raise BadParameter(
            f"{longest_knob(resolved)} gives a file of {timeline.num_frames:,} frames; this endpoint makes at most "
            f"{config.max_file_frames:,}",
            longest_knob(resolved),
        )
    if resolved.num_videos > 1:
        raise BadParameter("num_videos must be 1: a request makes one video; send one for each seed", "num_videos")


def check_cost(resolved: AnimationParams, config: ServeConfig) -> None:
    """Refuses videos that cost more than this endpoint allows; those without width or height pass.

    Raises:
        BadParameter: the frames have too many pixels, or the frames, pixels and steps are too many together.
    """
    width, height = resolved.width, resolved.height
    if width is None or height is None:
        return
    if width * height > config.max_pixels:
        raise BadParameter(
            f"width x height must be at most {config.max_pixels:,} pixels at this endpoint (got {width} x {height}): "
            "lower width, height or size",
            "width",
        )
    frames, steps = resolved.num_frames, sum(resolved.iterations)
    cost = width * height * frames * steps
    if cost <= config.max_pixel_steps:
        return
    most_steps, most_frames = (config.max_pixel_steps * each // cost for each in (steps, frames))
    lower = [f"num_inference_steps to {most_steps}"] * (resolved.free_init == "off" and most_steps > 0)
    lower += [f"num_frames to {most_frames}"] * (most_frames > 0)
    raise BadParameter(
        f"{frames} frames of {width} x {height} px in {steps} steps are {cost:,} frames x pixels x steps, and this "
        f"endpoint makes at most {config.max_pixel_steps:,}: lower {' or '.join([*lower, 'width and height'])}",
        "num_inference_steps",
    )


def _above(name: str, most: int, value: int) -> BadParameter:
    return BadParameter(f"{name} must be a whole number from 1 to {most} at this endpoint (got {value})", name)
