"""Types of settings that several configs have, with their checks and defaults."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, BeforeValidator

from pia_ray.config.knobs import REFERENCE_KNOBS
from pia_ray.config.resolving import parse_defaults
from pia_ray.errors import BadParameter

DEFAULT_BATCH_SIZE: Final = 4
"""Rows that denoise together where `batch_size` is "auto": on a CPU always, on a GPU at first."""

MOST_ROWS: Final = 8
"""Most rows that denoise together where `batch_size` is "auto" and a GPU finds that more pay."""

DEFAULT_KEEP_MODELS: Final = 2
"""Models that one animator keeps in memory: one at work, and the next one loading beside it."""


def _knob_defaults(value: object) -> object:
    if not isinstance(value, Mapping):
        raise ValueError("must be a mapping of knobs to values")
    for knob in REFERENCE_KNOBS:
        if str(value.get(knob) or "").lstrip()[:5].lower() == "data:":
            raise ValueError(
                f"{knob}: a default is a path or URL; what a data: URL holds would go into every row's plan"
            )
    try:
        return parse_defaults(value)
    except BadParameter as error:
        raise ValueError(error.message) from None


def _batch_size(value: object) -> object:
    if isinstance(value, str) and value.isdecimal():
        value = int(value)
    if value != "auto" and (not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 64):
        raise ValueError('must be "auto" or 1 to 64')
    return value


def _hex_colour(value: str) -> str:
    if re.fullmatch("#[0-9a-fA-F]{6}", value) is None:
        raise ValueError("must be a colour such as #ffffff")
    return value


KnobDefaults = Annotated[dict[str, Any], BeforeValidator(_knob_defaults)]
"""Values of knobs by name, checked."""

BatchSize = Annotated[int | Literal["auto"], BeforeValidator(_batch_size)]
"""1 to 64, or "auto"."""

HexColour = Annotated[str, AfterValidator(_hex_colour)]
"""A colour such as #ffffff."""
