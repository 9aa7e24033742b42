"""The progress of a run, its counts, and its end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from pia_ray.catalog.stopping import Ending
from pia_ray.ledger import BusyShare, TakeCounts, count_takes
from pia_ray.result_row import FAILED, ResultRow

Phase = Literal["planning", "starting", "animating", "stopping", "writing", "ended"]


@dataclass(frozen=True)
class Progress:
    """The state of a run: its phase and its counts."""

    phase: Phase
    num_items: int = 0
    num_before: int = 0
    """Work items that had succeeded before this run."""
    num_failed_before: int = 0
    """Work items that failed before this run and are not tried again."""
    num_rejected: int = 0
    """Bad rows of the manifest; they failed when it was read."""
    num_pending: int = 0
    num_succeeded: int = 0
    num_failed: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    """Failed rows of this run by error code."""
    first_row_s: float = 0.0
    """Seconds from the start of the run to its first result."""
    first_video_s: float = 0.0
    """The same to its first video; 0 before it."""
    start_s: Mapping[str, float] = field(default_factory=dict)
    """Seconds until the first result by phase: planning, Ray, workers, imports, model, first row. Empty before it."""
    animating_s: float = 0.0
    """Seconds from the first result to the latest."""
    start: str = ""
    """The workers' state before the first result, in words. Empty while Ray starts, and later."""
    columns: str = ""
    """The use of the manifest's columns in one line: knobs, and those that pass through. Empty before it is known."""
    review: str = ""
    """The effect of the run's review in one line, once."""
    away: str = ""
    """Names what the run waits for: "the store", "the hub", "the host of the pictures". Empty where it does not."""
    away_reason: str = ""
    """The error that says so."""
    num_waiting: int = 0
    """Finished animations that wait in memory."""
    gpu_s: float = 0.0
    """Seconds of engine time of this run's videos."""
    busy_share: float | None = None
    """Share of the time between a worker's first and latest row that its engine computed; None before it is known."""
    takes: TakeCounts = field(default_factory=TakeCounts)
    """Of this run's rows that have bounds."""

    @property
    def num_left(self) -> int:
        """Work items that this run has still to do."""
        return self.num_pending - self.num_succeeded - self.num_failed

    @property
    def num_failed_in_all(self) -> int:
        """Work items that have failed, in this run, before it, or when the manifest was read."""
        return self.num_failed + self.num_failed_before + self.num_rejected

    @property
    def rows_per_s(self) -> float:
        """Results per second since the first one; 0 before the second."""
        return _rate(self.num_succeeded + self.num_failed, self.animating_s)

    @property
    def videos_per_s(self) -> float:
        """Videos per second since the first one; 0 before the second. Rows that fail are none."""
        return _rate(self.num_succeeded, self.since_first_video_s)

    @property
    def since_first_video_s(self) -> float:
        """Seconds from the first video to the latest result."""
        return self.first_row_s + self.animating_s - self.first_video_s if self.first_video_s else 0.0


def _rate(num: int, seconds: float) -> float:
    """Per second, where the first of them came at the beginning of these seconds."""
    return (num - 1) / seconds if num > 1 and seconds > 0 else 0.0


@dataclass(frozen=True)
class RunSummary:
    """The end of a run: its counts, its errors and the URIs of its results."""

    run_id: str
    output: str
    ending: Ending
    progress: Progress
    seconds: float
    errors: Mapping[str, int]
    """Failed work items by error code: of this run, of earlier ones, and bad rows of the manifest."""
    results_uri: str
    gallery_uri: str | None
    """None where it could not be written."""

    @property
    def exit_code(self) -> int:
        """0 every item has succeeded; 1 some failed; 4 deadline; 130 interrupted."""
        if self.ending != "finished":
            return 4 if self.ending == "deadline" else 130
        return 1 if self.progress.num_failed_in_all or self.progress.num_left else 0


def counted(
    progress: Progress, rows: Sequence[ResultRow], *, run_id: str, since_start_s: float, share: BusyShare
) -> Progress:
    """The progress with these results, which have come so long after the start of the run; `share` takes them too.

    Videos that an earlier run has committed and this one has found cost it no engine time.
    """
    if not rows:
        return progress
    made = [row for row in rows if row.run_id == run_id]
    for row in made:
        share.add(
            worker=row.worker,
            finished_at=row.finished_at,
            fetch_s=row.fetch_s,
            animate_s=row.animate_s,
            gpu_s=row.gpu_s,
        )
    errors = progress.errors + Counter(row.error_code for row in rows if row.error_code is not None)
    failed = sum(row.status == FAILED for row in rows)
    first_s = progress.first_row_s or since_start_s
    return replace(
        progress,
        phase="stopping" if progress.phase == "stopping" else "animating",
        num_succeeded=progress.num_succeeded + len(rows) - failed,
        num_failed=progress.num_failed + failed,
        errors=errors,
        first_row_s=first_s,
        first_video_s=progress.first_video_s or (since_start_s if failed < len(rows) else 0.0),
        animating_s=since_start_s - first_s,
        gpu_s=progress.gpu_s + sum(row.gpu_s or 0.0 for row in made),
        busy_share=share.value,
        takes=progress.takes + count_takes(((row.accepted, row.takes) for row in rows), run_id=run_id),
    )
