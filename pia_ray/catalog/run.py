"""One catalogue run from plan to summary, with any executor: probe, lease, plan, execute, record, report.

The process that runs this is the only writer of ledger parts. It keeps hashes and counts, never the rows.
"""

from __future__ import annotations

import logging
import math
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, suppress
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, Final, Literal, Protocol

from pia_ray import ledger, manifest, storage, weights
from pia_ray.catalog import gallery
from pia_ray.catalog.stopping import grace_of, stop_on_signals
from pia_ray.config.catalog import CatalogConfig
from pia_ray.config.knobs import REFERENCE_KNOBS
from pia_ray.errors import JobError, OutputError, PiaRayError, StorageError
from pia_ray.types import FAILED, ResultRow

log = logging.getLogger(__name__)

REFRESH_S: Final = 300.0
"""Least time between two writings of results.parquet and the gallery while a run goes on."""

Phase = Literal["planning", "starting", "animating", "stopping", "writing", "ended"]
Ending = Literal["finished", "deadline", "interrupted"]


@dataclass(frozen=True)
class RunPlan:
    """The pending rows of a run, and what an executor needs to know of it."""

    config: CatalogConfig
    run_id: str
    items_uri: str
    num_pending: int
    style_versions: Mapping[str, str] = field(default_factory=dict)
    """Versions of the models in `config.styles`, by style."""


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
    animating_s: float = 0.0
    """Seconds from the first result to the latest."""
    columns: str = ""
    """The use of the manifest's columns in one line: knobs, and those that pass through. Empty before it is known."""

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
        done = self.num_succeeded + self.num_failed
        return (done - 1) / self.animating_s if done > 1 and self.animating_s > 0 else 0.0


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


Observer = Callable[[Progress], None]


class Rows(Protocol):
    """The rows of a run in its workers."""

    def __iter__(self) -> Iterator[Sequence[ResultRow]]:
        """The results as they come."""

    def drain(self) -> None:
        """Begins no other rows; those in an engine go on to their results."""

    @property
    def is_drained(self) -> bool:
        """Whether it is known, after `drain`, that no row is left in any worker."""


Execute = Callable[[RunPlan], AbstractContextManager[Rows]]
"""Opens workers and gives them the rows; closing it stops the workers at once."""


def run(config: CatalogConfig, execute: Execute, *, observe: Observer = lambda progress: None) -> RunSummary:
    """Animates the catalogue's pending rows and leaves results, gallery and ledger in the output.

    Raises:
        JobError: the run cannot start, or its workers cannot; what is committed stays committed.
    """
    started = time.monotonic()
    state = _State(observe)
    state.show(Progress("planning"))
    config = _with_absolute_paths(config)
    opened = manifest.open_manifest(config)
    state.show(Progress("planning", columns=opened.use.text))
    config = settled(config)
    model_version, style_versions = versions_of(config)
    storage.probe(config.output)
    now = _store_clock(config.output)
    record = ledger.new_run(manifest=config.manifest, model=model_version, config=_recorded(config), now=now)
    with ledger.Lease(config.output, run_id=record.run_id), ledger.Ledger.open(config.output) as run_ledger:
        items = manifest.plan(opened, config, model_version=model_version, style_versions=style_versions)
        planned = run_ledger.plan(items, run=record, retry=config.retry, remake=config.remake)
        plan = RunPlan(config, record.run_id, planned.items_uri, planned.num_pending, style_versions)
        ending: Ending = "finished"
        try:
            state.progress = _planned(planned)
            if planned.num_pending:
                state.show(state.progress)
                ending = _animate(plan, execute, run_ledger, state, started=started)
        finally:
            # Also when the workers could not go on, because their results are worth seeing.
            state.show(replace(state.progress, phase="writing"))
            run_ledger.finish(planned.run)
            gallery_uri = _write_gallery(config.output)
        progress = replace(state.progress, phase="ended")
        only_now = progress.num_failed_in_all == progress.num_failed
        errors = progress.errors if only_now else ledger.summary(run_ledger).errors
    state.show(progress)
    return RunSummary(
        run_id=record.run_id,
        output=config.output,
        ending=ending,
        progress=progress,
        seconds=time.monotonic() - started,
        errors=errors,
        results_uri=ledger.results_uri(config.output),
        gallery_uri=gallery_uri,
    )


@dataclass
class _State:
    """The latest progress of a run; `show` sets it and hands it to the observer."""

    observe: Observer
    progress: Progress = field(default_factory=lambda: Progress("planning"))

    def show(self, progress: Progress) -> None:
        self.progress = progress
        self.observe(progress)


def _planned(planned: ledger.Planned) -> Progress:
    return Progress(
        "starting",
        num_items=planned.num_items,
        num_before=planned.num_succeeded_before,
        num_failed_before=planned.num_failed_before,
        num_rejected=planned.num_rejected,
        num_pending=planned.num_pending,
    )


def _animate(plan: RunPlan, execute: Execute, run_ledger: ledger.Ledger, state: _State, *, started: float) -> Ending:
    """Runs the pending rows and records their results; how it ended.

    Records of attempts that no worker's death has made count against no row, so they go when the workers have.
    """
    deadline_s = plan.config.deadline_s
    ending: Ending = "finished"
    try:
        with stop_on_signals() as stop:
            deadline = started + deadline_s if deadline_s is not None else math.inf
            run_stop = _Stop(stop, deadline=deadline, grace_s=grace_of(plan.config.grace_s))
            states = _follow(plan, execute, run_ledger, state.progress, started=started, stop=run_stop)
            with closing(states):
                for progress in states:
                    ending = run_stop.ending if progress.num_left else "finished"
                    try:
                        state.show(progress)
                    except KeyboardInterrupt:  # the observer's own
                        if stop.is_set():
                            raise
                        stop.set()
    except KeyboardInterrupt:
        ending = "interrupted"
    finally:
        with suppress(StorageError):
            ledger.remove_attempts_of_run(plan.config.output, plan.run_id)
    return ending


