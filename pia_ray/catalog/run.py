"""One catalogue run from plan to summary, with any executor: probe, lease, plan, execute, record, report.

The process that runs this is the only writer of ledger parts. It keeps hashes and counts, never the rows.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, suppress
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Final, Protocol

from pia_ray import ledger, logs, manifest, storage
from pia_ray.animation import RowAnimator
from pia_ray.catalog import gallery
from pia_ray.catalog.progress import Progress, RunSummary, counted
from pia_ray.catalog.result_reader import ResultReader
from pia_ray.catalog.retaking import RetakePlan
from pia_ray.catalog.review.apply import decide
from pia_ray.catalog.review.verdict_file import Verdict, read_review
from pia_ray.catalog.rows.outage import OutageState, what_is_away
from pia_ray.catalog.run_end import EndPost, Summary, summary_of_end, summary_of_trouble, write_summary
from pia_ray.catalog.settling import recorded, settled, versions_of, with_absolute_paths
from pia_ray.catalog.start_phases import phases_in_words, start_phases
from pia_ray.catalog.stopping import Ending, RunStop, grace_of, stop_on_signals
from pia_ray.catalog.verdicts import Verdicts, judged
from pia_ray.config.catalog import CatalogConfig
from pia_ray.errors import OutputError, PiaRayError, StorageError
from pia_ray.media.marking import check_signing
from pia_ray.result_row import ResultRow

log = logging.getLogger(__name__)

REFRESH_S: Final = 300.0
"""Least time between two writings of results.parquet and the gallery while a run goes on."""


@dataclass(frozen=True)
class RunPlan:
    """The pending rows of a run, and what an executor needs to know of it."""

    config: CatalogConfig
    run_id: str
    items_uri: str
    num_pending: int
    style_versions: Mapping[str, str] = field(default_factory=dict)
    """Versions of the models in `config.styles`, by style."""


Observer = Callable[[Progress], None]


class Rows(Protocol):
    """The rows of a run in its workers."""

    def __iter__(self) -> Iterator[Sequence[ResultRow]]:
        """The results as they come."""

    @property
    def start(self) -> str:
        """The workers' state before the first result, in words: downloads, loading, steps of the first row."""

    @property
    def opening(self) -> str:
        """A name for what it took to open them: "Ray", or "model"."""

    @property
    def start_s(self) -> Mapping[str, float]:
        """Seconds of the start of the first worker by phase, as far as they are known."""

    def drain(self) -> None:
        """Begins no other rows; those in an engine go on to their results."""

    @property
    def is_drained(self) -> bool:
        """Whether it is known, after `drain`, that no row is left in any worker."""

    @property
    def outage(self) -> OutageState:
        """The outage that workers wait out."""


MakeAnimator = Callable[[CatalogConfig, int], RowAnimator]
"""Makes one actor's animator from the config and the CPU threads it may use. Sent to the actors, so it must pickle."""

Execute = Callable[[RunPlan], AbstractContextManager[Rows]]
"""Opens workers and gives them the rows; closing it stops the workers at once."""


def run(config: CatalogConfig, execute: Execute, *, observe: Observer = lambda progress: None) -> RunSummary:
    """Animates the catalogue's pending rows and leaves results, gallery and ledger in the output.

    Raises:
        JobError: the run cannot start, or its workers cannot; what is committed stays committed.
        OutputUnavailable, ManifestUnavailable, HubUnavailable: `patience_s` is spent.
        TooManyFailures: the run stopped for its failures.
    """
    state, post, started = _State(observe), EndPost(config), time.monotonic()
    try:
        with storage.patience(config.patience_s, notice=state.note_outage):
            summary = _run(config, execute, state, started=started)
    except (Exception, KeyboardInterrupt) as error:
        post.send(state.end or _trouble(error, config, state, started=started))
        raise
    post.send(state.end or summary_of_end(summary, config))
    return summary


def _trouble(error: BaseException, config: CatalogConfig, state: _State, *, started: float) -> Summary:
    seconds = time.monotonic() - started
    return summary_of_trouble(error, config, run_id=state.run_id, progress=state.progress, seconds=seconds)


def _run(config: CatalogConfig, execute: Execute, state: _State, *, started: float) -> RunSummary:
    state.show(Progress("planning"))
    config = with_absolute_paths(config)
    check_signing(config, format=config.format)
    opened = manifest.open_manifest(config)
    state.show(Progress("planning", columns=opened.use.text))
    verdicts = read_review(config.review) if config.review else ()
    storage.check_writable(config.output)  # before a hub is asked
    config = settled(config)
    model_version, style_versions = versions_of(config)
    storage.probe(config.output, folders=("videos", "thumbnails"))
    now = _store_clock(config.output)
    record = ledger.new_run(manifest=", ".join(config.manifests), model=model_version, config=recorded(config), now=now)
    state.run_id = record.run_id
    with (
        logs.process_fields(run_id=record.run_id),
        ledger.Lease(config.output, run_id=record.run_id, partition=config.partition_of),
        ledger.Ledger.open(config.output, patience_s=config.patience_s) as run_ledger,
    ):
        try:
            _review(verdicts, run_ledger, state)
            planned = _plan(opened, config, run_ledger, record, style_versions)
            plan = RunPlan(config, record.run_id, planned.items_uri, planned.num_pending, style_versions)
            summary = _run_planned(plan, planned, execute, run_ledger, state, started=started)
        except BaseException as error:
            state.end = _trouble(error, config, state, started=started)
            with storage.hurry():
                write_summary(config.output, state.end)
            raise
        state.end = summary_of_end(summary, config)
        write_summary(config.output, state.end)
    state.show(summary.progress)
    return summary


