"""Frozen configuration models, built once at the edge and passed whole; named models; `load` for files.

Reads YAML files and nothing else: no environment variables, no network.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Iterator, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)

from pia_ray.errors import BadParameter, ConfigError, RowError
from pia_ray.params import (
    DEFAULT_STYLE,
    REFERENCE_KNOBS,
    AnimationParams,
    VideoFormat,
    lora_strengths,
    parse_defaults,
    suggest,
)

USER_MODELS = Path("~/.config/pia-ray/models.yaml")
"""Where users add named models of their own, in the form of the packaged `models.yaml`."""

DEFAULT_BATCH_SIZE = 4
"""Rows that denoise together where `batch_size` is "auto": on a CPU always, on a GPU at first."""

MOST_ROWS = 8
"""Most rows that denoise together where `batch_size` is "auto" and a GPU finds that more pay."""

DEFAULT_KEEP_MODELS = 2
"""Models that one animator keeps in memory: one at work, and the next one loading beside it."""

_Config = TypeVar("_Config", "ModelConfig", "CatalogConfig", "ServeConfig")


def _defaults(value: object) -> object:
    if not isinstance(value, Mapping):
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


_Defaults = Annotated[dict[str, Any], BeforeValidator(_defaults)]


class InversionConfig(BaseModel):
    """Where a textual inversion comes from; the path alone will do."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str = Field(description="A .safetensors file: local, s3://, or on the hub as OWNER/NAME/FILE.")
    revision: str | None = Field(None, description="Commit, tag or branch, where it is on the hub.")

    @model_validator(mode="before")
    @classmethod
    def _path_alone(cls, value: object) -> object:
        return {"path": value} if isinstance(value, str) else value


class LoraConfig(InversionConfig):
    """Where a LoRA comes from and how strongly it acts on rows that do not choose; the path alone will do."""

    weight: float = Field(
        1.0, ge=-10, le=10, description="Its strength for rows that name none. 0: acts only on rows that name it."
    )


