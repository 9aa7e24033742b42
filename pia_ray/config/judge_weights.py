"""`JudgeWeights`, the settings of the models that measure finished frames and change none."""

from __future__ import annotations

from pydantic import Field

from pia_ray.config.settings import Settings


class JudgeWeights(Settings):
    """The weights by which the videos of a model are scored and checked."""

    scorer: str | None = Field(
        None,
        description="CLIP or DINO that judges each video by its features: a folder, s3:// prefix or hub id in "
        "transformers' layout, such as openai/clip-vit-base-patch32. Changes no video. Left out: "
        "subject_similarity and prompt_similarity are empty.",
    )
    scorer_revision: str | None = Field(None, description="As revision, for the scorer.")
    safety_checker: str | None = Field(
        None,
        description="Stable Diffusion's safety checker, for runs and endpoints with safety: a folder, s3:// prefix, "
        "hub id or OWNER/NAME/FOLDER in diffusers' layout, such as CompVis/stable-diffusion-safety-checker.",
    )
    safety_checker_revision: str | None = Field(None, description="As revision, for the safety checker.")
