"""The types of the knobs: the values that each may have, and how cells, flags and form fields become them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal, get_args, get_origin

from pydantic import BeforeValidator
from pydantic.fields import FieldInfo

Scheduler = Literal[
    "ddim",
    "euler",
    "euler-a",
    "dpm++2m",
    "dpm++2m-karras",
    "dpm++2m-sde",
    "unipc",
    "pndm",
    "deis",
    "heun",
    "lcm",
    "euler-karras",
    "dpm++2m-sde-karras",
    "dpm++2s",
    "dpm++2s-karras",
    "unipc-karras",
    "heun-karras",
    "kdpm2",
    "kdpm2-karras",
    "kdpm2-a",
    "kdpm2-a-karras",
    "ddpm",
    "tcd",
    "sa-solver",
    "ddim-trailing",
    "euler-trailing",
]
FreeInit = Literal["off", "butterworth", "gaussian", "ideal"]
ContextSchedule = Literal["standard", "uniform", "uniform-loop"]
LongVideo = Literal["windows", "chain"]
FrameNoise = Literal["shuffle", "repeat", "random"]
Switch = Literal["off", "on"]
VideoFormat = Literal["mp4", "gif", "webp", "webm"]
Preset = Literal["exact", "balanced", "fast"]
Seam = Literal["keep", "drop"]
PromptSyntax = Literal["plain", "a1111"]


MAX_SEED: Final = 2**64 - 1

MOTION_NAMES: Final = (
    "small",
    "moderate",
    "large",
    "loop-small",
    "loop-moderate",
    "loop-large",
    "style-small",
    "style-moderate",
    "style-large",
)
"""Names of the nine motion scales, by number. Source: PIA, arXiv 2312.13964, and its published tables."""

MAX_COEFFICIENTS: Final = 64


def _no_bool(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("must be a number, not true or false")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("must be a finite number")
    return value


def _motion_scale(value: object) -> object:
    if isinstance(value, str):
        name = value.strip().lower().replace("_", "-").replace(" ", "-")
        if name in MOTION_NAMES:
            return MOTION_NAMES.index(name)
    number = _int_cell(value)
    if isinstance(number, str):
        raise ValueError(f"must be 0 to 8 or one of {', '.join(MOTION_NAMES)}")
    return number


def without_array(value: object) -> object:
    """The value, as lists and plain numbers where it is numpy's; without numpy, which is a third of `--help`'s time."""
    to_list = getattr(value, "tolist", None)
    return to_list() if callable(to_list) else value


def _affinity(value: object) -> object:
    """Numbers of a list, or of text such as "1, .9, .85"; a lone number is a list of one."""
    wrong = f"must be 1 to {MAX_COEFFICIENTS} numbers from 0 to 1, such as 1,.9,.85"
    if isinstance(value, str):
        value = value.strip().removeprefix("[").removesuffix("]").split(",")
    value = without_array(value)
    cells: list[Any] = list(value) if isinstance(value, list | tuple) else [value]
    if not 1 <= len(cells) <= MAX_COEFFICIENTS:
        raise ValueError(wrong)
    numbers = []
    for cell in cells:
        if cell is None or isinstance(cell, bool):
            raise ValueError(wrong)
        try:
            number = float(cell)
        except (TypeError, ValueError, OverflowError):
            raise ValueError(wrong) from None
        if not 0 <= number <= 1:
            raise ValueError(wrong)
        numbers.append(abs(number))  # -0.0 is written as 0.0
    return tuple(numbers)


def _name(value: object) -> object:
    return value.strip().lower().replace("_", "-") if isinstance(value, str) else value


def _preset(value: object) -> object:
    """The name of a preset, also by its name in version 0.1.0."""
    name = _name(value)
    return {"standard": "exact", "draft": "fast"}.get(name, name) if isinstance(name, str) else name


def _loras(value: object) -> object:
    """One spelling for each choice of LoRAs, since it is part of the work key."""
    if not isinstance(value, str):
        raise ValueError(f"must be text such as pixar:0.8+detail, not {type(value).__name__}")
    text = value.strip().lower()
    if text in ("default", "none"):
        return text
    chosen: dict[str, str] = {}
    for part in text.split("+"):
        name, colon, weight = (word.strip() for word in part.partition(":"))
        try:
            number = float(weight) if colon else 1.0
        except ValueError:
            number = math.nan
        if not name or name in chosen or not -10 <= number <= 10:
            raise ValueError("must be default, none, or names with weights from -10 to 10, such as pixar:0.8+detail")
        chosen[name] = f"{name}:{number:g}" if colon else name
    return "+".join(chosen[name] for name in sorted(chosen))


def _switch(value: object) -> object:
    """Words and truth values for on and off; YAML reads a bare off as false."""
    if isinstance(value, bool):
        return "on" if value else "off"
    word = _name(value)
    return {"true": "on", "yes": "on", "false": "off", "no": "off"}.get(word, word) if isinstance(word, str) else word


def _free_init(value: object) -> object:
    return {"on": "butterworth"}.get(str(word), word) if isinstance(word := _switch(value), str) else word


def _free_u(value: object) -> object:
    """Four numbers, or text that holds them."""
    if isinstance(value, str):
        value = value.strip().strip("[]").split(",")
    value = without_array(value)
    text = "must be four numbers s1,s2,b1,b2 above 0 and at most 4, such as 0.9,0.2,1.5,1.6"
    if not isinstance(value, list | tuple) or len(value) != 4:
        raise ValueError(text)
    try:
        numbers = tuple(float(_no_bool(number)) for number in value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        raise ValueError(text) from None
    if not all(0 < number <= 4 for number in numbers):
        raise ValueError(text)
    return numbers


def holds_surrogates(text: str) -> bool:
    """Whether the text holds a lone surrogate, which no file and no answer can hold."""
    return not text.isascii() and any("\ud800" <= ch <= "\udfff" for ch in text)


def _text(value: object) -> object:
    if not isinstance(value, str):
        raise ValueError(f"must be text, not {type(value).__name__}")
    if holds_surrogates(value):
        raise ValueError("must be valid Unicode text (it holds a lone surrogate)")
    return value


def _style(value: object) -> object:
    value = _text(value)
    return value.strip() if isinstance(value, str) else value


def _multiple_of_8(value: object) -> object:
    value = _no_bool(value)
    if isinstance(value, int) and value % 8:
        low = max(8, value // 8 * 8)
        raise ValueError(f"must be a multiple of 8; the nearest are {low} and {value // 8 * 8 + 8}")
    return value


def _seed(value: object) -> object:
    value = _int_cell(value)
    if isinstance(value, int) and not 0 <= value <= MAX_SEED:  # pydantic's own words round the most
        raise ValueError("must be a whole number from 0 to 2^64-1")
    return value


def _int_cell(value: object) -> object:
    """Text from CSV and floats with a whole value are integers; 2**63 and more must not pass through a float."""
    value = _no_bool(value)
    if isinstance(value, str):
        text = value.strip()
        try:
            return int(text)
        except ValueError:
            pass
        try:
            number = float(text)
        except ValueError:
            return text
        return int(number) if math.isfinite(number) and number.is_integer() and abs(number) < 2**53 else text
    # pandas writes a column of integers with gaps as floats.
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**53 else value


def _side(value: object) -> object:
    return _multiple_of_8(_int_cell(value))


IntCell = Annotated[int, BeforeValidator(_int_cell)]
Seed = Annotated[int, BeforeValidator(_seed)]
FloatCell = Annotated[float, BeforeValidator(_no_bool)]
Text = Annotated[str, BeforeValidator(_text)]
Side = Annotated[int, BeforeValidator(_side)]
StyleName = Annotated[str, BeforeValidator(_style)]
LoraChoice = Annotated[str, BeforeValidator(_loras)]
MotionScale = Annotated[int, BeforeValidator(_motion_scale)]
Affinity = Annotated[tuple[float, ...], BeforeValidator(_affinity)]
FreeU = Annotated[tuple[float, float, float, float], BeforeValidator(_free_u)]
FreeInitFilter = Annotated[FreeInit, BeforeValidator(_free_init)]
OnOff = Annotated[Switch, BeforeValidator(_switch)]
PresetName = Annotated[Preset, BeforeValidator(_preset)]

AS_WORD: Final = BeforeValidator(_name)
"""Reads text in any case, with spaces around it, as one of the words of a `Literal`."""

FIRST_VERSION: Final = "0.1.0"
"""The version whose knobs are all in a work key, also at their defaults."""


@dataclass(frozen=True)
class Knob:
    """One knob as flags, forms and tables see it."""

    name: str
    type: type
    """`int`, `float` or `str`."""
    choices: tuple[str, ...]
    """Allowed values of a knob that is one of a few names, else empty."""
    many: bool
    """Whether it holds several numbers: a list, or text with commas."""
    default: Any
    bounds: str
    """The allowed range as people write it, such as "0 to 8", or an empty string."""
    unit: str
    meaning: str
    since: str
    """The version of pia-ray that has it first; `json_schema_extra` says so of those after the first."""


def knob_of(name: str, field: FieldInfo) -> Knob:
    """The knob that a field of `AnimationParams` declares."""
    kind = field.annotation
    options = [a for a in get_args(kind) if a is not type(None)] if get_origin(kind) is not Literal else [kind]
    kind = options[0] if options else kind
    while get_origin(kind) is Annotated:
        kind = get_args(kind)[0]
    choices = tuple(map(str, get_args(kind))) if get_origin(kind) is Literal else ()
    low = high = ""
    for rule in field.metadata:
        if (ge := getattr(rule, "ge", None)) is not None:
            low = f"{ge:g}" if isinstance(ge, float) else str(ge)
        if (gt := getattr(rule, "gt", None)) is not None:
            low = f"above {gt:g}"
        if (le := getattr(rule, "le", None)) is not None:
            high = "2^64-1" if le == 2**64 - 1 else str(le)
    extra = field.json_schema_extra
    return Knob(
        name=name,
        type=int if kind is int else float if kind is float else str,
        choices=choices,
        many=get_origin(kind) is tuple,
        default=None if field.is_required() else field.default,
        bounds=str(extra["bounds"])
        if isinstance(extra, dict) and "bounds" in extra
        else f"{low} to {high}"
        if low and high
        else "",
        unit=str(extra.get("unit", "")) if isinstance(extra, dict) else "",
        meaning=field.description or "",
        since=str(extra.get("since", FIRST_VERSION)) if isinstance(extra, dict) else FIRST_VERSION,
    )
