"""The sizes of `warm`, the setting that makes a worker or engine ready for them before its first row."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Final, NamedTuple

from pydantic import BeforeValidator

from pia_ray.config.knobs import AnimationParams
from pia_ray.config.lists import parts_of
from pia_ray.config.resolving import parse_params
from pia_ray.errors import BadParameter

_SIZE: Final = re.compile(r"(\d{1,5})x(\d{1,5})x(\d{1,4})")

MOST_WARM: Final = 16

_KNOBS: Final = (
    *("guidance_scale", "image_guidance_scale", "scheduler", "long_video", "context_frames", "context_overlap"),
    *("context_schedule", "context_stride"),
)
"""Knobs that change a row's forwards; those that a run sets count."""


class WarmSize(NamedTuple):
    """The size of videos that a worker warms up for."""

    width: int
    height: int
    num_frames: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}x{self.num_frames}"

    def params(self, defaults: Mapping[str, Any]) -> AnimationParams:
        """The params of a row of this size, with a run's defaults.

        Raises:
            BadParameter: no row may have that size.
        """
        knobs = {name: defaults[name] for name in _KNOBS if name in defaults}
        return parse_params({**knobs, "prompt": "warm-up", **self._asdict()})


def _warm_sizes(value: object) -> object:
    """The sizes of a list, or of a text with commas, as written: WIDTHxHEIGHTxFRAMES."""
    value = parts_of(value)
    if not isinstance(value, list | tuple):
        raise ValueError("must be a list of sizes such as [512x512x16]")
    sizes = [_warm_size(each) for each in value]
    if len(sizes) > MOST_WARM:
        raise ValueError(f"must name at most {MOST_WARM} sizes (got {len(sizes)})")
    return tuple(dict.fromkeys(sizes))


def _warm_size(value: object) -> WarmSize:
    if isinstance(value, list | tuple) and len(value) == 3:
        value = "x".join(map(str, value))  # as a config writes itself
    match = _SIZE.fullmatch(value.lower()) if isinstance(value, str) else None
    if match is None:
        raise ValueError(f'"{value}" is not a valid size: write WIDTHxHEIGHTxFRAMES, such as 512x512x16')
    width, height, num_frames = map(int, match.groups())
    size = WarmSize(width, height, num_frames)
    try:
        size.params({})
    except BadParameter as error:
        raise ValueError(f"{value}: {error.message}") from None
    return size


WarmSizes = Annotated[tuple[WarmSize, ...], BeforeValidator(_warm_sizes)]
"""Sizes, written WIDTHxHEIGHTxFRAMES."""
