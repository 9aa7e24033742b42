"""Limits of a request: its fields and files, and the length of its video."""

from __future__ import annotations

from typing import Final

from pia_ray.config.knobs import AnimationParams
from pia_ray.config.serve import ServeConfig
from pia_ray.errors import BadParameter

MAX_FIELDS: Final = 100

MAX_FILES: Final = 10


def check_size(resolved: AnimationParams, config: ServeConfig, *, field: str) -> None:
    """Refuses videos that exceed this endpoint's limits. `field` gave the length: `num_frames` or `seconds`.

    Raises:
        BadParameter: a knob is over its limit.
    """
    if field == "seconds" and resolved.num_frames > config.max_frames:
        most_s = config.max_frames / resolved.fps
        raise BadParameter(f"seconds must be at most {most_s:g} at this endpoint and {resolved.fps} frames/s", field)
    for name, most in (("num_frames", config.max_frames), ("num_inference_steps", config.max_steps)):
        if (value := getattr(resolved, name)) > most:
            raise BadParameter(f"{name} must be at most {most} at this endpoint (got {value})", name)
    if resolved.num_videos > 1:
        raise BadParameter("num_videos must be 1: a request makes one video; send one for each seed", "num_videos")
