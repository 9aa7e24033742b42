"""Bounds on the numbers of a video, such as `likeness_min>=0.7`, that decide whether it is accepted."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Final

from pydantic import AfterValidator, BeforeValidator

from pia_ray.config.knobs import suggest

NUMBERS: Final[Mapping[str, tuple[float, float]]] = MappingProxyType(
    {
        "motion": (0.0, 1.0),
        "likeness": (-1.0, 1.0),
        "likeness_min": (-1.0, 1.0),
        "likeness_part": (-1.0, 1.0),
        "flicker": (0.0, 1.0),
        "sharpness": (0.0, math.inf),
        "colour_shift": (0.0, math.inf),
        "stillness": (0.0, 1.0),
        "closure": (-math.inf, 1.0),
        "subject_similarity": (-1.0, 1.0),
        "prompt_similarity": (-1.0, 1.0),
    }
)
"""The numbers of a `Judgement`, each with its least and its most value."""

MODEL_BOUNDS: Final = "model"
"""In `accept` it stands for the bounds of the row's model."""

NO_BOUNDS: Final = "none"
"""As a row's cell: its video has no bounds, whatever the run says."""

MOST_RETAKES: Final = 16

_BOUND: Final = re.compile(r"\s*([^\s<>=!]*)\s*([<>=!]+)\s*(.*?)\s*")


@dataclass(frozen=True)
class Bound:
    """A limit for one number of a video."""

    number: str
    at_least: bool
    """Whether the number must not be less than `value`; else it must not be more."""
    value: float

    def __str__(self) -> str:
        return f"{self.number}{'>=' if self.at_least else '<='}{self.value:.15g}"

    def shortfall(self, found: float | None) -> float:
        """The distance of the number from the bound as a share of it; 0 where it is met or was not measured."""
        if found is None or math.isnan(found):
            return 0.0
        missing = self.value - found if self.at_least else found - self.value
        return max(0.0, missing) / (abs(self.value) or 1.0)


def parse_bounds(texts: Iterable[str]) -> tuple[Bound, ...]:
    """The bounds of several texts, each of one bound or several with `,`, `;` or `and` between.

    Raises:
        ValueError: a text is not a valid bound, or no video can meet them all.
    """
    parts = [part for text in texts for part in re.split(r"[,;]|\band\b", text) if part.strip()]
    bounds = tuple(dict.fromkeys(map(_parse_bound, parts)))
    for number, (least, most) in NUMBERS.items():
        own = [bound for bound in bounds if bound.number == number]
        low = max((bound.value for bound in own if bound.at_least), default=least)
        high = min((bound.value for bound in own if not bound.at_least), default=most)
        if low > high or low > most or high < least:
            where = f" ({number} is {least:g} to {most:g})" if low > most or high < least else ""
            raise ValueError(f"{' and '.join(map(str, own))} cannot be met by any video{where}")
    return bounds


def _texts(value: object) -> object:
    return (value,) if isinstance(value, str) else value


def _of_run(texts: tuple[str, ...]) -> tuple[str, ...]:
    parse_bounds(text for text in texts if text.strip() != MODEL_BOUNDS)
    return texts


def _of_model(texts: tuple[str, ...]) -> tuple[str, ...]:
    parse_bounds(texts)
    return texts


Bounds = Annotated[tuple[str, ...], BeforeValidator(_texts), AfterValidator(_of_run)]
"""Texts of bounds, as `parse_bounds` takes them, one alone or a list; "model" among them stands for the model's."""

ModelBounds = Annotated[tuple[str, ...], BeforeValidator(_texts), AfterValidator(_of_model)]
"""The same without "model"."""


def _parse_bound(text: str) -> Bound:
    match = _BOUND.fullmatch(text)
    if match is None:
        raise ValueError(f"{text.strip()!r} is not a bound such as likeness_min>=0.7")
    number, operator, value = match.groups()
    if number not in NUMBERS:
        raise ValueError(f'"{number}" is not a number of a video.{suggest(number, NUMBERS)}'.rstrip("."))
    if operator not in ("<=", ">="):
        raise ValueError(f'"{operator}" in "{text.strip()}" is not a valid operator: write >= or <=')
    try:
        limit = float(value)
    except ValueError:
        limit = math.nan
    if not math.isfinite(limit):
        raise ValueError(f'"{value}" in "{text.strip()}" is not a valid limit: write a number')
    return Bound(number, operator == ">=", limit)
