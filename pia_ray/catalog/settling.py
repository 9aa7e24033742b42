"""A run's config in the forms in which workers and records need it."""

from __future__ import annotations

from typing import Any

from pia_ray import manifest, storage, weights
from pia_ray.config.catalog import CatalogConfig
from pia_ray.config.knobs import REFERENCE_KNOBS
from pia_ray.storage import sources


def settled(config: CatalogConfig) -> CatalogConfig:
    """The same config for workers anywhere: local paths are absolute, hub revisions pinned, without webhook.

    Raises:
        WeightsError: the model, or that of a style, cannot be found.
    """
    config = with_absolute_paths(config)
    styles = {style: weights.pin(model) for style, model in config.styles.items()}
    pinned = {"model": weights.pin(config.model), "styles": styles}
    # A URL of a webhook is often a secret itself; no worker and no record needs it.
    return config.model_copy(update={**pinned, "on_end": None, "on_end_secret": None})


def on_gpus(config: CatalogConfig) -> CatalogConfig:
    """The same config for workers that have been given GPUs: they do not fall back to their CPUs."""
    styles = {style: model.on_gpu for style, model in config.styles.items()}
    return config.model_copy(update={"model": config.model.on_gpu, "styles": styles})


def versions_of(config: CatalogConfig) -> tuple[str, dict[str, str]]:
    """The work version of the run's own model, and those of its styles' models by style.

    Raises:
        WeightsError: a model cannot be found.
    """
    styles = {style: weights.work_version(model) for style, model in config.styles.items()}
    return weights.work_version(config.model), styles


def with_absolute_paths(config: CatalogConfig) -> CatalogConfig:
    """The same config with absolute local paths."""

    def absolute(uri: str) -> str:
        if not uri or storage.is_s3(uri):
            return uri
        slash = "/" if uri.endswith("/") else ""  # says that it is a folder, also where none is yet
        return str(storage.local_path(uri).absolute()).rstrip("/") + slash

    config = manifest.with_absolute_references(config)
    manifests = tuple(uri if sources.in_store(uri) else absolute(uri) for uri in config.manifests)
    signing = {name: absolute(uri) for name in ("c2pa_certificate", "c2pa_key") if (uri := getattr(config, name))}
    places = {"output": absolute(config.output), "manifest": manifests[0] if len(manifests) == 1 else manifests}
    if config.review:
        places["review"] = config.review if sources.in_store(config.review) else absolute(config.review)
    return config.model_copy(update=places | signing)


def recorded(config: CatalogConfig) -> dict[str, Any]:
    """The config as a run's record holds it: without the signatures of URLs."""
    values = config.model_dump(mode="json")
    models = (values["model"], *values["styles"].values())
    for defaults in (values["defaults"], *(model["defaults"] for model in models)):
        defaults |= {knob: manifest.redacted(defaults[knob]) for knob in REFERENCE_KNOBS if defaults.get(knob)}
    return values