class ModelConfig(BaseModel):
    """Where a model's parts come from and how it likes to be run.

    `base`, `motion_adapter` and `vae` take a Hugging Face hub id, a local folder or an s3:// prefix, each in diffusers
    layout; `base` and `vae` also a single .safetensors file, local, s3:// or on the hub as OWNER/NAME/FILE. A `base`
    whose UNet already is a `UNetMotionModel` needs no motion adapter.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

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
    config: str = Field(
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        description="Folder or hub id in diffusers layout that lends configs, tokenizer and scheduler to a base or "
        "VAE given as a single file, which has none.",
    )
    config_revision: str | None = Field(None, description="As revision, for config.")
    loras: dict[str, LoraConfig] = Field(
        default_factory=dict, description="LoRAs by name: each a path, or its path, revision and weight."
    )
    textual_inversions: dict[str, InversionConfig] = Field(
        default_factory=dict, description="Textual inversions by their token in prompts: each a path."
    )
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = Field(
        "auto", description="Precision of the UNet: auto is float16 on a GPU and float32 on a CPU."
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
        "counts on a GPU. Left out: what is free there.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto takes the GPU if there is one.")
    long_edge: int = Field(512, ge=16, le=2048, description="Longer side of the model's size buckets, in px.")
    size_step: int = Field(64, ge=8, le=256, description="Bucket sides are multiples of this, in px.")
    compile: Literal["auto", "off", "default", "reduce-overhead", "max-autotune"] = Field(
        "auto",
        description="torch.compile's mode for the UNet: auto is default on a GPU with Triton and off on a CPU. The "
        "first rows of each size wait for it.",
    )
    compile_cache: str | None = Field(
        None,
        description="Local folder that keeps compiled code, for the next process to compile in seconds; workers may "
        "share it. Whoever may write to it runs code in them.",
    )
    allow_pickle: bool = Field(
        False, description="Also load .bin checkpoints (weights only). safetensors alone is the safe default."
    )
    defaults: _Defaults = Field(default_factory=dict, description="The model's own values of knobs.")
    description: str = Field("", description="One line for `pia-ray models`.")

    @field_validator("vae_tiling", mode="before")
    @classmethod
    def _switch(cls, value: object) -> object:
        # YAML reads a bare on or off as a truth value.
        return {True: "on", False: "off"}[value] if isinstance(value, bool) else value

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
            if re.fullmatch(r"[a-z0-9][a-z0-9._-]*", name) is None or name in ("default", "none"):
                raise ValueError(
                    f'"{name}" cannot be the name of a LoRA: take lower-case letters, digits and . _ -, '
                    "and neither default nor none"
                )
        return value

    @field_validator("textual_inversions")
    @classmethod
    def _tokens(cls, value: dict[str, InversionConfig]) -> dict[str, InversionConfig]:
        for token in value:
            if re.fullmatch(r"\S+", token) is None:
                raise ValueError(f'"{token}" cannot be the token of a textual inversion: it must be one word')
        return value

    @model_validator(mode="after")
    def _whole_weights(self) -> ModelConfig:
        if self.offload == "sequential" and self.loras:
            raise ValueError("offload sequential leaves no weights for loras to be merged into: take offload model")
        return self

    @model_validator(mode="after")
    def _together(self) -> ModelConfig:
        if self.long_edge % self.size_step:
            raise ValueError("long_edge must be a multiple of size_step")
        if self.image_encoder is not None and self.ip_adapter is None:
            raise ValueError("image_encoder is for an ip_adapter, and there is none: give both, or neither")
        return self

    @property
    def lora_weights(self) -> dict[str, float]:
        """The strength of each LoRA for rows that name none, by name."""
        return {name: lora.weight for name, lora in self.loras.items()}

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


class CatalogConfig(BaseModel):
    """One catalogue run: what to animate, where to put it, on how many workers."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    manifest: str = Field(description="File, folder, glob or folder of images; local or s3://.")
    output: str = Field(description="Folder or s3:// prefix for videos, results and gallery.")
    model: ModelConfig = Field(description="Name of a model, YAML file of one, or its settings.")
    styles: dict[str, ModelConfig] = Field(
        default_factory=dict,
        description="More models by name, for rows that ask for one in style: each a name, a YAML file or settings.",
    )
    keep_models: int = Field(
        DEFAULT_KEEP_MODELS,
        ge=1,
        le=64,
        description="Models that a worker keeps in memory; the least recently used goes first.",
    )
    defaults: _Defaults = Field(default_factory=dict, description="Knobs for rows that leave them out.")
    format: VideoFormat = Field("mp4", description="Format of the videos.")
    id_col: str | None = Field(None, description="Column that holds the id.")
    image_col: str | None = Field(None, description="Column that holds the image.")
    prompt_col: str | None = Field(None, description="Column that holds the prompt.")
    limit: int | None = Field(None, ge=1, description="Only the first so many rows of the manifest.")
    retry: tuple[str, ...] = Field((), description='"failed", or error codes of failed rows to try again.')
    detect_changes: bool = Field(
        False, description="Let a picture's ETag, or size and time of change, count towards its work key."
    )
    actors: tuple[int, int] | None = Field(
        None, description="Least and most workers. Left out: one per GPU, or one on a machine without."
    )
    gpus_per_actor: float | None = Field(
        None, ge=0, le=8, description="GPUs (or a share of one) per worker. Left out: 1 where there are GPUs, else 0."
    )
    cpus_per_actor: float = Field(1.0, ge=0, le=64, description="CPU cores reserved per worker.")
    batch_size: int | Literal["auto"] = Field(
        "auto",
        description="Rows that denoise together in one worker; auto is 4 on a CPU, and on a GPU what pays, up to 8.",
    )
    prefetch: int = Field(2, ge=0, le=64, description="Rows fetched or encoded beside those that denoise, per worker.")
    max_attempts: int = Field(3, ge=1, le=100, description="Tries of a row whose worker dies, or that may be retried.")
    deadline_s: float | None = Field(None, gt=0, description="Seconds after which the run stops, resumable.")
    row_timeout_s: float = Field(3600.0, gt=0, description="Seconds after which a row in the engine fails.")
    background: str = Field("#ffffff", description="Colour under transparent pictures.")
    max_image_bytes: int = Field(50_000_000, ge=1, description="Larger image files are refused, unread.")
    max_image_pixels: int = Field(64_000_000, ge=1, description="Larger images are refused, undecoded.")
    address: str | None = Field(None, description="Ray cluster to join. Left out: a cluster of this run's own.")

    def rows_at_once(self, gpus: float = 0.0) -> int:
        """Rows that a worker with so many GPUs has in hand: those that may denoise together, and beside them those
        fetched or published."""
        most = MOST_ROWS if gpus else DEFAULT_BATCH_SIZE
        return (most if self.batch_size == "auto" else self.batch_size) + self.prefetch

    @model_validator(mode="after")
    def _known_style_and_loras(self) -> CatalogConfig:
        """Refuses what no row could run with: a default style or LoRA that none of the run's models has."""
        loras = {name: 1.0 for model in (self.model, *self.styles.values()) for name in model.loras}
        try:
            self.model_for(self.defaults.get("style", DEFAULT_STYLE))
            lora_strengths(AnimationParams(prompt="-", lora=self.defaults.get("lora", "default")), loras)
        except BadParameter as error:
            raise ValueError(error.message) from None
        return self

    def model_for(self, style: str) -> ModelConfig:
        """The model that animates rows of that style.

        Raises:
            BadParameter: there is no such style; lists those there are.
        """
        return model_for(style, self.model, self.styles)

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
        if isinstance(value, str):
            low, _, high = value.partition(":")
            if not low.isdigit() or (high and not high.isdigit()):
                raise ValueError('must be a number or MIN:MAX, such as "4" or "1:8"')
            value = (int(low), int(high or low))
        elif isinstance(value, int):
            value = (value, value)
        if isinstance(value, tuple | list) and len(value) == 2 and not 1 <= value[0] <= value[1]:
            raise ValueError("must be at least 1, and the least not above the most")
        return value

    @field_validator("batch_size", mode="before")
    @classmethod
    def _batch(cls, value: object) -> object:
        return _batch_size(value)

    @field_validator("background")
    @classmethod
    def _colour(cls, value: str) -> str:
        return _hex_colour(value)

    @field_validator("retry", mode="before")
    @classmethod
    def _codes(cls, value: object) -> object:
        if isinstance(value, str):
            value = tuple(part.strip() for part in value.split(",") if part.strip())
        if isinstance(value, tuple | list):
            known = {"failed", "bad_manifest_row", *_codes_below(RowError)}
            for code in value:
                if code not in known:
                    # It would match no row, and the run would end as if there was nothing to do.
                    raise ValueError(f'must be "failed" or error codes.{suggest(str(code), known)}'.rstrip("."))
        return value


