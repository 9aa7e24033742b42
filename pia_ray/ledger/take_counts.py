"""Counts of accepted videos and of retakes, from the columns `accepted` and `takes` of results."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class TakeCounts:
    """Rows by what became of their bounds, and what retakes cost. Rows without bounds are in no count."""

    num_accepted: int = 0
    num_retaken: int = 0
    """Rows that were animated more than once."""
    num_given_up: int = 0
    """Rows whose video misses a bound, or that failed for that."""
    retake_gpu_s: float = 0.0
    """Engine seconds of all takes but the first ones."""

    def __add__(self, other: TakeCounts) -> TakeCounts:
        return TakeCounts(
            self.num_accepted + other.num_accepted,
            self.num_retaken + other.num_retaken,
            self.num_given_up + other.num_given_up,
            self.retake_gpu_s + other.retake_gpu_s,
        )


def count_takes(rows: Iterable[tuple[bool | None, str | None]], *, run_id: str | None = None) -> TakeCounts:
    """The counts of rows by their cells `accepted` and `takes`; with `run_id`, retakes of that run alone."""
    accepted = given_up = retaken = 0
    gpu_s = 0.0
    for verdict, takes in rows:
        accepted += verdict is True
        given_up += verdict is False
        if takes is None:
            continue
        own = [
            take for take in json.loads(takes) if take["take"] > 0 and (run_id is None or take.get("run_id") == run_id)
        ]
        retaken += bool(own)
        gpu_s += sum(take.get("gpu_s") or 0.0 for take in own)
    return TakeCounts(accepted, retaken, given_up, gpu_s)
