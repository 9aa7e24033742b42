"""`ServeConfig`: the endpoint's models, limits and replicas, from a YAML file and flags."""

from __future__ import annotations

import hashlib
import ipaddress
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, SecretStr, field_validator, model_validator

from pia_ray.config.acceptance import MOST_RETAKES
from pia_ray.config.lists import Networks
from pia_ray.config.marking import MarkingConfig
from pia_ray.config.model import ModelConfig, build, load_models, parse_styles
from pia_ray.config.workers import WorkerConfig
from pia_ray.config.yaml_files import read_yaml
from pia_ray.errors import ConfigError


class ServeConfig(WorkerConfig, MarkingConfig):
    """The online endpoint: its models, its limits, and how Ray Serve runs it.

    Everyone may call an endpoint on a loopback address. Bound wider it needs `api_keys`, or says `allow_anonymous`.
    """

    models: dict[str, ModelConfig] = Field(
        description="Models by the name that requests use: each a named model, a YAML file or settings."
    )
    default_model: str = Field("", description="The model of requests that name none. Left out: the first.")
    storage: str = Field(
        "./pia-ray-serve", description="Folder (one host) or s3:// prefix (many) for video jobs and their videos."
    )
    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")

    api_keys: tuple[str, ...] | str = Field(
        (), description="sha256 of each key in hex, or a file of such lines, which is read again when it changes."
    )
    key_weights: dict[str, float] = Field(
        default_factory=dict,
        description="Shares of the engines by the sha256 of a key, where several keys wait; 1 for keys not named.",
    )
    allow_anonymous: bool = Field(False, description="Let callers without a key in, also from other hosts.")
    webhook_secret: SecretStr | None = Field(None, description="whsec_... with which webhooks are signed.")
    operator_key: SecretStr | None = Field(
        None,
        description="Key of the operator's page at /operator, 16 characters or more; without it there is no such page.",
    )
    metrics_token: SecretStr | None = Field(None, description="Bearer token for /metrics; without it, loopback only.")

    max_body_bytes: int = Field(64_000_000, ge=1, description="Larger request bodies are refused, unread.")
    max_image_bytes: int = Field(20_000_000, ge=1, description="Larger image files are refused.")
    max_image_pixels: int = Field(40_000_000, ge=1, description="Larger images are refused, undecoded.")
    max_frames: int = Field(64, ge=1, description="Most frames of a video, as they are generated.")
    max_file_frames: int = Field(
        1800, ge=1, description="Most frames of a file that playback_fps, repeat or min_duration make longer."
    )
    max_steps: int = Field(100, ge=1, description="Most inference steps of a video.")
    max_pixels: int = Field(2_097_152, ge=4096, description="Most pixels of a frame: width x height.")
    max_pixel_steps: int = Field(
        4_000_000_000,
        ge=1_000_000,
        description="Most frames x pixels x steps of a video, which its cost follows; 16 frames of 512 x 512 px in 25 "
        "steps have 105 million.",
    )
    max_retakes: int = Field(
        4, ge=0, le=MOST_RETAKES, description="Most retakes that a request may ask for; each costs as the first take."
    )
    max_jobs_per_key: int = Field(32, ge=1, description="Video jobs that a key may have open at once.")
    max_waiting: int = Field(16, ge=0, description="Requests that wait in a replica while others denoise.")
    requests_per_minute: int = Field(600, ge=1, description="Calls of one key (or address, without keys) per minute.")
    max_requests_per_key: int = Field(
        64, ge=1, description="Requests of one key (or address, without keys) that an ingress answers at once."
    )
    trusted_proxies: Networks = Field(
        (), description="Networks (CIDR) of proxies whose X-Forwarded-For tells the address of a caller without a key."
    )
    gpu_seconds_per_day: float | None = Field(
        None, gt=0, description="Engine seconds that a key may use a day (UTC), over all replicas."
    )
    bytes_per_day: int | None = Field(
        None, ge=1, description="Bytes that are stored for a key a day: uploads, pictures and videos of jobs."
    )
    requests_per_day: int | None = Field(
        None, ge=1, description="Calls of a key that make something, and lines of its batches, a day."
    )
    sync_timeout_s: float = Field(300.0, gt=0, description="Seconds after which a synchronous call fails.")
    job_timeout_s: float = Field(3600.0, gt=0, description="Seconds in an engine after which a video job fails.")
    job_ttl_s: float = Field(86_400.0, gt=0, description="Seconds that a completed or cancelled video job is kept.")
    failed_job_ttl_s: float = Field(
        604_800.0, gt=0, description="Seconds that a failed video job is kept, with its pictures, for another try."
    )
    max_attempts: int = Field(3, ge=1, le=100, description="Tries of a video job whose replica dies.")
    body_timeout_s: float = Field(600.0, gt=0, description="Seconds that a request's body may take to arrive.")
    min_body_bytes_per_s: float = Field(
        10_000.0,
        ge=0,
        description="Bytes a second at which a request's body has to arrive, over 10 s; 0 for no limit.",
    )
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
        3900.0,
        gt=0,
        description="Seconds that an engine or ingress which is stopped has to end the videos it makes; above "
        "job_timeout_s. The rest is given back to the queue.",
    )
    gpus_per_replica: float | None = Field(
        None,
        ge=0,
        le=8,
        description="GPUs per engine, or a share of one and its memory. Left out: 1 where there are GPUs, else 0.",
    )
    cpus_per_replica: float = Field(1.0, ge=0, le=64, description="CPU cores reserved per engine.")
    deployment_config: dict[str, Any] = Field(
        default_factory=dict, description="Ray Serve's options for the engines, over those that follow from the above."
    )
    ingress_deployment_config: dict[str, Any] = Field(
        default_factory=dict, description="The same for the HTTP ingress, such as num_replicas."
    )

    @property
    def gpu_share(self) -> float:
        """The share of one GPU that each has; 1 for one GPU or more, and where none is asked for."""
        return min(self.gpus_per_replica or 1.0, 1.0)

    @property
    def default_model_config(self) -> ModelConfig:
        """The model of requests that name none."""
        return self.models[self.default_model]

    @property
    def style_models(self) -> Mapping[str, ModelConfig]:
        """All models of the endpoint."""
        return self.models

    @property
    def owner_weights(self) -> Mapping[str, float]:
        """`key_weights` by owner."""
        return {owner_of_hash(bytes.fromhex(key)): weight for key, weight in self.key_weights.items()}

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
            models = parse_styles([models], setting="models")
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
        self.require_safety_checkers()
        for size in self.warm:
            if size.width * size.height > self.max_pixels or size.num_frames > self.max_frames:
                raise ValueError(
                    f"warm: {size} is more than a request may ask for (max_pixels {self.max_pixels}, "
                    f"max_frames {self.max_frames})"
                )
        if self.max_replicas < self.min_replicas:
            raise ValueError("max_replicas must not be below min_replicas")
        if not self.needs_key and not self.allow_anonymous and not is_loopback(self.host):
            raise ValueError(
                f"host {self.host} can be reached from elsewhere: give api_keys, or say allow_anonymous: true if "
                "everyone who reaches it may use it"
            )
        return self

    @field_validator("models", mode="before")
    @classmethod
    def _models(cls, value: object) -> object:
        return load_models(value)

    @field_validator("key_weights")
    @classmethod
    def _weights(cls, value: dict[str, float]) -> dict[str, float]:
        for key, weight in value.items():
            if re.fullmatch("[0-9a-f]{64}", key) is None:
                raise ValueError("each must be the sha256 of a key, 64 hex digits in lower case, with a number")
            if not 0.01 <= weight <= 100:
                raise ValueError(f"weights go from 0.01 to 100 (got {weight:g})")
        return value

    @field_validator("operator_key")
    @classmethod
    def _long_enough(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and len(value.get_secret_value()) < 16:
            raise ValueError("a key of the operator has 16 characters or more")  # not quoted
        return value

    @field_validator("api_keys")
    @classmethod
    def _hashes(cls, value: tuple[str, ...] | str) -> tuple[str, ...] | str:
        for each in () if isinstance(value, str) else value:
            if re.fullmatch("[0-9a-f]{64}", each) is None:
                # Not quoted: it may be the key itself.
                raise ValueError("each must be the sha256 of a key: 64 hex digits, in lower case")
        return value


def owner_of_hash(digest: bytes) -> str:
    """The owner of the key with that sha256; not the hash itself, as owners appear in logs and names of objects."""
    return "key_" + hashlib.sha256(b"pia-ray owner " + digest).hexdigest()[:32]


def is_loopback(host: str) -> bool:
    """Whether that host, a name or an address to listen on, is reached from this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def load_serve(path: str | Path | None, overrides: Mapping[str, Any]) -> ServeConfig:
    """The endpoint's config of a YAML file with `overrides` on top.

    Both may say `model` instead of `models`, for the only one: a named model or a YAML file.

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
