"""Animates large catalogues of images with PIA (arXiv 2312.13964) on Ray.

The names below are the public Python interface; each is loaded when first used, so that importing the package stays
fast and pulls in neither torch nor ray.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pia_ray.animation import Animation
    from pia_ray.catalog.graph import build_processor, run_catalog
    from pia_ray.config.catalog import CatalogConfig
    from pia_ray.config.knobs import AnimationParams
    from pia_ray.config.model import ModelConfig
    from pia_ray.config.serve import ServeConfig
    from pia_ray.ledger import read_results
    from pia_ray.online.serve import build_app
    from pia_ray.pia.animator import Animator
    from pia_ray.types import AnimationRequest

__version__ = "0.1.0"

_HOMES = {
    "Animation": "pia_ray.animation",
    "AnimationParams": "pia_ray.config.knobs",
    "AnimationRequest": "pia_ray.types",
    "Animator": "pia_ray.pia.animator",
    "CatalogConfig": "pia_ray.config.catalog",
    "ModelConfig": "pia_ray.config.model",
    "ServeConfig": "pia_ray.config.serve",
    "build_app": "pia_ray.online.serve",
    "build_processor": "pia_ray.catalog.graph",
    "read_results": "pia_ray.ledger",
    "run_catalog": "pia_ray.catalog.graph",
}

__all__ = [
    "Animation",
    "AnimationParams",
    "AnimationRequest",
    "Animator",
    "CatalogConfig",
    "ModelConfig",
    "ServeConfig",
    "build_app",
    "build_processor",
    "read_results",
    "run_catalog",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