class ServeConfig(BaseModel):
    """The online endpoint: its models, its limits, and how Ray Serve runs it.

    Everyone may call an endpoint on a loopback address. Bound wider it needs `api_keys`, or says `allow_anonymous`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    models: dict[str, ModelConfig] = Field(
        description="Models by the name that requests use: each a named model, a YAML file or settings."
    )
    default_model: str = Field("", description="The model of requests that name none. Left out: the first.")
    keep_models: int = Field(
        DEFAULT_KEEP_MODELS, ge=1, le=64, description="Models that a replica keeps in memory; as for a catalogue."
    )
    storage: str = Field(
        "./pia-ray-serve", description="Folder (one host) or s3:// prefix (many) for video jobs and their videos."
    )
    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")

    api_keys: tuple[str, ...] | str = Field(
        (), description="sha256 of each key in hex, or a file of such lines, which is read again when it changes."
    )
    allow_anonymous: bool = Field(False, description="Let callers without a key in, also from other hosts.")
    webhook_secret: SecretStr | None = Field(None, description="whsec_... with which webhooks are signed.")
    metrics_token: SecretStr | None = Field(None, description="Bearer token for /metrics; without it, loopback only.")

    max_body_bytes: int = Field(64_000_000, ge=1, description="Larger request bodies are refused, unread.")
    max_image_bytes: int = Field(20_000_000, ge=1, description="Larger image files are refused.")
    max_image_pixels: int = Field(40_000_000, ge=1, description="Larger images are refused, undecoded.")
    max_frames: int = Field(64, ge=1, description="Most frames of a video.")
    max_steps: int = Field(100, ge=1, description="Most inference steps of a video.")
    max_jobs_per_key: int = Field(32, ge=1, description="Video jobs that a key may have open at once.")
    max_waiting: int = Field(16, ge=0, description="Requests that wait in a replica beside those that denoise.")
    requests_per_minute: int = Field(600, ge=1, description="Calls of one key (or address, without keys) per minute.")
    sync_timeout_s: float = Field(300.0, gt=0, description="Seconds after which a synchronous call fails.")
    job_timeout_s: float = Field(3600.0, gt=0, description="Seconds in an engine after which a video job fails.")
    job_ttl_s: float = Field(86_400.0, gt=0, description="Seconds that a finished video job is kept.")
    max_attempts: int = Field(3, ge=1, le=100, description="Tries of a video job whose replica dies.")
    body_timeout_s: float = Field(120.0, gt=0, description="Seconds that a request's body may take to arrive.")
    stall_timeout_s: float = Field(
        900.0,
        gt=0,
        description="Seconds without a step, in an engine that has requests, after which it is replaced; above the "
        "time that a model takes to load.",
    )

    min_replicas: int = Field(1, ge=0, description="Least engines; 0 lets the GPUs go while nobody asks.")
    max_replicas: int = Field(1, ge=1, description="Most engines.")
    target_ongoing_requests: float | None = Field(
        None, gt=0, description="Requests per engine that autoscaling aims at. Left out: batch_size."
    )
    upscale_delay_s: float = Field(10.0, ge=0, description="Seconds of load before an engine is added.")
    downscale_delay_s: float = Field(600.0, ge=0, description="Seconds of idleness before an engine is let go.")
    graceful_shutdown_s: float = Field(
        3900.0, gt=0, description="Seconds that an engine may take to finish what it has; above job_timeout_s."
    )
    gpus_per_replica: float | None = Field(
        None, ge=0, le=8, description="GPUs (or a share of one) per engine. Left out: 1 where there are GPUs, else 0."
    )
    cpus_per_replica: float = Field(1.0, ge=0, le=64, description="CPU cores reserved per engine.")
    batch_size: int | Literal["auto"] = Field(
        "auto",
        description="Requests that denoise together in one engine; auto is 4, and on a GPU up to 8 where that pays. "
        "Limits and autoscaling count with 4.",
    )
    background: str = Field("#ffffff", description="Colour under transparent pictures.")
    deployment_config: dict[str, Any] = Field(
        default_factory=dict, description="Ray Serve's options for the engines, over those that follow from the above."
    )
    ingress_deployment_config: dict[str, Any] = Field(
        default_factory=dict, description="The same for the HTTP ingress, such as num_replicas."
    )

    @property
    def rows_at_once(self) -> int:
        """Requests that denoise together in one engine, as limits and autoscaling count them."""
        return DEFAULT_BATCH_SIZE if self.batch_size == "auto" else self.batch_size

    @property
    def needs_key(self) -> bool:
        """Whether callers must show an API key."""
        return bool(self.api_keys)

    @model_validator(mode="before")
    @classmethod
    def _first_model(cls, values: object) -> object:
        if not isinstance(values, Mapping):
            return values
        models = values.get("models", {"demo": "demo"})
        if isinstance(models, str):
            models = parse_styles([models])
        first = next(iter(models), "") if isinstance(models, Mapping) else ""
        return {**values, "models": models, "default_model": values.get("default_model") or first}

    @model_validator(mode="after")
    def _consistent(self) -> ServeConfig:
        if self.default_model not in self.models:
            raise ValueError(
                f'default_model must be one of {", ".join(self.models)} (got "{self.default_model}")'
                if self.models
                else "models must name at least one"
            )
        if self.max_replicas < self.min_replicas:
            raise ValueError("max_replicas must not be below min_replicas")
        if not self.needs_key and not self.allow_anonymous and not is_loopback(self.host):
            raise ValueError(
                f"host {self.host} can be reached from elsewhere: give api_keys, or say allow_anonymous: true if "
                "everybody who reaches it may use it"
            )
        return self

    @field_validator("models", mode="before")
    @classmethod
    def _models(cls, value: object) -> object:
        return load_models(value)

    @field_validator("api_keys")
    @classmethod
    def _hashes(cls, value: tuple[str, ...] | str) -> tuple[str, ...] | str:
        for each in () if isinstance(value, str) else value:
            if re.fullmatch("[0-9a-f]{64}", each) is None:
                # Not quoted: it may be the key itself.
                raise ValueError("each must be the sha256 of a key: 64 hex digits, in lower case")
        return value

    @field_validator("batch_size", mode="before")
    @classmethod
    def _batch(cls, value: object) -> object:
        return _batch_size(value)

    @field_validator("background")
    @classmethod
    def _colour(cls, value: str) -> str:
        return _hex_colour(value)


def is_loopback(host: str) -> bool:
    """Whether that host, a name or an address to listen on, is reached from this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


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