def _review(verdicts: Sequence[Verdict], run_ledger: ledger.Ledger, state: _State) -> None:
    """Records the verdicts of a review."""
    if not verdicts:
        return
    decided = decide(verdicts, run_ledger)
    run_ledger.rewrite(decided.rows)
    for text in decided.warnings:
        log.warning("%s", text)
    state.show(Progress("planning", review=decided.text))


def _plan(
    opened: manifest.Manifest,
    config: CatalogConfig,
    run_ledger: ledger.Ledger,
    record: ledger.RunRecord,
    style_versions: Mapping[str, str],
) -> ledger.Planned:
    return run_ledger.plan(
        manifest.plan(opened, config, model_version=record.model, style_versions=style_versions),
        run=record,
        retry=config.retry,
        remake=config.remake,
        retaking=RetakePlan(config),
        partition=config.partition_of,
    )


def _run_planned(
    plan: RunPlan,
    planned: ledger.Planned,
    execute: Execute,
    run_ledger: ledger.Ledger,
    state: _State,
    *,
    started: float,
) -> RunSummary:
    ending: Ending = "finished"
    output = plan.config.output
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
    run_ledger.check_kept()
    progress = replace(state.progress, phase="ended")
    only_now = progress.num_failed_in_all == progress.num_failed
    return RunSummary(
        run_id=plan.run_id,
        output=output,
        ending=ending,
        progress=progress,
        seconds=time.monotonic() - started,
        errors=progress.errors if only_now else ledger.summary(run_ledger).errors,
        results_uri=ledger.results_uri(output),
        gallery_uri=gallery_uri,
    )


@dataclass
class _State:
    """The latest progress of a run; `show` sets it and hands it to the observer."""

    observe: Observer
    progress: Progress = field(default_factory=lambda: Progress("planning"))
    run_id: str | None = None
    end: Summary | None = None
    """The summary in the output, once it is there."""
    lock: threading.RLock = field(default_factory=threading.RLock)

    def show(self, progress: Progress) -> None:
        with self.lock:
            self.progress = progress
            self.observe(progress)

    def note_outage(self, error: PiaRayError | None) -> None:
        """A notice for `storage.patience`; threads that read for the run call it too."""
        what, reason = ("", "") if error is None else (what_is_away(error), error.message)
        with self.lock:
            self.show(replace(self.progress, away=what, away_reason=reason))


def _finish(run_ledger: ledger.Ledger, record: ledger.RunRecord, state: _State) -> str | None:
    """The URI of the gallery, after all that is left of the run is written; None where it could not be written."""
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

    Records of attempts that no worker's death has made count against no row. They and the workers' go with the workers.
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
            ledger.remove_workers_of_run(plan.config.output, plan.run_id)
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
    share = ledger.BusyShare()
    verdicts = Verdicts(plan.config, num_pending=progress.num_pending)
    opens_at = time.monotonic()
    with execute(plan) as results:
        opened_at = time.monotonic()
        reader = ResultReader(iter(results))
        while (rows := reader.take(timeout_s=0.5)) is not None:
            now = time.monotonic()
            with storage.hurry():
                if rows:
                    run_ledger.append(verdicts.take(rows))
                else:
                    run_ledger.flush_if_due()
            progress = counted(progress, judged(rows), run_id=plan.run_id, since_start_s=now - started, share=share)
            if rows and not progress.start_s:
                progress = _with_start(progress, rows[0], results, opens_at - started, opened_at - opens_at)
            if progress.num_left and stop.begins(now):
                results.drain()
                progress = replace(progress, phase="stopping")
            away = results.outage
            progress = replace(progress, start=results.start if progress.phase == "starting" else "")
            yield replace(progress, away=away.what, away_reason=away.reason, num_waiting=away.num_animations)
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


def _with_start(progress: Progress, row: ResultRow, results: Rows, planning_s: float, opening_s: float) -> Progress:
    phases = start_phases(
        planning_s=planning_s,
        opening=results.opening,
        opening_s=opening_s,
        engine_s=results.start_s,
        row_s=sum(seconds or 0.0 for seconds in (row.fetch_s, row.animate_s, row.publish_s)),
        all_s=progress.first_row_s,
    )
    log.info("start: %s", phases_in_words(phases))
    return replace(progress, start_s=phases)


def _write_gallery(output: str) -> str | None:
    """The URI of the gallery; None where it could not be written."""
    try:
        return gallery.write_gallery(output)
    except (OutputError, StorageError) as error:
        log.warning("the gallery could not be written (`pia-ray gallery %s` tries again): %s", output, error)
        return None
