"""The seconds of a run's start by phase, from its begin to its first result."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

LEAST_S: Final = 0.05
"""Seconds of a phase that is listed."""


def start_phases(
    *, planning_s: float, opening: str, opening_s: float, engine_s: Mapping[str, float], row_s: float, all_s: float
) -> dict[str, float]:
    """Seconds by phase, in order: planning, `opening` (Ray, or the model of this process), workers, those that the
    first worker reports (`engine_s`: imports, model), first row. Of `all_s`, "workers" has what no other phase has."""
    known = {"planning": planning_s, opening: opening_s, "workers": 0.0, **engine_s, "first row": row_s}
    known["workers"] = all_s - sum(known.values())
    return {name: round(seconds, 2) for name, seconds in known.items() if seconds >= LEAST_S}


def phases_in_words(phases: Mapping[str, float]) -> str:
    """The phases in one line."""
    return ", ".join(f"{name} {seconds:.1f} s" for name, seconds in phases.items())
