"""One catalogue run from plan to summary, with any executor: probe, lease, plan, execute, record, report.

The process that runs this is the only writer of ledger parts. It keeps hashes and counts, never the rows.
"""

from __future__ import annotations

import contextvars
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
from typing import Final, Literal, Protocol

from pia_ray import ledger, manifest, storage
from pia_ray.catalog import gallery
from pia_ray.catalog.outage import Outage
from pia_ray.catalog.settling import recorded, settled, versions_of, with_absolute_paths
from pia_ray.catalog.stopping import Ending, RunStop, grace_of, stop_on_signals
from pia_ray.catalog.verdicts import Verdicts, judged
from pia_ray.config.catalog import CatalogConfig
from pia_ray.errors import JobError, OutputError, PiaRayError, StorageError
from pia_ray.types import FAILED, ResultRow

log = logging.getLogger(__name__)

REFRESH_S: Final = 300.0
"""Least time between two writings of results.parquet and the gallery while a run goes on."""

Phase = Literal["planning", "starting", "animating", "stopping", "writing", "ended"]


@dataclass(frozen=True)
class RunPlan:
    """The pending rows of a run, and what an executor needs to know of it."""

    config: CatalogConfig
    run_id: str
    items_uri: str
    num_pending: int
    style_versions: Mapping[str, str] = field(default_factory=dict)
    """Versions of the models in `config.styles`, by style."""
    outage: Outage = field(default_factory=Outage)
    """Calls of this process that wait for the store, for executors to share with their workers."""


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
    outage: str = ""
    """Why the run waits for a store that is away; empty where it does not."""
    num_waiting: int = 0
    """Finished animations that wait for the store."""

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
        OutputUnavailable, ManifestUnavailable, HubUnavailable: `patience_s` is spent.
        TooManyFailures: the run stopped for its failures.
    """
    state = _State(observe)
    with storage.patience(config.patience_s, notice=state.note_outage):
        return _run(config, execute, state, started=time.monotonic())


def _run(config: CatalogConfig, execute: Execute, state: _State, *, started: float) -> RunSummary:
    state.show(Progress("planning"))
    config = with_absolute_paths(config)
    opened = manifest.open_manifest(config)
    state.show(Progress("planning", columns=opened.use.text))
    config = settled(config)
    model_version, style_versions = versions_of(config)
    storage.probe(config.output, folders=("videos", "thumbnails"))
    now = _store_clock(config.output)
    record = ledger.new_run(manifest=", ".join(config.manifests), model=model_version, config=recorded(config), now=now)
    with (
        ledger.Lease(config.output, run_id=record.run_id),
        ledger.Ledger.open(config.output, patience_s=config.patience_s) as run_ledger,
    ):
        items = manifest.plan(opened, config, model_version=model_version, style_versions=style_versions)
        planned = run_ledger.plan(items, run=record, retry=config.retry, remake=config.remake)
        plan = RunPlan(config, record.run_id, planned.items_uri, planned.num_pending, style_versions)
        ending: Ending = "finished"
        try:
            state.progress = _planned(planned)
            if planned.num_pending:
                state.show(state.progress)
                ending = _animate(plan, execute, run_ledger, state, started=started)
        except OutputError:
            # Videos hold what the output does not take now: the next run finds them.
            with storage.hurry(), suppress(OutputError):
                _finish(run_ledger, planned.run, state)
            raise
        except BaseException:
            _finish(run_ledger, planned.run, state)  # also their results are worth seeing
            raise
        gallery_uri = _finish(run_ledger, planned.run, state)
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
    lock: threading.RLock = field(default_factory=threading.RLock)

    def show(self, progress: Progress) -> None:
        with self.lock:
            self.progress = progress
            self.observe(progress)

    def note_outage(self, reason: str) -> None:
        """A notice for `storage.patience`; threads that read for the run call it too."""
        with self.lock:
            self.show(replace(self.progress, outage=reason))


def _finish(run_ledger: ledger.Ledger, record: ledger.RunRecord, state: _State) -> str | None:
    """Writes what is left of the run; the URI of the gallery, or None where it could not be written."""
    state.show(replace(state.progress, phase="writing"))
    run_ledger.finish(record)
    return _write_gallery(run_ledger.output)


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
            run_stop = RunStop(stop, deadline=deadline, grace_s=grace_of(plan.config.grace_s))
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
        with storage.hurry(), suppress(StorageError):
            ledger.remove_attempts_of_run(plan.config.output, plan.run_id)
    return ending


def _store_clock(output: str) -> datetime:
    try:
        return storage.clock(output)
    except StorageError as error:
        raise OutputError(f"the output {output} cannot be used: {error.message}") from None


def _follow(
    plan: RunPlan, execute: Execute, run_ledger: ledger.Ledger, progress: Progress, *, started: float, stop: RunStop
) -> Generator[Progress, None, None]:
    """Takes results as they come until all are there, or the run has stopped."""
    refresh_at = time.monotonic() + REFRESH_S
    verdicts = Verdicts(plan.config, num_pending=progress.num_pending)
    with execute(plan) as results:
        reader = _ResultReader(iter(results))
        while (rows := reader.take(timeout_s=0.5)) is not None:
            now = time.monotonic()
            with storage.hurry():
                if rows:
                    run_ledger.append(verdicts.take(rows))
                else:
                    run_ledger.flush_if_due()
            progress = _count(progress, judged(rows), now - started)
            if progress.num_left and stop.begins(now):
                results.drain()
                progress = replace(progress, phase="stopping")
            yield replace(progress, outage=plan.outage.reason, num_waiting=plan.outage.num_animations)
            if verdicts.stop is not None:
                raise verdicts.stop
            if stop.is_over(now) or (not rows and stop.ending != "finished" and results.is_drained):
                run_ledger.append(verdicts.held())
                return
            if now > refresh_at:
                try:
                    with storage.hurry():
                        run_ledger.write_results()
                        _write_gallery(plan.config.output)
                except OutputError as error:
                    log.warning("results.parquet is left as it was for now: %s", error)
                refresh_at = time.monotonic() + max(REFRESH_S, 20 * (time.monotonic() - now))
        run_ledger.append(verdicts.held())


def _write_gallery(output: str) -> str | None:
    """The URI of the gallery; None where it could not be written."""
    try:
        return gallery.write_gallery(output)
    except (OutputError, StorageError) as error:
        log.warning("the gallery could not be written (`pia-ray gallery %s` tries again): %s", output, error)
        return None


def _count(progress: Progress, rows: Sequence[ResultRow], since_start_s: float) -> Progress:
    if not rows:
        return progress
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
        context = contextvars.copy_context()
        threading.Thread(target=context.run, args=(self._read,), name="results", daemon=True).start()

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
