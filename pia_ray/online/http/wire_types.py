"""Parts that several answers share: times, knobs, and the description of a finished video."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from pia_ray.config.knobs import AnimationParams

UnixTime = Annotated[int, BeforeValidator(lambda value: int(value) if isinstance(value, float) else value)]
"""Whole seconds since 1970, UTC, rounded down."""


class VideoDescription(BaseModel):
    """The fields of a `FinishedVideo`; they are null until the video is finished."""

    model_config = ConfigDict(protected_namespaces=())

    model_version: str | None = Field(None, description="Name and version of the model that made the video.")
    width: int | None = None
    height: int | None = None
    num_frames: int | None = None
    fps: int | None = None
    size_bytes: int | None = None
    sha256: str | None = Field(None, description="Of the video's file.")
    gpu_s: float | None = Field(None, description="Seconds of engine time: its share of every forward, and its decode.")
    animate_s: float | None = Field(None, description="Seconds in the engine, from submission to frames.")
    motion: float | None = Field(None, description="Amount of motion, measured: 0 to 1.")
    likeness: float | None = Field(None, description="Similarity of the frames to the picture: 0 to 1.")
    likeness_min: float | None = Field(None, description="The same of the frame that is least like the picture.")
    likeness_part: float | None = Field(
        None, description="The same of the part that is least like the picture at the end."
    )
    flicker: float | None = Field(None, description="Change back and forth between frames: 0 to 1.")
    sharpness: float | None = Field(None, description="Detail at the end over the picture's: 1 as the picture.")
    colour_shift: float | None = Field(None, description="Distance of the colours at the end from the picture's.")
    stillness: float | None = Field(None, description="Longest stretch without motion, as a share of the video.")
    closure: float | None = Field(None, description="Quality of a loop's seam: 0 to 1, 1 closes.")
    subject_similarity: float | None = Field(None, description="Least similarity to the picture by the model's scorer.")
    prompt_similarity: float | None = Field(None, description="Mean similarity to the prompt by the model's scorer.")
    accepted: bool | None = Field(None, description="Whether it meets the bounds of `accept`; null without bounds.")
    take: int | None = Field(None, description="Number of the take that is this video, from 0; null without bounds.")
    takes: list[dict[str, Any]] | None = Field(
        None, description="The takes that were made: number, seed, numbers and gpu_s of each, or its error."
    )
    nsfw: bool | None = Field(None, description="Whether a frame is not safe, by the model's safety checker.")


def wire_params(params: AnimationParams, *, only_given: bool) -> dict[str, Any]:
    """Knobs as JSON values. The seed is text, since it has 64 bits and JavaScript rounds large numbers."""
    values = params.model_dump(mode="json", exclude_unset=only_given)
    if values.get("seed") is not None:
        values["seed"] = str(values["seed"])
    return values
