"""Frozen configuration models, built once at the edge and passed whole; named models; `load` for files.

Reads YAML files and nothing else: no environment variables, no network.
"""

from __future__ import annotations

import codecs
import math
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Literal

from pydantic import (
    Field,
    SecretStr,
    field_validator,
    model_validator,
)

from pia_ray.config.acceptance import MODEL_BOUNDS, MOST_RETAKES, Bounds, parse_bounds
from pia_ray.config.fetching import FetchConfig
from pia_ray.config.knob_types import VideoFormat
from pia_ray.config.knobs import DEFAULT_STYLE, AnimationParams, suggest
from pia_ray.config.lists import Networks, parts_of
from pia_ray.config.marking import MarkingConfig
from pia_ray.config.model import (
    KnobDefaults,
    ModelConfig,
    build,
    load_model,
    load_models,
    model_for,
)
from pia_ray.config.resolving import lora_strengths
from pia_ray.config.settings import check_settings
from pia_ray.config.workers import (
    DEFAULT_PREFETCH,
    MAX_AUTO_BATCH_SIZE,
    MAX_AUTO_PREFETCH,
    Prefetch,
    WorkerConfig,
)
from pia_ray.config.yaml_files import read_yaml
from pia_ray.errors import BadParameter, ConfigError, row_errors

_MAX_FAILURES: Final = re.compile(r"\d{1,9}|(\d{1,2}(\.\d+)?|100)%")

_NO_DELIMITERS: Final = frozenset('"\r\n\0')

MOST_PARTITIONS: Final = 1024

RETRY_ALL: Final = "failed"
"""Stands for every error code in `CatalogConfig.retry`."""

MISSING: Final = "missing"
DAMAGED: Final = "damaged"
"""The kinds of videos in `CatalogConfig.remake`; of another size than its row's, a video is damaged too."""


