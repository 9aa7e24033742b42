"""`WorkerConfig`, the settings that the workers of a catalogue and the engines of an endpoint have in common."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from pia_ray.config.knobs import AnimationParams
from pia_ray.config.model import ModelConfig
from pia_ray.config.settings import Settings
from pia_ray.config.warm_sizes import WarmSizes
from pia_ray.logs import LogFormat

DEFAULT_BATCH_SIZE: Final = 4
"""Rows that denoise together where `batch_size` is "auto": on a CPU always, on a GPU at first."""

MAX_AUTO_BATCH_SIZE: Final = 8
"""Most rows that denoise together where `batch_size` is "auto" and a GPU finds that more pay."""

DEFAULT_PREFETCH: Final = 2
"""Rows that are fetched or encoded while others denoise where `prefetch` is "auto", at first."""

MAX_AUTO_PREFETCH: Final = 16
"""Most of them where `prefetch` is "auto" and the engine waits for rows."""

DEFAULT_KEEP_MODELS: Final = 2
"""Models that one animator keeps in memory: one at work, and the next one that loads meanwhile."""


def _batch_size(value: object) -> object:
    if isinstance(value, str) and value.isdecimal():
        value = int(value)
    if value != "auto" and (not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 64):
        raise ValueError('must be "auto" or 1 to 64')
    return value


def _prefetch(value: object) -> object:
    if isinstance(value, str) and value.isdecimal():
        value = int(value)
    if value != "auto" and (not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= 64):
        raise ValueError('must be "auto" or 0 to 64')
    return value


def _hex_colour(value: str) -> str:
    if re.fullmatch("#[0-9a-fA-F]{6}", value) is None:
        raise ValueError("must be a colour such as #ffffff")
    return value


BatchSize = Annotated[int | Literal["auto"], BeforeValidator(_batch_size)]
"""1 to 64, or "auto"."""

Prefetch = Annotated[int | Literal["auto"], BeforeValidator(_prefetch)]
"""0 to 64, or "auto"."""

HexColour = Annotated[str, AfterValidator(_hex_colour)]
"""A colour such as #ffffff."""


class WorkerConfig(Settings):
    """Settings of one process that animates rows: the models that it keeps, and the rows that denoise together."""

    keep_models: int = Field(
        DEFAULT_KEEP_MODELS,
        ge=1,
        le=64,
        description="Models that a worker or engine keeps in memory; the least recently used goes first.",
    )
    batch_size: BatchSize = Field(
        "auto",
        description="Rows that denoise together in one worker or engine; auto is 4 on a CPU, and on a GPU what pays, "
        "up to 8. Limits and autoscaling of an endpoint count with 4.",
    )
    warm: WarmSizes = Field(
        (),
        description="Sizes as WIDTHxHEIGHTxFRAMES that a worker or engine prepares for before its first row: kernels "
        "are chosen; on a GPU the batch size is found and the UNet compiled, for minutes. For the default model.",
    )
    background: HexColour = Field("#ffffff", description="Colour under transparent pictures.")
    safety: Literal["off", "flag", "fail"] = Field(
        "off",
        description="Check of every frame by the model's safety_checker: off, flag the video (nsfw), or fail the row.",
    )
    log: LogFormat = Field("text", description="Format of log lines: text, or json for one JSON object a line.")

    @property
    def default_model_config(self) -> ModelConfig:
        """The model of rows that name no style."""
        raise NotImplementedError

    @property
    def style_models(self) -> Mapping[str, ModelConfig]:
        """The models by style that rows may name."""
        raise NotImplementedError

    @property
    def gpu_share(self) -> float:
        """The share of one GPU that a worker or engine has to itself; 1 for one GPU or more, and where it has none."""
        raise NotImplementedError

    @property
    def row_defaults(self) -> Mapping[str, Any]:
        """The knobs of rows that leave them out, before the model's."""
        return {}

    @property
    def warm_params(self) -> tuple[AnimationParams, ...]:
        """The params of a row of each size of `warm`.

        Raises:
            BadParameter: the defaults and a size cannot go together.
        """
        return tuple(size.params(self.row_defaults) for size in self.warm)

    def require_safety_checkers(self) -> None:
        """Refuses a `safety` for which a model has no weights.

        Raises:
            ValueError: names the model.
        """
        for model in () if self.safety == "off" else (self.default_model_config, *self.style_models.values()):
            if model.safety_checker is None:
                raise ValueError(
                    f"safety: {self.safety} needs safety_checker in the settings of model {model.name}, such as "
                    "CompVis/stable-diffusion-safety-checker"
                )

    @property
    def max_batch_size(self) -> int:
        """Rows that denoise together where no GPU has found that more pay."""
        return DEFAULT_BATCH_SIZE if self.batch_size == "auto" else self.batch_size
