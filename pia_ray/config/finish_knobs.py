"""The knobs of finishing: what becomes of the generated frames on their way to the file. Reads and writes nothing."""

from __future__ import annotations

import math
import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from pia_ray.config.knob_types import AS_WORD, FloatCell, IntCell, without_array

Interpolation = Literal["motion", "blend", "none"]
RepeatMode = Literal["restart", "there-and-back"]
Fit = Literal["crop", "pad", "blur"]
Poster = Literal["none", "jpg", "webp"]


def _aspect(value: object) -> object:
    """One spelling for each aspect ratio, since it is part of the work key: 1080:1920 is 9:16."""
    wrong = "must be WIDTH:HEIGHT from 1:12 to 12:1, such as 9:16"
    if isinstance(value, int | float):
        raise ValueError(f"{wrong}, as text: YAML reads 9:16 without quotes as a number of minutes")
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*[:x/]\s*([0-9]+(?:\.[0-9]+)?)\s*", str(value))
    width, height = (float(side) for side in match.groups()) if match else (0.0, 0.0)
    if not 0 < width <= 100_000 or not 0 < height <= 100_000 or not 1 / 12 <= width / height <= 12:
        raise ValueError(wrong)
    if width.is_integer() and height.is_integer():
        factor = math.gcd(int(width), int(height))
        width, height = width / factor, height / factor
    return f"{width:g}:{height:g}"


def _focus(value: object) -> object:
    """Two numbers, or text that holds them."""
    wrong = "must be two numbers x,y from 0 to 1, such as 0.5,0.3: from the left and from the top"
    if isinstance(value, str):
        value = value.strip().strip("[]()").split(",")
    value = without_array(value)
    if not isinstance(value, list | tuple) or len(value) != 2 or any(isinstance(cell, bool) for cell in value):
        raise ValueError(wrong)
    try:
        numbers = tuple(abs(float(cell)) if float(cell) == 0 else float(cell) for cell in value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(wrong) from None
    if not all(0 <= number <= 1 for number in numbers):
        raise ValueError(wrong)
    return numbers


def _colour(value: object) -> object:
    match = re.fullmatch(r"#?([0-9a-f]{6})", str(value).strip().lower())
    if match is None:
        raise ValueError("must be a colour #rrggbb, such as #ffffff")
    return f"#{match[1]}"


def _factor(value: int) -> int:
    if value not in (1, 2, 4):
        raise ValueError("must be 1, 2 or 4")
    return value


Aspect = Annotated[str, BeforeValidator(_aspect)]
Focus = Annotated[tuple[float, float], BeforeValidator(_focus)]
HexColour = Annotated[str, BeforeValidator(_colour)]

Upscale = Annotated[IntCell, AfterValidator(_factor)]


class FinishKnobs(BaseModel):
    """The knobs of an animation that act on its finished frames; `AnimationParams` has them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    playback_fps: IntCell | None = Field(
        None,
        ge=1,
        le=60,
        description="Playing speed of the file, from fps up: frames are added between those that are generated at fps, "
        "and the video lasts as long as before. Left out: fps.",
        json_schema_extra={"unit": "frames/s", "since": "0.2.0"},
    )
    interpolate: Annotated[Interpolation, AS_WORD] = Field(
        "motion",
        description="How playback_fps makes frames: motion moves what moves, blend mixes the two neighbours at a "
        "twentieth of the cost, none shows each frame for longer.",
        json_schema_extra={"since": "0.2.0"},
    )
    repeat: IntCell = Field(
        1,
        ge=1,
        le=100,
        description="Times that the file plays the video.",
        json_schema_extra={"unit": "times", "since": "0.2.0"},
    )
    min_duration: FloatCell | None = Field(
        None,
        gt=0,
        le=600,
        description="Repeats the video as often as it takes to last so long, in place of repeat.",
        json_schema_extra={"unit": "s", "since": "0.2.0"},
    )
    repeat_mode: Annotated[RepeatMode, AS_WORD] = Field(
        "restart",
        description="One time of repeat: restart plays from the first frame to the last, there-and-back to the last "
        "and back again, so that the file plays round without a jump.",
        json_schema_extra={"since": "0.2.0"},
    )
    aspect: Aspect | None = Field(
        None,
        description="Width to height of the file, such as 9:16, 1:1 or 4:5. Left out: near that of the picture.",
        json_schema_extra={"bounds": "1:12 to 12:1", "since": "0.2.0"},
    )
    fit: Annotated[Fit, AS_WORD] = Field(
        "crop",
        description="How the picture comes to that aspect: crop animates the part that fits; pad and blur animate all "
        "of it, between bars of pad_colour or before itself, enlarged and blurred.",
        json_schema_extra={"since": "0.2.0"},
    )
    focus: Focus | None = Field(
        None,
        description="The point of the picture, x,y from its left and top, that stays nearest to the middle when it is "
        "cropped. Left out: its middle.",
        json_schema_extra={"bounds": "2 numbers, 0 to 1", "since": "0.2.0"},
    )
    pad_colour: HexColour = Field(
        "#000000",
        description="Colour of the bars of fit pad, as #rrggbb.",
        json_schema_extra={"since": "0.2.0"},
    )
    upscale: Upscale = Field(
        1,
        description="Enlarges the frames of the file by this factor: with the model's upscaler, or by Lanczos where it "
        "has none. The video is judged before.",
        json_schema_extra={"bounds": "1, 2 or 4", "unit": "times", "since": "0.2.0"},
    )
    poster: Annotated[Poster, AS_WORD] = Field(
        "none",
        description="Writes the best frame beside the video, at the size of the file, as JPEG or WebP.",
        json_schema_extra={"since": "0.2.0"},
    )

    @property
    def aspect_ratio(self) -> float | None:
        """`aspect` as a number, width by height."""
        if self.aspect is None:
            return None
        width, height = self.aspect.split(":")
        return float(width) / float(height)
