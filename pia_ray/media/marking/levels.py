"""The levels of provenance: the part of its making that a file states."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from pia_ray.config.marking import ProvenanceLevel

_PUBLIC: Final = ("model", "work_key")


def at_level(provenance: Mapping[str, Any], level: ProvenanceLevel) -> dict[str, Any]:
    """The part of the provenance that a file of that level holds.

    "full" holds all of it, "public" the model and the work key, "none" nothing.
    """
    if level == "full":
        return dict(provenance)
    return {key: provenance[key] for key in _PUBLIC if key in provenance} if level == "public" else {}
