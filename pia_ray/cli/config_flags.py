"""Configs from the parsed flags of `pia-ray`."""

from __future__ import annotations

import argparse
from typing import Any

from pia_ray.config.catalog import CatalogConfig, load
from pia_ray.config.knobs import KNOBS
from pia_ray.config.model import ModelConfig, check_style_name, load_model, parse_styles
from pia_ray.config.resolving import parse_defaults
from pia_ray.errors import BadParameter, ConfigError


def knobs_of(args: argparse.Namespace) -> dict[str, Any]:
    """The knobs that were given as flags.

    Raises:
        ConfigError: one has no valid value; names the flag.
    """
    given = {name: value for name in KNOBS if (value := getattr(args, name)) is not None}
    try:
        return parse_defaults(given)
    except BadParameter as error:
        raise ConfigError(f"--{error.field.replace('_', '-')}: {error.message}") from None


def catalog_config(args: argparse.Namespace, **fallbacks: Any) -> CatalogConfig:
    """The config of a run from its file with the flags on top; `fallbacks` for settings that are in neither.

    Raises:
        ConfigError: the file, a flag or a model is wrong.
    """
    overrides: dict[str, Any] = {
        name: value
        for name in CatalogConfig.model_fields
        if name not in ("model", "styles", "defaults") and (value := getattr(args, name, None)) not in (None, [])
    }
    if knobs := knobs_of(args):
        overrides["defaults"] = knobs
    if args.model is not None:
        overrides["model"] = load_model(args.model)
    if args.styles is not None:
        overrides["styles"] = styles_of(args)
    return load(args.config, overrides, fallbacks=fallbacks)


def styles_of(args: argparse.Namespace) -> dict[str, ModelConfig]:
    """The models that --styles names.

    Raises:
        ConfigError: a name or model is wrong.
    """
    models = {}
    for name, model in parse_styles(args.styles or ()).items():
        try:
            check_style_name(name)
        except ValueError as error:
            raise ConfigError(f"--styles: {error}") from None
        models[name] = load_model(model)
    return models
