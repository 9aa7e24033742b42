"""The knobs of finishing: what becomes of the generated frames on their way to the file. Reads and writes nothing."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from pia_ray.config.knob_types import AS_WORD, FloatCell, IntCell

Interpolation = Literal["motion", "blend", "none"]
RepeatMode = Literal["restart", "there-and-back"]


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
        description="How playback_fps makes frames: motion moves what moves, blend mixes the two neighbours at a tenth "
        "of the cost, none shows each frame for longer.",
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
