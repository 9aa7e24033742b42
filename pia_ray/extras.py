"""The extras of the package, and errors that name the one that is missing. Imports nothing of them."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Final

from pia_ray.errors import ConfigError

EXTRAS: Final[Mapping[str, tuple[str, ...]]] = {
    "run": ("torch", "diffusers", "transformers", "accelerate", "ray"),
    "serve": ("torch", "diffusers", "transformers", "accelerate", "ray", "fastapi", "multipart", "prometheus_client"),
    "c2pa": ("c2pa", "cryptography"),
    "upscale": ("spandrel",),
}
"""What an installation with each extra imports; `pip install pia-ray` alone brings none of it."""


def require(extra: str, *, purpose: str) -> None:
    """Refuses what `purpose` names where the extra is not installed.

    Raises:
        ConfigError: names the packages that are missing and the command that installs them.
    """
    missing = [name for name in EXTRAS[extra] if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"{purpose} needs packages that are not installed here ({', '.join(missing)}): "
            f'pip install "pia-ray[{extra}]"'
        )


def advice(error: ModuleNotFoundError) -> str:
    """` It comes with ...` for a module of an extra, or an empty string."""
    top = (error.name or "").partition(".")[0]
    return next((f' It comes with pip install "pia-ray[{name}]".' for name in EXTRAS if top in EXTRAS[name]), "")