def _batch_size(value: object) -> object:
    if isinstance(value, str) and value.isdecimal():
        value = int(value)
    if value != "auto" and (not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 64):
        raise ValueError('must be "auto" or 1 to 64')
    return value


def _hex_colour(value: str) -> str:
    if re.fullmatch("#[0-9a-fA-F]{6}", value) is None:
        raise ValueError("must be a colour such as #ffffff")
    return value


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


def parse_styles(texts: Iterable[str]) -> dict[str, str]:
    """What flags say of styles: each `NAME=MODEL`, or `NAME` alone for the model of that name; several by commas.

    Raises:
        ConfigError: a name is missing or occurs twice.
    """
    models: dict[str, str] = {}
    for text in texts:
        for part in text.split(","):
            name, _, model = (piece.strip() for piece in part.partition("="))
            if not name or (not model and "=" in part):
                raise ConfigError(f"--styles {text}: write NAME=MODEL, where MODEL is a named model or a YAML file")
            if name in models:
                raise ConfigError(f'--styles: there are two models for "{name}"')
            models[name] = model or name
    return models


def _codes_below(kind: type[RowError]) -> Iterator[str]:
    yield kind.code
    for below in kind.__subclasses__():
        yield from _codes_below(below)


def build(kind: type[_Config], values: Mapping[str, Any], *, source: str = "") -> _Config:
    """A config of that kind from plain values.

    Raises:
        ConfigError: names the key, with the nearest known one where it is misspelt, and `source` (a file) if given.
    """
    prefix = f"{source}: " if source else ""
    for key in values:
        if key not in kind.model_fields:
            raise ConfigError(f'{prefix}there is no setting "{key}".{suggest(key, kind.model_fields)}')
    try:
        return kind.model_validate(dict(values))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        text = str(first["msg"]).removeprefix("Value error, ").replace("Input should", "must", 1)
        if text.startswith("must"):
            text += f" (got {first['input']!r})"
        if first["type"] == "extra_forbidden":
            text = f"there is no such setting.{suggest(str(first['loc'][-1]), ModelConfig.model_fields)}"
        raise ConfigError(f"{prefix}{where}: {text}" if where else f"{prefix}{text}") from None


