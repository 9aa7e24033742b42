"""`ModelConfig`, and named models.

Reads YAML files and nothing else: no environment variables, no network.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, BeforeValidator, Field, ValidationError, field_validator, model_validator

from pia_ray.config.acceptance import ModelBounds
from pia_ray.config.added_weights import InversionConfig, LoraConfig
from pia_ray.config.few_step import FEW_STEP, FewStep
from pia_ray.config.judge_weights import JudgeWeights
from pia_ray.config.knobs import DEFAULT_STYLE, REFERENCE_KNOBS, suggest
from pia_ray.config.resolving import parse_defaults
from pia_ray.config.settings import check_settings, message_of
from pia_ray.config.yaml_files import read_yaml
from pia_ray.errors import BadParameter, ConfigError

USER_MODELS = Path("~/.config/pia-ray/models.yaml")
"""The file in which users add named models of their own, in the form of the packaged `models.yaml`."""

_Config = TypeVar("_Config", bound=BaseModel)


def _knob_defaults(value: object) -> object:
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
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


KnobDefaults = Annotated[dict[str, Any], BeforeValidator(_knob_defaults)]
"""Values of knobs by name, checked."""


class ModelConfig(JudgeWeights):
    """The sources of a model's parts, and the settings to run it with.

    `base`, `motion_adapter` and `vae` take a Hugging Face hub id, a local folder or an s3:// prefix, each in diffusers
    layout; `base` and `vae` also a single .safetensors file, local, s3:// or on the hub as OWNER/NAME/FILE. A `base`
    whose UNet already is a `UNetMotionModel` needs no motion adapter.
    """

    name: str = Field("custom", description="What results call this model.")
    base: str = Field(description="Stable Diffusion 1.5 checkpoint, or a whole PIA pipeline.")
    revision: str | None = Field(None, description="Commit, tag or branch of a hub id; a commit lasts.")
    motion_adapter: str | None = Field(None, description="PIA's motion adapter, with its 9-channel conv_in.")
    motion_adapter_revision: str | None = Field(None, description="As revision, for the motion adapter.")
    vae: str | None = Field(None, description="VAE to use in place of the base's own.")
    vae_revision: str | None = Field(None, description="As revision, for the VAE.")
    ip_adapter: str | None = Field(
        None,
        description="IP-Adapter for Stable Diffusion 1.5, a .safetensors file: local, s3://, or OWNER/NAME/FILE on the "
        "hub, such as h94/IP-Adapter/models/ip-adapter_sd15.safetensors.",
    )
    ip_adapter_revision: str | None = Field(None, description="As revision, for the IP-Adapter.")
    image_encoder: str | None = Field(
        None,
        description="CLIP image encoder that the IP-Adapter was trained with: a folder, s3:// prefix, or "
        "OWNER/NAME/FOLDER on the hub, such as h94/IP-Adapter/models/image_encoder. Left out: rows bring embeddings.",
    )
    image_encoder_revision: str | None = Field(None, description="As revision, for the image encoder.")
    upscaler: str | None = Field(
        None, description="File of a network, such as ESRGAN, that enlarges rows with upscale. Left out: Lanczos."
    )
    upscaler_revision: str | None = Field(None, description="As revision, for the upscaler.")
    accept: ModelBounds = Field(
        (),
        description='Bounds such as "likeness_min>=0.7" that a video of this model should meet: those of runs that say '
        "`accept: model`. Changes no video.",
    )
    config: str = Field(
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        description="Folder or hub id in diffusers layout that lends configs, tokenizer and scheduler to a base or "
        "VAE given as a single file, which has none.",
    )
    config_revision: str | None = Field(None, description="As revision, for config.")
    prediction_type: Literal["auto", "epsilon", "v_prediction"] = Field(
        "auto", description="Kind of the base's predictions: auto is what the base or its scheduler's file states."
    )
    zero_snr: Literal["auto", "on", "off"] = Field(
        "auto", description="Whether the base was trained to start from noise alone (ztsnr): auto as prediction_type."
    )
    loras: dict[str, LoraConfig] = Field(
        default_factory=dict,
        description="LoRAs by name: each a path, or its path, revision, weight and `merge`, which makes it a part of "
        "the model for all rows.",
    )
    few_step: FewStep | None = Field(
        None,
        description="Kind of the few-step model that base, or a LoRA with `merge`, is. It states scheduler, steps, "
        "guidance and eta for rows and runs that do not.",
    )
    textual_inversions: dict[str, InversionConfig] = Field(
        default_factory=dict, description="Textual inversions by their token in prompts: each a path."
    )
    dtype: Literal["auto", "float32", "tf32", "float16", "bfloat16"] = Field(
        "auto",
        description="Precision of the UNet: auto is float16 on a GPU and float32 on a CPU; tf32 is float32 whose "
        "matrix products a GPU makes in TF32, and float32 on a CPU.",
    )
    vae_dtype: Literal["auto", "float32", "float16", "bfloat16"] = Field(
        "auto",
        description="Precision of the VAE: auto is that of the UNet, dtype; float32 where a VAE overflows float16.",
    )
    text_encoder_dtype: Literal["auto", "float32", "float16", "bfloat16"] = Field(
        "auto", description="Precision of the text encoder: auto is that of the UNet, dtype."
    )
    group_norm: Literal["diffusers", "original"] = Field(
        "diffusers",
        description="Over what GroupNorm takes statistics: as diffusers' UNetMotionModel does, or as PIA's own code.",
    )
    vae_tiling: Literal["auto", "on", "off"] = Field(
        "auto",
        description="Whether the VAE works in tiles of 512 px: auto above 1024 x 1024 px, on above 512 px a side.",
    )
    offload: Literal["none", "model", "sequential"] = Field(
        "none",
        description="Keep weights in host memory and only what runs on the GPU: model, one part at a time; "
        "sequential, one layer at a time, the least memory and by far the slowest.",
    )
    memory_gib: float | None = Field(
        None,
        gt=0,
        description="Most memory of the device that a worker may use, in GiB; of several models in a worker, the least "
        "counts on a GPU. Left out: what is free there, within the worker's share of the GPU.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto takes the GPU if there is one.")
    long_edge: int = Field(512, ge=16, le=2048, description="Longer side of the model's size buckets, in px.")
    size_step: int = Field(64, ge=8, le=256, description="Bucket sides are multiples of this, in px.")
    compile: Literal["auto", "off", "default", "reduce-overhead", "max-autotune"] = Field(
        "auto",
        description="torch.compile's mode for the UNet and the VAE's decoder; rows run uncompiled meanwhile. auto: "
        "torch's default mode, for sizes where that pays in the rows that are left; on a CPU only if another mode has "
        "measured a gain there.",
    )
    compile_cache: str | None = Field(
        None,
        description="Local folder that keeps compiled code, for the next process to compile in seconds; workers may "
        "share it. A user who may write to it runs code in them. Left out: beside fetched weights; off: none.",
    )
    allow_pickle: bool = Field(
        False, description="Also load .bin checkpoints (weights only). safetensors alone is the safe default."
    )
    defaults: KnobDefaults = Field(default_factory=dict, description="The model's own values of knobs.")
    description: str = Field("", description="One line for `pia-ray models`.")

    @field_validator("compile_cache", mode="before")
    @classmethod
    def _cache_off(cls, value: object) -> object:
        return "off" if value is False else value  # as YAML reads a bare off

    @field_validator("long_edge", "size_step")
    @classmethod
    def _eights(cls, value: int) -> int:
        if value % 8:
            raise ValueError("must be a multiple of 8")
        return value

    @field_validator("defaults")
    @classmethod
    def _no_style(cls, value: dict[str, Any]) -> dict[str, Any]:
        if "style" in value:
            raise ValueError("style names a model, so no model can have one as its default")
        return value

    @field_validator("loras")
    @classmethod
    def _lora_names(cls, value: dict[str, LoraConfig]) -> dict[str, LoraConfig]:
        for name in value:
            if re.fullmatch(r"[^\s+:<>,]([^+:<>,]*[^\s+:<>,])?", name) is None or name.lower() in ("default", "none"):
                raise ValueError(
                    f'"{name}" cannot be the name of a LoRA: take any characters but + : < > and commas, '
                    "and neither default nor none"
                )
        names = {name.lower(): lora for name, lora in value.items()}
        if len(names) < len(value):
            raise ValueError("two LoRAs have names that differ in the case of their letters alone")
        return names

    @field_validator("textual_inversions")
    @classmethod
    def _tokens(cls, value: dict[str, InversionConfig]) -> dict[str, InversionConfig]:
        for token in value:
            if re.fullmatch(r"\S+", token) is None:
                raise ValueError(f'"{token}" cannot be the token of a textual inversion: it must be one word')
        return value

    @model_validator(mode="after")
    def _whole_weights(self) -> ModelConfig:
        if self.offload == "sequential" and self.lora_weights:
            raise ValueError(
                "offload sequential leaves no weights for the loras of single rows to be merged into: take offload "
                "model, or `merge` for each of them"
            )
        return self

    @model_validator(mode="after")
    def _together(self) -> ModelConfig:
        if self.long_edge % self.size_step:
            raise ValueError("long_edge must be a multiple of size_step")
        if self.image_encoder is not None and self.ip_adapter is None:
            raise ValueError("image_encoder needs an ip_adapter: give both, or neither")
        return self

    @property
    def lora_weights(self) -> dict[str, float]:
        """The strength, for rows that name none, of each LoRA that rows may choose, by name."""
        return {name: lora.weight for name, lora in self.loras.items() if not lora.merge}

    @property
    def sampling(self) -> dict[str, Any]:
        """The knobs of a few-step model, which count where its defaults do not state them; empty for other models."""
        stated = FEW_STEP[self.few_step] if self.few_step is not None else {}
        return {knob: self.defaults.get(knob, value) for knob, value in stated.items()}

    @property
    def on_gpu(self) -> ModelConfig:
        """The same model for a worker that has been given a GPU: where `device` is auto, a CPU is no substitute."""
        return self.model_copy(update={"device": "cuda"}) if self.device == "auto" else self

    @staticmethod
    def named(name: str) -> ModelConfig:
        """The model of that name, from the user's `models.yaml` or the packaged one.

        Raises:
            ConfigError: no such name; lists those there are.
        """
        models = named_models()
        if name not in models:
            raise ConfigError(
                f'there is no model "{name}".{suggest(name, models)} Known: {", ".join(models)}; '
                f"or give a YAML file. Add your own in {USER_MODELS}."
            )
        return models[name]


def load_models(value: object) -> object:
    """Models by name with names and files of them replaced by what they stand for; the rest is left to pydantic.

    Raises:
        ValueError: a name cannot be one.
        ConfigError: there is no such model.
    """
    if not isinstance(value, Mapping):
        return value
    models = {}
    for name, model in value.items():
        check_style_name(name)
        if isinstance(model, Mapping):
            model = {"name": name, **model}
        models[name] = load_model(model) if isinstance(model, str) else model
    return models


def model_for(style: str, model: ModelConfig, styles: Mapping[str, ModelConfig]) -> ModelConfig:
    """The model of that style, where `model` is the one of rows without a style.

    Raises:
        BadParameter: there is no such style; lists those there are.
    """
    if style == DEFAULT_STYLE:
        return model
    if style not in styles:
        known = [DEFAULT_STYLE, *styles]
        raise BadParameter(
            f'style must be one of {", ".join(known)} (got "{style}").{suggest(style, known)} '
            "Styles are named in the run's config file or by --styles NAME=MODEL.",
            "style",
        )
    return styles[style]


def check_style_name(name: object) -> None:
    """Refuses names that a row could not ask for, or that mean something already.

    Raises:
        ValueError: says what is wrong with the name.
    """
    if not isinstance(name, str) or re.fullmatch(r"[^\s=,]([^=,\n]{0,62}[^\s=,])?", name) is None:
        raise ValueError(f"{name!r} cannot be a style's name: use 1 to 64 characters without = and comma")
    if name == DEFAULT_STYLE:
        raise ValueError(f'"{DEFAULT_STYLE}" is the style of rows that `model` animates: choose another name')


def parse_styles(texts: Iterable[str], *, setting: str = "--styles") -> dict[str, str]:
    """The models of style flags by name; `setting` is their name in messages.

    Each is `NAME=MODEL`, or `NAME` alone for the model of that name; several are parted by commas.

    Raises:
        ConfigError: a name is missing or occurs twice.
    """
    models: dict[str, str] = {}
    for text in texts:
        for part in text.split(","):
            name, _, model = (piece.strip() for piece in part.partition("="))
            if not name or (not model and "=" in part):
                raise ConfigError(
                    f'{setting}: write NAME=MODEL, where MODEL is a named model or a YAML file (got "{text}")'
                )
            if name in models:
                raise ConfigError(f'{setting}: there are two models for "{name}"')
            models[name] = model or name
    return models


def build(kind: type[_Config], values: Mapping[str, Any], *, source: str = "") -> _Config:
    """A config of that kind from plain values.

    Raises:
        ConfigError: names the key, with the nearest known one where it is misspelt, and `source` (a file) if given.
    """
    check_settings(kind, values, source=source)
    try:
        return kind.model_validate(dict(values))
    except ValidationError as error:
        raise ConfigError(f"{source}: {message_of(error, kind)}" if source else message_of(error, kind)) from None


def load_model(name_or_file: str) -> ModelConfig:
    """A named model, or the one of a YAML file, which its extension shows.

    Raises:
        ConfigError: no such name or file, or a wrong setting in it.
    """
    if name_or_file.endswith((".yaml", ".yml")):
        values = read_yaml(name_or_file)
        values.setdefault("name", Path(name_or_file).stem)
        return build(ModelConfig, values, source=name_or_file)
    return ModelConfig.named(name_or_file)


def model_file(model: ModelConfig) -> str:
    """The model as a YAML file that `load_model` reads."""
    return yaml.safe_dump(model.model_dump(mode="json", exclude_defaults=True), sort_keys=False, allow_unicode=True)


def named_models(user_file: Path = USER_MODELS) -> dict[str, ModelConfig]:
    """Every model by name; the user's file wins over the packaged one.

    Raises:
        ConfigError: the user's file is wrong.
    """
    tables = {
        "the packaged models.yaml": yaml.safe_load(files("pia_ray.config").joinpath("models.yaml").read_text("utf-8"))
    }
    own = Path(os.path.expanduser(user_file))  # noqa: PTH111 - Path's own raises where there is no home folder
    if own.exists():
        tables[str(own)] = read_yaml(own)
    models: dict[str, ModelConfig] = {}
    for source, table in tables.items():
        for name, values in table.items():
            if not isinstance(values, dict):
                raise ConfigError(f"{source}: {name} must be a mapping of settings to values")
            models[name] = build(ModelConfig, {"name": name, **values}, source=f"{source}: {name}")
    return models
