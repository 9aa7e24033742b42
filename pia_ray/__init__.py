"""Animates large catalogues of images with PIA (arXiv 2312.13964) on Ray.

The names below are the public Python interface; each is loaded when first used, so that importing the package stays
fast and pulls in neither torch nor ray.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pia_ray.animation import Animation
    from pia_ray.catalog.cluster_run import run_catalog
    from pia_ray.catalog.graph import build_processor
    from pia_ray.catalog.local import run_local
    from pia_ray.catalog.progress import Progress, RunSummary
    from pia_ray.cli.main import main
    from pia_ray.config.added_weights import InversionConfig, LoraConfig
    from pia_ray.config.catalog import CatalogConfig
    from pia_ray.config.knobs import AnimationParams
    from pia_ray.config.model import ModelConfig
    from pia_ray.config.serve import ServeConfig
    from pia_ray.errors import (
        AddressRefused,
        BadManifestRow,
        BadParameter,
        BodyTooLarge,
        Busy,
        Cancelled,
        ConfigError,
        Conflict,
        DeviceLost,
        FetchDenied,
        FetchError,
        FetchOptedOut,
        FetchUnavailable,
        Forbidden,
        HeadersTooLarge,
        HubUnavailable,
        ImageError,
        ImageNotFound,
        ImageTooLarge,
        ImageTooSmall,
        ImageTruncated,
        InputChanged,
        JobConflict,
        JobError,
        JobNotFound,
        LeaseHeld,
        LedgerError,
        ManifestError,
        ManifestUnavailable,
        ModelUnavailable,
        NonFiniteFrames,
        NotAcceptable,
        NotAccepted,
        NotFound,
        NotReady,
        OutOfMemory,
        OutputError,
        OutputUnavailable,
        PiaRayError,
        QuotaExceeded,
        RateLimited,
        RequestError,
        RowError,
        SlowBody,
        StorageDamaged,
        StorageDenied,
        StorageError,
        StorageNotFound,
        StorageThrottled,
        StorageTooLarge,
        StorageUnavailable,
        Timeout,
        TooManyFailures,
        Unauthorized,
        UnexpectedError,
        UnsafeContent,
        Unsupported,
        UnsupportedBody,
        UnsupportedImage,
        VideoError,
        WeightsError,
        WorkerDied,
    )
    from pia_ray.ledger import read_results
    from pia_ray.media.judgement import Judgement
    from pia_ray.media.marking import strip_provenance
    from pia_ray.media.video import probe
    from pia_ray.media.video_facts import VideoFacts
    from pia_ray.online.serve import build_app
    from pia_ray.pia.animator import Animator
    from pia_ray.pia.denoising.affinity import affinity, keyframe_affinity
    from pia_ray.pia.judging import judge, load_scorer
    from pia_ray.pia.pipeline import PIAPipeline
    from pia_ray.types import AnimationRequest, EncodedVideo, StepEnd

__version__ = "0.1.0"

__all__ = [
    "AddressRefused",
    "Animation",
    "AnimationParams",
    "AnimationRequest",
    "Animator",
    "BadManifestRow",
    "BadParameter",
    "BodyTooLarge",
    "Busy",
    "Cancelled",
    "CatalogConfig",
    "ConfigError",
    "Conflict",
    "DeviceLost",
    "EncodedVideo",
    "FetchDenied",
    "FetchError",
    "FetchOptedOut",
    "FetchUnavailable",
    "Forbidden",
    "HeadersTooLarge",
    "HubUnavailable",
    "ImageError",
    "ImageNotFound",
    "ImageTooLarge",
    "ImageTooSmall",
    "ImageTruncated",
    "InputChanged",
    "InversionConfig",
    "JobConflict",
    "JobError",
    "JobNotFound",
    "Judgement",
    "LeaseHeld",
    "LedgerError",
    "LoraConfig",
    "ManifestError",
    "ManifestUnavailable",
    "ModelConfig",
    "ModelUnavailable",
    "NonFiniteFrames",
    "NotAcceptable",
    "NotAccepted",
    "NotFound",
    "NotReady",
    "OutOfMemory",
    "OutputError",
    "OutputUnavailable",
    "PIAPipeline",
    "PiaRayError",
    "Progress",
    "QuotaExceeded",
    "RateLimited",
    "RequestError",
    "RowError",
    "RunSummary",
    "ServeConfig",
    "SlowBody",
    "StepEnd",
    "StorageDamaged",
    "StorageDenied",
    "StorageError",
    "StorageNotFound",
    "StorageThrottled",
    "StorageTooLarge",
    "StorageUnavailable",
    "Timeout",
    "TooManyFailures",
    "Unauthorized",
    "UnexpectedError",
    "UnsafeContent",
    "Unsupported",
    "UnsupportedBody",
    "UnsupportedImage",
    "VideoError",
    "VideoFacts",
    "WeightsError",
    "WorkerDied",
    "affinity",
    "build_app",
    "build_processor",
    "judge",
    "keyframe_affinity",
    "load_scorer",
    "main",
    "probe",
    "read_results",
    "run_catalog",
    "run_local",
    "strip_provenance",
]

_HOMES = {
    "Animation": "pia_ray.animation",
    "AnimationParams": "pia_ray.config.knobs",
    "AnimationRequest": "pia_ray.types",
    "Animator": "pia_ray.pia.animator",
    "CatalogConfig": "pia_ray.config.catalog",
    "EncodedVideo": "pia_ray.types",
    "InversionConfig": "pia_ray.config.added_weights",
    "LoraConfig": "pia_ray.config.added_weights",
    "Judgement": "pia_ray.media.judgement",
    "ModelConfig": "pia_ray.config.model",
    "PIAPipeline": "pia_ray.pia.pipeline",
    "Progress": "pia_ray.catalog.progress",
    "RunSummary": "pia_ray.catalog.progress",
    "ServeConfig": "pia_ray.config.serve",
    "StepEnd": "pia_ray.types",
    "VideoFacts": "pia_ray.media.video_facts",
    "affinity": "pia_ray.pia.denoising.affinity",
    "build_app": "pia_ray.online.serve",
    "build_processor": "pia_ray.catalog.graph",
    "keyframe_affinity": "pia_ray.pia.denoising.affinity",
    "main": "pia_ray.cli.main",
    "probe": "pia_ray.media.video",
    "judge": "pia_ray.pia.judging",
    "load_scorer": "pia_ray.pia.judging",
    "read_results": "pia_ray.ledger",
    "run_catalog": "pia_ray.catalog.cluster_run",
    "run_local": "pia_ray.catalog.local",
    "strip_provenance": "pia_ray.media.marking",
}
"""The module of each public name that is not an error."""


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from pia_ray.imports import collector_paused

    try:
        with collector_paused():
            return getattr(import_module(_HOMES.get(name, "pia_ray.errors")), name)
    except ModuleNotFoundError as error:
        from pia_ray.extras import advice

        if not (text := advice(error)):
            raise
        raise ModuleNotFoundError(f"{error.msg}.{text}", name=error.name, path=error.path) from None


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
