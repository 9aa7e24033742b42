"""Stored numbers judged anew, for `pia-ray judge`: no model, no video and no worker is needed."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pia_ray import ledger
from pia_ray.config.acceptance import Bound
from pia_ray.errors import OutputError
from pia_ray.result_row import APPROVED, SUCCEEDED
from pia_ray.takes import Policy


@dataclass(frozen=True)
class Missing:
    """A video that misses bounds."""

    id: str
    video_index: int
    video_uri: str | None
    numbers: Mapping[str, float]
    """The numbers that miss, by name."""
    violation: float
    """As `Policy.violation`."""


@dataclass(frozen=True)
class Judged:
    """The videos of an output under some bounds."""

    num_videos: int
    num_accepted: int
    missing: tuple[Missing, ...]
    """Those that miss a bound, the worst first."""
    num_by_bound: Mapping[str, int]
    """Videos that miss each bound."""
    num_unmeasured: Mapping[str, int]
    """Videos without a number that a bound names, by number; they meet that bound."""
    num_approved: int = 0
    """Those of `missing` that a person has approved, which no run takes again."""


def judge_output(output: str, bounds: tuple[Bound, ...]) -> Judged:
    """The videos of the results of an output under these bounds.

    Raises:
        OutputError: there are no results, or they cannot be read.
    """
    policy = Policy(bounds)
    names = list(dict.fromkeys(bound.number for bound in bounds))
    missing, num_videos, num_approved = [], 0, 0
    by_bound, unmeasured = Counter(dict.fromkeys(map(str, bounds), 0)), Counter(dict.fromkeys(names, 0))
    table = ledger.read_results(output).select(["id", "video_index", "video_uri", "status", "review", *names])
    for batch in table.to_batches(max_chunksize=10_000):
        for row in batch.to_pylist():
            if row["status"] != SUCCEEDED:
                continue
            num_videos += 1
            unmeasured.update(name for name in names if row[name] is None)
            missed = [bound for bound in bounds if bound.shortfall(row[bound.number])]
            by_bound.update(map(str, missed))
            if missed:
                num_approved += row["review"] == APPROVED
                numbers = {bound.number: row[bound.number] for bound in missed}
                missing.append(Missing(row["id"], row["video_index"], row["video_uri"], numbers, policy.violation(row)))
    missing.sort(key=lambda each: -each.violation)
    return Judged(
        num_videos, num_videos - len(missing), tuple(missing), dict(by_bound), dict(+unmeasured), num_approved
    )


def write_csv(judged: Judged, path: str) -> None:
    """Writes the videos that miss to a CSV file, the worst first.

    Raises:
        OutputError: the file cannot be written.
    """
    names = list(dict.fromkeys(name for each in judged.missing for name in each.numbers))
    try:
        with Path(path).open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["id", "video_index", "video_uri", "violation", *names])
            for each in judged.missing:
                numbers: list[Any] = [each.numbers.get(name) for name in names]
                writer.writerow([each.id, each.video_index, each.video_uri, each.violation, *numbers])
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}") from None