class _Loader(yaml.SafeLoader):
    """YAML in which 1:16 is a range. To YAML 1.1 it is a number to the base of sixty, and actors: 1:16 would be 76."""


_Loader.yaml_implicit_resolvers = {
    first: [("tag:yaml.org,2002:str", re.compile(r"\d+:\d+$")), *resolvers] if first.isdigit() else resolvers
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        ConfigError: no such file, not YAML, or not a mapping.
    """
    try:
        value = yaml.load(Path(path).read_text("utf-8"), _Loader)  # noqa: S506 - a safe loader
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {error}") from None
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ConfigError(f"{path} must be a mapping of settings to values")
    return value


def load(path: str | Path | None, overrides: Mapping[str, Any]) -> CatalogConfig:
    """The catalogue config of a YAML file with `overrides` on top; `defaults` and `styles` are merged one by one.

    Raises:
        ConfigError: the file or a value is wrong.
    """
    values = read_yaml(path) if path is not None else {}
    merged = {**values, **overrides}
    for name in ("defaults", "styles"):
        if isinstance(values.get(name), dict) and name in overrides:
            merged[name] = {**values[name], **overrides[name]}
    merged.setdefault("model", "realistic-vision")
    for key in ("manifest", "output"):
        if key not in merged:
            raise ConfigError(f"{key} is missing: give it on the command line or in the config file")
    return build(CatalogConfig, merged, source=str(path) if path is not None else "")


def load_serve(path: str | Path | None, overrides: Mapping[str, Any]) -> ServeConfig:
    """The endpoint's config of a YAML file with `overrides` on top.

    Both may say `model` in place of `models`: the only one, a named model or a YAML file.

    Raises:
        ConfigError: the file or a value is wrong.
    """
    values = read_yaml(path) if path is not None else {}
    merged = {**values, **overrides}
    if "model" in overrides and "models" in values:
        merged.pop("models")
        merged.pop("default_model", None)
    if (model := merged.pop("model", None)) is not None:
        if "models" in merged or "default_model" in merged:
            raise ConfigError("model is the only model: leave it out where models or default_model are given")
        if not isinstance(model, str):
            raise ConfigError("model must be the name of a model, or a YAML file of one")
        name = Path(model).stem if model.endswith((".yaml", ".yml")) else model
        merged["models"] = {name: model}
    return build(ServeConfig, merged, source=str(path) if path is not None else "")


def load_model(name_or_file: str) -> ModelConfig:
    """A named model, or the one a YAML file describes (told by its extension).

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
    tables = {"the packaged models.yaml": yaml.safe_load(files("pia_ray").joinpath("models.yaml").read_text("utf-8"))}
    if (own := user_file.expanduser()).exists():
        tables[str(own)] = read_yaml(own)
    models: dict[str, ModelConfig] = {}
    for source, table in tables.items():
        for name, values in table.items():
            if not isinstance(values, dict):
                raise ConfigError(f"{source}: {name} must be a mapping of settings to values")
            models[name] = build(ModelConfig, {"name": name, **values}, source=f"{source}: {name}")
    return models