class CatalogConfig(WorkerConfig, FetchConfig, MarkingConfig):
    """One catalogue run: what to animate, where to put it, on how many workers."""

    manifest: str | tuple[str, ...] = Field(
        description="File, folder, glob or folder of images, or a list of these; local, s3:// or by fsspec."
    )
    output: str = Field(description="Folder or s3:// prefix for videos, results and gallery.")
    model: ModelConfig = Field(description="Name of a model, YAML file of one, or its settings.")
    styles: dict[str, ModelConfig] = Field(
        default_factory=dict,
        description="More models by name, for rows that ask for one in style: each a name, a YAML file or settings.",
    )
    defaults: KnobDefaults = Field(default_factory=dict, description="Knobs for rows that leave them out.")
    format: VideoFormat = Field("mp4", description="Format of the videos.")
    id_col: str | None = Field(
        None, description="Column that holds the id, or a template of columns such as `{sku}-{color}`."
    )
    image_col: str | None = Field(None, description="Column that holds the image.")
    prompt_col: str | None = Field(None, description="Column that holds the prompt.")
    knobs: tuple[str, ...] | None = Field(
        None, description='The columns that are knobs, and no others; "none" for none. Left out: those named as knobs.'
    )
    not_knobs: tuple[str, ...] = Field((), description="Columns that pass through though they are named as knobs.")
    delimiter: str | None = Field(
        None,
        min_length=1,
        max_length=1,
        description="Character between the cells of CSV. Left out: found by the header.",
    )
    encoding: str | None = Field(
        None, description="Encoding of CSV and JSON files, such as cp1252. Left out: UTF-8, or UTF-16 where it shows."
    )
    pictures: Literal["all", "first"] = Field(
        "all", description="Of rows and products with several pictures: a work item for each, or for the first."
    )
    limit: int | None = Field(None, ge=1, description="Only the first so many rows of the manifest.")
    sample: int | None = Field(
        None,
        ge=1,
        description="Only so many work items, drawn from all rows by their keys; the run without it keeps them.",
    )
    partition: str | None = Field(
        None, description="K/N, such as 3/16: only that share of the work items; N runs with the same output make all."
    )
    accept: Bounds = Field(
        (),
        description='Bounds that a video must meet, such as "likeness_min>=0.7"; "model" stands for the model\'s own.',
    )
    retakes: int = Field(
        0, ge=0, le=MOST_RETAKES, description="Times that a row whose video misses a bound is animated again."
    )
    unaccepted: Literal["keep", "fail"] = Field(
        "keep", description="Rows whose takes all miss: keep the best video, or fail with not_accepted, without video."
    )
    review: str | None = Field(
        None,
        description="CSV file of verdicts from the gallery: approved videos stay, rejected ones are taken again.",
    )
    retry: tuple[str, ...] = Field((), description='"failed", or error codes of failed rows to try again.')
    remake: tuple[str, ...] = Field(
        (), description='"missing", "damaged" or both: succeeded rows whose video is so are made again.'
    )
    detect_changes: bool = Field(
        False, description="Let a picture's ETag, or size and time of change, count towards its work key."
    )
    actors: tuple[int, int] | None = Field(
        None, description="Least and most workers. Left out: one per GPU, or one on a machine without."
    )
    gpus_per_actor: float | None = Field(
        None,
        ge=0,
        le=8,
        description="GPUs per worker, or a share of one and its memory. Left out: 1 where there are GPUs, else 0.",
    )
    cpus_per_actor: float = Field(1.0, ge=0, le=64, description="CPU cores reserved per worker.")
    prefetch: Prefetch = Field(
        "auto",
        description="Rows fetched or encoded while others denoise, per worker; auto is 2, and up to 16 while an engine "
        "waits for rows.",
    )
    max_attempts: int = Field(3, ge=1, le=100, description="Tries of a row whose worker dies, or that may be retried.")
    patience_s: float = Field(
        900.0, ge=0, description="Seconds to wait for a store, hub or picture host that is away, then stop, resumable."
    )
    max_failures: str | None = Field(
        None, description="Most rows that may fail, as 100 or 5% of those to do; the run stops beyond. Left out: any."
    )
    deadline_s: float | None = Field(None, gt=0, description="Seconds after which the run stops, resumable.")
    grace_s: float | None = Field(
        None,
        ge=0,
        description="Seconds that rows which denoise at a stop have to end. Left out: 60, or 25 in a container, which "
        "is killed after 30.",
    )
    row_timeout_s: float = Field(3600.0, gt=0, description="Seconds after which a row in the engine fails.")
    hang_timeout_s: float = Field(
        120.0,
        gt=0,
        description="Seconds past row_timeout_s after which an engine that does not answer is replaced.",
    )
    fetch_timeout_s: float = Field(
        600.0, gt=0, description="Seconds that reading and decoding a row's pictures may take."
    )
    publish_timeout_s: float = Field(
        600.0, gt=0, description="Seconds that encoding a row's video may take, and writing it."
    )
    max_image_bytes: int = Field(50_000_000, ge=1, description="Larger image files are refused, unread.")
    max_image_pixels: int = Field(200_000_000, ge=1, description="Larger images are refused, undecoded.")
    max_image_side: int = Field(65_535, ge=32, description="Images with a longer side, in px, are refused.")
    max_image_aspect: float = Field(
        20.0, ge=1, description="Images whose longer side is more times the shorter are refused."
    )
    on_end: str | None = Field(
        None, description="URL to which the run's summary is posted when it ends or stops for trouble."
    )
    on_end_secret: SecretStr | None = Field(
        None, description="whsec_... with which that post is signed, or a file that holds it."
    )
    on_end_networks: Networks = Field(
        (), description="Networks such as 10.0.0.0/8 that on_end may lead to though not public, also by http://."
    )
    address: str | None = Field(None, description="Ray cluster to join. Left out: a cluster of this run's own.")

    @property
    def manifests(self) -> tuple[str, ...]:
        """The manifests of the run, mostly one."""
        return (self.manifest,) if isinstance(self.manifest, str) else self.manifest

    @property
    def gpu_share(self) -> float:
        """The share of one GPU that each has; 1 for one GPU or more, and where none is asked for."""
        return min(self.gpus_per_actor or 1.0, 1.0)

    @property
    def row_defaults(self) -> Mapping[str, Any]:
        """The run's defaults."""
        return self.defaults

    @property
    def default_model_config(self) -> ModelConfig:
        """The run's own model."""
        return self.model

    @property
    def style_models(self) -> Mapping[str, ModelConfig]:
        """The models of `styles`."""
        return self.styles

    def most_failures(self, num_pending: int) -> float:
        """The number of failed rows beyond which a run with so many rows to do stops."""
        if self.max_failures is None:
            return math.inf
        if self.max_failures.endswith("%"):
            return num_pending * float(self.max_failures.removesuffix("%")) / 100
        return int(self.max_failures)

    @property
    def partition_of(self) -> tuple[int, int]:
        """Number of the partition, from 1, and of how many; the whole is 1 of 1."""
        number, _, of = (self.partition or "1/1").partition("/")
        return int(number), int(of)

    def concurrent_rows(self, gpus: float = 0.0) -> int:
        """Rows that a worker with so many GPUs works on at once, at first: denoising, and fetched or published."""
        most = MAX_AUTO_BATCH_SIZE if gpus and self.batch_size == "auto" else self.max_batch_size
        return most + self.prefetch_range[0]

    @property
    def prefetch_range(self) -> tuple[int, int]:
        """Least and most rows that are fetched or published while others denoise."""
        return (DEFAULT_PREFETCH, MAX_AUTO_PREFETCH) if self.prefetch == "auto" else (self.prefetch, self.prefetch)

    @model_validator(mode="after")
    def _known_style_and_loras(self) -> CatalogConfig:
        """Refuses what no row could run with: a default style or LoRA that none of the run's models has."""
        loras = {name: 1.0 for model in (self.model, *self.styles.values()) for name in model.lora_weights}
        try:
            self.model_for(self.defaults.get("style", DEFAULT_STYLE))
            lora_strengths(AnimationParams(prompt="-", lora=self.defaults.get("lora", "default")), loras)
        except BadParameter as error:
            raise ValueError(error.message) from None
        self.require_safety_checkers()
        return self

    @model_validator(mode="after")
    def _bounds_that_a_video_can_meet(self) -> CatalogConfig:
        own = [text for text in self.accept if text.strip() != MODEL_BOUNDS]
        for model in (self.model, *self.styles.values()) if len(own) < len(self.accept) else ():
            try:
                parse_bounds([*model.accept, *own])
            except ValueError as error:
                raise ValueError(f"accept, with the bounds of {model.name}: {error}") from None
        return self

    def model_for(self, style: str) -> ModelConfig:
        """The model that animates rows of that style.

        Raises:
            BadParameter: there is no such style; lists those there are.
        """
        return model_for(style, self.model, self.styles)

    @field_validator("manifest", mode="before")
    @classmethod
    def _one_or_several(cls, value: object) -> object:
        # Empty text is for `build_processor`, which reads no manifest.
        if value != "" and (not value or not isinstance(value, str | tuple | list)):
            raise ValueError("must be a file or folder, or a list of them")
        if not isinstance(value, str):
            return value[0] if len(value) == 1 else tuple(value)
        return value

    @field_validator("model", mode="before")
    @classmethod
    def _named(cls, value: object) -> object:
        return load_model(value) if isinstance(value, str) else value

    @field_validator("styles", mode="before")
    @classmethod
    def _styles(cls, value: object) -> object:
        return load_models(value)

    @field_validator("actors", mode="before")
    @classmethod
    def _range(cls, value: object) -> object:
        if value is None:
            return None
        if isinstance(value, str):
            low, _, high = value.partition(":")
            if not low.isdigit() or (high and not high.isdigit()):
                raise ValueError('must be a number or MIN:MAX, such as "4" or "1:8"')
            value = (int(low), int(high or low))
        elif type(value) is int:
            value = (value, value)
        if not isinstance(value, tuple | list) or len(value) != 2 or not all(type(each) is int for each in value):
            raise ValueError('must be a number or MIN:MAX, such as "4" or "1:8"')
        if not 1 <= value[0] <= value[1]:
            raise ValueError("must be at least 1, and the least not above the most")
        return value

    @field_validator("delimiter", mode="before")
    @classmethod
    def _character(cls, value: object) -> object:
        if isinstance(value, str) and value in _NO_DELIMITERS:
            raise ValueError('must be a character that no cell is written in, such as ";" or tab')
        return {"tab": "\t", "\\t": "\t"}.get(value, value) if isinstance(value, str) else value

    @field_validator("encoding")
    @classmethod
    def _known_encoding(cls, value: str | None) -> str | None:
        try:
            if value is not None:
                "a".encode(value)  # base64, rot13 and undefined are codecs, but no encodings of text
            return None if value is None else codecs.lookup(value).name
        except (LookupError, UnicodeError):
            raise ValueError("must be an encoding that Python knows, such as utf-8, utf-16 or cp1252") from None

    @field_validator("knobs", "not_knobs", mode="before")
    @classmethod
    def _names(cls, value: object) -> object:
        names = parts_of(value)
        return () if names == ("none",) else names

    @field_validator("partition")
    @classmethod
    def _share(cls, value: str | None) -> str | None:
        if value is None:
            return None
        number, _, of = value.partition("/")
        if not (number.isdecimal() and of.isdecimal() and 1 <= int(number) <= int(of) <= MOST_PARTITIONS):
            raise ValueError(f"{value!r} is not K/N with 1 <= K <= N <= {MOST_PARTITIONS}, such as 3/16")
        return f"{int(number)}/{int(of)}"

    @field_validator("max_failures", mode="before")
    @classmethod
    def _number_or_share(cls, value: object) -> object:
        text = value if value is None else str(value).strip()
        if text is not None and _MAX_FAILURES.fullmatch(text) is None:
            raise ValueError('must be a number of rows or a share of them, such as "100" or "5%"')
        return text

    @field_validator("retry", mode="before")
    @classmethod
    def _codes(cls, value: object) -> object:
        value = parts_of(value)
        if isinstance(value, tuple | list):
            known = {RETRY_ALL, *row_errors()}
            for code in map(str, value):
                if code not in known:
                    # It would match no row, and the run would end as if there was nothing to do.
                    raise ValueError(f'must be "{RETRY_ALL}" or error codes.{suggest(code, known)}'.rstrip("."))
        return value

    @field_validator("remake", mode="before")
    @classmethod
    def _findings(cls, value: object) -> object:
        value = parts_of(value)
        if isinstance(value, tuple | list) and not {MISSING, DAMAGED}.issuperset(map(str, value)):
            raise ValueError(f'must be "{MISSING}", "{DAMAGED}" or both with a comma between')
        return value


def load(
    path: str | Path | None, overrides: Mapping[str, Any], *, fallbacks: Mapping[str, Any] = MappingProxyType({})
) -> CatalogConfig:
    """The catalogue config of a YAML file with `overrides` on top; `defaults` and `styles` are merged one by one.

    `fallbacks` count for settings that are in neither.

    Raises:
        ConfigError: the file or a value is wrong.
    """
    values = read_yaml(path) if path is not None else {}
    source = str(path) if path is not None else ""
    # Before what is missing: a misspelt setting is mostly the one that then is.
    check_settings(CatalogConfig, values, source=source)
    merged = {**fallbacks, **values, **overrides}
    for name in ("defaults", "styles"):
        if isinstance(values.get(name), dict) and name in overrides:
            merged[name] = {**values[name], **overrides[name]}
    merged.setdefault("model", "realistic-vision")
    for key in ("manifest", "output"):
        if merged.get(key) in (None, ""):
            raise ConfigError(f"{key} is missing: give it on the command line or in the config file")
    return build(CatalogConfig, merged, source=source)
