"""The sources of what a model adds to its checkpoint: LoRAs and textual inversions."""

from __future__ import annotations

from typing import Final

from pydantic import Field, model_validator

from pia_ray.config.settings import Settings


class InversionConfig(Settings):
    """The source of a textual inversion; its path alone will do."""

    path: str = Field(description="A .safetensors file: local, s3://, or on the hub as OWNER/NAME/FILE.")
    revision: str | None = Field(None, description="Commit, tag or branch, where it is on the hub.")

    @model_validator(mode="before")
    @classmethod
    def _path_alone(cls, value: object) -> object:
        return {"path": value} if isinstance(value, str) else value


class LoraConfig(InversionConfig):
    """The source of a LoRA and its strength for rows that do not choose; its path alone will do."""

    weight: float = Field(
        1.0, ge=-10, le=10, description="Its strength for rows that name none. 0: acts only on rows that name it."
    )
    merge: bool = Field(
        False,
        description="Whether it is a part of the model for all rows: no row can leave it out, and it takes no memory.",
    )


UPSCALED_BY: Final = " upscaler@"
"""Before the identity of the upscaler in a work version."""


def without_upscaler(work_version: str) -> str:
    """The version of the model alone, which is that of rows that are not enlarged."""
    return work_version.partition(UPSCALED_BY)[0]
