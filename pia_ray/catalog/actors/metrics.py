"""The metrics of runs: their names, labels and values, exported by Ray on the metrics port of each node.

Ray puts `ray_` before each name, `_total` after that of a counter, and labels of the process. No prompt, id or URI of a
row is ever a label. Those of the endpoint are in `online.http.metrics`; `outcome` has the same values in both.
"""

from __future__ import annotations

import threading
from collections import Counter as Counts
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Final, Protocol, get_args

from ray.util.metrics import Counter, Gauge, Histogram

from pia_ray import ledger, storage
from pia_ray.animation import RowAnimator
from pia_ray.catalog.progress import Progress
from pia_ray.catalog.rows.in_flight import InFlightRows
from pia_ray.result_row import SUCCEEDED

EVERY_S: Final = 2.0
"""Seconds between two reads of the counts of a process; Ray exports them every 10 s."""

NO_USAGE: Final = storage.Usage({}, {}, 0, 0)

_STAGE_SECONDS: Final = [0.01, 0.05, 0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800, 3600]


class Worker(Protocol):
    """A worker, as its metrics see it."""

    animator: RowAnimator

    @property
    def rows(self) -> InFlightRows:
        """The rows that it has begun."""


class WorkerMetrics:
    """The metrics of one worker of a run."""

    def __init__(self, run_id: str) -> None:
        self._tags = {"run_id": run_id}
        self._stage_seconds = Histogram(
            "pia_ray_run_stage_seconds", "Time of rows in a stage.", _STAGE_SECONDS, ("run_id", "stage")
        )
        self._in_flight = Gauge("pia_ray_run_rows_in_flight", "Rows that workers have begun.", ("run_id", "stage"))
        self._tries = _Total("pia_ray_run_attempts", "Tries of rows.", self._tags)
        self._loads = _Total("pia_ray_run_model_loads", "Models that workers have loaded.", self._tags)
        self._busy = _Total("pia_ray_run_engine_busy_seconds", "Time in which an engine had a row.", self._tags)
        self._up = _Total("pia_ray_run_engine_seconds", "Time in which an engine was there.", self._tags)
        self._storage = StorageMetrics(run_id)

    def end_stage(self, stage: ledger.Stage, seconds: float) -> None:
        """Counts a stage of a row that has ended."""
        self._stage_seconds.observe(seconds, {**self._tags, "stage": stage})

    def follow(self, worker: Worker) -> None:
        """Counts what the worker does until the process ends."""

        def run() -> None:
            while True:
                self._count(worker)
                threading.Event().wait(EVERY_S)

        threading.Thread(target=run, name="metrics", daemon=True).start()

    def _count(self, worker: Worker) -> None:
        stages = Counts(row.stage for row in worker.rows.shown())
        for stage in get_args(ledger.Stage):
            self._in_flight.set(stages[stage], {**self._tags, "stage": stage})
        self._tries.reach(worker.rows.num_tries)
        self._loads.reach(worker.animator.num_loads)
        self._busy.reach(worker.rows.engine.busy_s)
        self._up.reach(worker.rows.engine.up_s)
        self._storage.count()


class DriverMetrics:
    """The metrics of a run that its driver counts."""

    def __init__(self) -> None:
        self._before = storage.usage()
        self._run: _RunMetrics | None = None

    def observing(self, observe: Callable[[Progress], None]) -> Callable[[Progress], None]:
        """The observer, which counts too: from the time that workers are asked for until they have gone."""

        def observed(progress: Progress) -> None:
            if self._run is not None:
                self._run.show(progress)
            observe(progress)

        return observed

    @contextmanager
    def of_run(self, run_id: str) -> Iterator[None]:
        """Counts the run for the block, in which this process is connected to Ray."""
        self._run = _RunMetrics(run_id, before=self._before)
        try:
            yield
        finally:
            ended, self._run = self._run, None
            ended.end()


class _RunMetrics:
    def __init__(self, run_id: str, *, before: storage.Usage) -> None:
        self._tags = {"run_id": run_id}
        self._rows = Counter("pia_ray_run_rows", "Ended rows, by outcome.", ("run_id", "outcome"))
        self._gpu_seconds = _Total("pia_ray_run_gpu_seconds", "Engine time of finished videos.", self._tags)
        self._left = Gauge("pia_ray_run_rows_left", "Rows that the run has still to do.", ("run_id",))
        self._per_hour = Gauge("pia_ray_run_videos_per_hour", "Videos per hour, since the first one.", ("run_id",))
        self._away = Gauge("pia_ray_run_away", "Whether the run waits for a store, hub or host.", ("run_id",))
        self._storage = StorageMetrics(run_id, before=before)
        self._counted: Counts[str] = Counts()

    def show(self, progress: Progress) -> None:
        outcomes = Counts({SUCCEEDED: progress.num_succeeded}) + progress.errors
        for outcome, number in (outcomes - self._counted).items():
            self._rows.inc(number, {**self._tags, "outcome": outcome})
        self._counted = outcomes
        self._gpu_seconds.reach(progress.gpu_s)
        self._left.set(progress.num_left, self._tags)
        self._per_hour.set(3600 * progress.videos_per_s, self._tags)
        self._away.set(1 if progress.away else 0, self._tags)
        self._storage.count()

    def end(self) -> None:
        for gauge in (self._left, self._per_hour, self._away):
            gauge.set(0, self._tags)


class StorageMetrics:
    """The storage calls of one process, but for those `before`."""

    def __init__(self, run_id: str, *, before: storage.Usage = NO_USAGE) -> None:
        self._tags = {"run_id": run_id}
        by = ("run_id", "operation")
        self._requests = Counter("pia_ray_run_storage_requests", "Requests to S3, by operation.", by)
        self._retries = Counter("pia_ray_run_storage_retries", "Those of them that followed a failed one.", by)
        self._read = _Total("pia_ray_run_read_bytes", "Bytes read from storage and from https:// inputs.", self._tags)
        self._written = _Total("pia_ray_run_written_bytes", "Bytes written to storage.", self._tags)
        self._read.skip(before.read_bytes)
        self._written.skip(before.written_bytes)
        self._counted = before

    def count(self) -> None:
        """Counts the calls since the last time."""
        now = storage.usage()
        self._add(self._requests, self._counted.requests, now.requests)
        self._add(self._retries, self._counted.retries, now.retries)
        self._read.reach(now.read_bytes)
        self._written.reach(now.written_bytes)
        self._counted = now

    def _add(self, counter: Counter, before: Mapping[str, int], now: Mapping[str, int]) -> None:
        for operation, number in now.items():
            if (new := number - before.get(operation, 0)) > 0:
                counter.inc(new, {**self._tags, "operation": operation})


class _Total:
    """A counter of something that is counted elsewhere."""

    def __init__(self, name: str, text: str, tags: Mapping[str, str]) -> None:
        self._counter = Counter(name, text, tuple(tags))
        self._tags = dict(tags)
        self._reached = 0.0

    def skip(self, total: float) -> None:
        """Leaves out what was counted so far."""
        self._reached = total

    def reach(self, total: float) -> None:
        """Counts up to the total."""
        if total > self._reached:
            self._counter.inc(total - self._reached, self._tags)
            self._reached = total