class _Stop:
    """Whether, why and since when a run begins no more rows."""

    def __init__(self, requested: threading.Event, *, deadline: float, grace_s: float) -> None:
        self._requested = requested
        self._deadline = deadline
        self._grace_s = grace_s
        self._ends_at = math.inf
        self.ending: Ending = "finished"
        """The ending of a run that stops now with rows left."""

    def begins(self, now: float) -> bool:
        """Whether it is now that the run is to begin no more rows."""
        if self.ending != "finished" or not (self._requested.is_set() or now > self._deadline):
            return False
        self.ending = "interrupted" if self._requested.is_set() else "deadline"
        self._ends_at = now + self._grace_s
        return True

    def is_over(self, now: float) -> bool:
        """Whether the rows that went on have had their time."""
        return now >= self._ends_at


def settled(config: CatalogConfig) -> CatalogConfig:
    """The same config for workers anywhere: local paths are absolute, hub revisions pinned.

    Raises:
        WeightsError: the model, or that of a style, cannot be found.
    """
    config = _with_absolute_paths(config)
    styles = {style: weights.pin(model) for style, model in config.styles.items()}
    return config.model_copy(update={"model": weights.pin(config.model), "styles": styles})


def versions_of(config: CatalogConfig) -> tuple[str, dict[str, str]]:
    """The version of the run's own model, and those of its styles' models by style.

    Raises:
        WeightsError: a model cannot be found.
    """
    return weights.version(config.model), {style: weights.version(model) for style, model in config.styles.items()}


def _with_absolute_paths(config: CatalogConfig) -> CatalogConfig:
    def absolute(uri: str) -> str:
        if not uri or storage.is_s3(uri):
            return uri
        slash = "/" if uri.endswith("/") else ""  # says that it is a folder, also where none is yet
        return str(storage.local_path(uri).absolute()).rstrip("/") + slash

    config = manifest.with_absolute_references(config)
    return config.model_copy(update={"output": absolute(config.output), "manifest": absolute(config.manifest)})


def _store_clock(output: str) -> datetime:
    try:
        return storage.clock(output)
    except StorageError as error:
        raise OutputError(f"the output {output} cannot be used: {error.message}") from None


def _recorded(config: CatalogConfig) -> dict[str, Any]:
    """The config as a run's record holds it: without the signatures of URLs."""
    values = config.model_dump(mode="json")
    models = (values["model"], *values["styles"].values())
    for defaults in (values["defaults"], *(model["defaults"] for model in models)):
        defaults |= {knob: manifest.redacted(defaults[knob]) for knob in REFERENCE_KNOBS if defaults.get(knob)}
    return values


def _follow(
    plan: RunPlan, execute: Execute, run_ledger: ledger.Ledger, progress: Progress, *, started: float, stop: _Stop
) -> Generator[Progress, None, None]:
    """Takes results as they come until all are there, or the run has stopped."""
    refresh_at = time.monotonic() + REFRESH_S
    with execute(plan) as results:
        reader = _ResultReader(iter(results))
        while (rows := reader.take(timeout_s=0.5)) is not None:
            now = time.monotonic()
            if rows:
                run_ledger.append(rows)
                progress = _count(progress, rows, now - started)
            else:
                run_ledger.flush_if_due()
            if progress.num_left and stop.begins(now):
                results.drain()
                progress = replace(progress, phase="stopping")
            yield progress
            if stop.is_over(now) or (not rows and stop.ending != "finished" and results.is_drained):
                return
            if now > refresh_at:
                try:
                    run_ledger.write_results()
                    _write_gallery(plan.config.output)
                except OutputError as error:
                    log.warning("results.parquet is left as it was for now: %s", error)
                refresh_at = time.monotonic() + max(REFRESH_S, 20 * (time.monotonic() - now))


def _write_gallery(output: str) -> str | None:
    """The URI of the gallery; None where it could not be written."""
    try:
        return gallery.write_gallery(output)
    except (OutputError, StorageError) as error:
        log.warning("the gallery could not be written (`pia-ray gallery %s` tries again): %s", output, error)
        return None


def _count(progress: Progress, rows: Sequence[ResultRow], since_start_s: float) -> Progress:
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
        animating_s=since_start_s - first_s,
    )


class _ResultReader:
    """Reads a blocking iterator on a thread, so that the run can check its deadline and be interrupted meanwhile."""

    def __init__(self, results: Iterator[Sequence[ResultRow]]) -> None:
        self._results = results
        self._queue: queue.SimpleQueue[Sequence[ResultRow] | BaseException | None] = queue.SimpleQueue()
        # A daemon: it may be blocked inside the executor, which is closed while this thread still reads.
        threading.Thread(target=self._read, name="results", daemon=True).start()

    def take(self, *, timeout_s: float) -> Sequence[ResultRow] | None:
        """The next results; nothing within the time gives an empty list, the end gives None."""
        try:
            item = self._queue.get(timeout=timeout_s)
        except queue.Empty:
            return []
        if isinstance(item, PiaRayError):
            raise item
        if isinstance(item, BaseException):
            raise JobError(f"the workers stopped: {type(item).__name__}: {item}") from item
        return item

    def _read(self) -> None:
        try:
            for rows in self._results:
                self._queue.put(rows)
            self._queue.put(None)
        except BaseException as error:  # noqa: BLE001 - carried to the thread that asks
            self._queue.put(error)
