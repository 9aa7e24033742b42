"""The three steps chained for one row, with its attempt record, its retries and its result. Knows no Ray.

An error of a row becomes a failed row; only an error that spoils the process is raised. Each step has a time limit that
holds also where its thread hangs.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError
from functools import partial
from typing import Final, TypeVar

from pia_ray import ledger, storage
from pia_ray.animation import Animation, RowAnimator
from pia_ray.catalog import steps
from pia_ray.catalog.rows.attempt_records import AttemptRecords
from pia_ray.catalog.rows.failures import given_up, row_error, without_video
from pia_ray.catalog.rows.in_flight import InFlight, InFlightRows, OnStage
from pia_ray.catalog.rows.outage import Outage, OutageState, Sources
from pia_ray.catalog.rows.patient_stages import PatientStages
from pia_ray.catalog.rows.prefetch import PrefetchTuner
from pia_ray.catalog.rows.retakes import RowTakes
from pia_ray.catalog.rows.row_lock import RowLock
from pia_ray.catalog.rows.row_threads import RowThreads
from pia_ray.catalog.rows.tries import STORE_AWAY, Tries, TurnWaits
from pia_ray.config.catalog import CatalogConfig
from pia_ray.errors import DeviceLost, JobError, OutOfMemory, OutputError, RowError, row_errors
from pia_ray.formatting import first_line
from pia_ray.result_row import FAILED, ResultRow
from pia_ray.types import AnimationRequest, ManifestRow

log = logging.getLogger(__name__)

T = TypeVar("T")

MOST_HUNG: Final = 8
"""Threads of stages that hang in a process that is ended with one more of them."""

STOP_S: Final = 10.0
"""Seconds that videos which are being written have to end when the worker is stopped at once."""


class CatalogWorker:
    """Animates rows of one run with one warm animator; `work` may be called by several threads at once.

    `replace_animator` makes the animator to go on with where this one hangs. Left out: the process has to end, and
    `work` raises. `node` is the worker's node, and `node_lives` says whether one has not been lost. The run has
    `num_workers` at most, which share its rate of requests to a picture host. With `first_alone` the first row has the
    engine to itself, so that its video is there sooner.
    """

    def __init__(
        self,
        config: CatalogConfig,
        *,
        run_id: str,
        animator: RowAnimator,
        replace_animator: Callable[[], RowAnimator] | None = None,
        node: str = "",
        node_lives: Callable[[str], bool] = lambda node: True,
        on_stage: OnStage = lambda stage, seconds: None,
        num_workers: int = 1,
        first_alone: bool = False,
    ) -> None:
        storage.declare_buckets(anonymous=config.s3_anonymous, requester_pays=config.s3_requester_pays)
        self._config = config
        self._run_id = run_id
        self.animator = animator
        self._replace_animator = replace_animator
        self._node = node
        self._lock = RowLock()
        self._outage = Outage()
        self._sources = Sources(self._outage, patience_s=config.patience_s)
        self._rows = InFlightRows(hang_timeout_s=config.hang_timeout_s, on_stage=on_stage, first_alone=first_alone)
        self._stages = self._rows.stages
        self._draining = threading.Event()
        self._stopped = threading.Event()
        self._patient = PatientStages(self._stages, self._outage, config, stopped=self._stopped)
        self._records = AttemptRecords(
            config, run_id=run_id, node=node, node_lives=node_lives, rows=self._rows, patient=self._patient
        )
        self._web = steps.web_of(config, num_workers=num_workers, stopped=self._draining)

    def work(self, row: ManifestRow) -> ResultRow | None:
        """The result of the row, whose video is committed before this returns; None where it was stopped before.

        Trouble of the output is not a row's: the row waits for it, and if it stays, comes back with the code of a
        `JobError`, which is no verdict and is not to be recorded.

        Raises:
            JobError: the process is spoiled and needs a new one; the row's attempt record stays behind.
        """
        try:
            with self._rows.enter(row) as entry:
                return self._work(row, entry)
        except CancelledError:
            return None

    def drain(self) -> None:
        """Begins no other row, and takes back those that are not in the engine yet; the others go on."""
        self._draining.set()
        self._lock.wake()
        self._rows.cancel_waiting()

    def stop(self) -> None:
        """Takes back all rows but those whose video is being written, which have `STOP_S` to end."""
        self._stopped.set()
        self.drain()
        self._rows.cancel()
        if not self._rows.wait_until_empty(timeout_s=STOP_S):
            self._stages.cancel(spared=True)
        self._stages.wait_until_undone(timeout_s=STOP_S)
        self._records.close(timeout_s=STOP_S)

    def threads(self, num_rows: int) -> RowThreads:
        """Threads for calls of `work`: for so many rows at once, or more where `prefetch` is "auto" and it pays."""
        least, most = self._config.prefetch_range
        tuner = PrefetchTuner(
            self._rows, batch_size=lambda: self.animator.batch_size, least=num_rows, most=num_rows + most - least
        )
        return RowThreads(num_rows, tune=tuner)

    @property
    def is_draining(self) -> bool:
        """Whether it begins no other row."""
        return self._draining.is_set()

    @property
    def num_in_flight(self) -> int:
        """The number of rows that have been begun and have no result yet."""
        return len(self._rows)

    @property
    def outage(self) -> OutageState:
        """The outage that rows wait out."""
        return self._outage.state

    @property
    def rows(self) -> InFlightRows:
        """The rows that it has begun, for those who count them."""
        return self._rows

    @property
    def state(self) -> ledger.WorkerState:
        """The state of this worker, for those who watch the run."""
        outage = self.outage
        return ledger.WorkerState(
            worker=steps.worker_name(),
            run_id=self._run_id,
            node=self._node,
            rows=self._rows.shown(),
            busy_share=self._rows.engine.busy_share,
            outage=f"{outage.what} is away: {outage.reason}" if outage.reason else "",
            num_waiting=outage.num_animations,
        )

    def _work(self, row: ManifestRow, entry: InFlight) -> ResultRow:
        with self._lock.hold(alone=False, given_up=self._draining.is_set) as held:
            if not held:
                raise CancelledError
            begun = self._begin(row, entry)
            if isinstance(begun, ResultRow):
                return begun
            takes, deaths, alone = begun
            if not alone:
                try:
                    return self._attempt(takes, entry, num_deaths=len(deaths), alone=False)
                except CancelledError:
                    if not entry.suspected or self._draining.is_set():
                        raise
        with self._lock.hold(alone=True, given_up=self._draining.is_set) as held:
            if not held:
                raise CancelledError
            return self._attempt_alone(takes, entry, deaths)

    def _begin(
        self, row: ManifestRow, entry: InFlight
    ) -> tuple[RowTakes, list[ledger.AttemptRecord], bool] | ResultRow:
        """The row's takes until now, the deaths that count against it, and whether it has to run alone.

        The row's result where it has ended before, or does now. The record is written once the row is let in, so a row
        that only waits is not charged with a death.
        """
        try:
            starts = self._rows.take_room(entry, self.animator)
            takes, entry.record, entry.earlier = self._records.begin(row, lambda: self._takes(row), starts=starts)
            if (ended := takes.result) is not None:
                self._records.remove_later(() if entry.record is None else (entry.record,))
                return ended
            deaths, alone = self._records.deaths(entry.earlier)
            if entry.record is None and not alone:
                entry.record = self._records.begin_again(row, alone=False)
        except OutputError as error:
            return self._failed(row, error, attempts=1)
        except (CancelledError, JobError):
            raise
        except Exception as error:  # noqa: BLE001 - the row boundary
            return self._failed(row, row_error(error), attempts=1)
        return takes, deaths, alone

    def _takes(self, row: ManifestRow) -> RowTakes:
        published, model = steps.committed(row, self._config), self.animator.version_of(row.params.style)
        return RowTakes(row, self._config, run_id=self._run_id, model=model, published=published)

    def _attempt_alone(self, takes: RowTakes, entry: InFlight, deaths: list[ledger.AttemptRecord]) -> ResultRow:
        config, row = self._config, takes.row
        # The first death may have been a neighbour's doing; since then the row was alone, and each one was its own.
        certain = any(record.alone or record.state == "timeout" for record in deaths)
        if len(deaths) >= config.max_attempts and certain:
            # The records stay until the failure is in the ledger: should this worker die of another row before its
            # answer is out, this row must not be tried all over again.
            takes.add(failed := self._failed(row, given_up(deaths), attempts=len(deaths)))
            return takes.shown or failed
        try:
            entry.record = self._records.begin_again(row, alone=True)
        except OutputError as error:
            return self._failed(row, error, attempts=len(deaths) + 1)
        except CancelledError:
            raise
        except Exception as error:  # noqa: BLE001 - the row boundary
            return self._failed(row, row_error(error), attempts=1)
        return self._attempt(takes, entry, num_deaths=len(deaths), alone=True)

    def _attempt(self, takes: RowTakes, entry: InFlight, *, num_deaths: int, alone: bool) -> ResultRow:
        try:
            result = self._take_all(takes, entry, num_deaths=num_deaths, alone=alone)
        except OutputError as error:
            self._records.remove_own(entry)
            return self._failed(takes.row, error, attempts=num_deaths + 1)
        except CancelledError:
            self._records.remove_own(entry)
            raise
        except JobError:
            uncounted = entry.record is not None and entry.record.state in ("waiting", "animating")
            if uncounted and (entry.started or alone):
                assert entry.record is not None
                self._rows.set_state(entry.record, "died")  # without Ray nobody else sees the device's end
            raise
        self._records.remove_later(entry.records)
        return result

    def _take_all(self, takes: RowTakes, entry: InFlight, *, num_deaths: int, alone: bool) -> ResultRow:
        """The result after as many takes as the row needs and may have."""
        while (result := takes.result) is None:
            try:
                made = self._try(takes, entry, num_deaths=num_deaths, alone=alone)
            except CancelledError:
                if takes.shown is None or (entry.suspected and not alone):
                    raise
                return takes.shown  # the next run goes on
            if made.status == FAILED and (takes.is_first or row_errors()[made.error_code or ""].fault == "world"):
                return takes.shown or made
            takes.add(made)
        if result.status == FAILED:
            log.warning("row %s failed: %s", result.id, result.error_code)
        return result

    def _try(self, takes: RowTakes, entry: InFlight, *, num_deaths: int, alone: bool) -> ResultRow:
        """The result of the next take after as many tries as it may have."""
        config, row = self._config, takes.next_row
        tries = Tries(row, config, self._sources, used=num_deaths)
        outputs: steps.Outputs | None = None
        while True:
            tries.used += 1
            over = threading.Event()
            try:
                # A finished animation is not made again because the store is away.
                made = outputs or self._make(takes, entry, alone=alone, attempts=tries.used)
                if isinstance(made, ResultRow):
                    return made
                outputs = made
                replaces = takes.shown is not None
                commit = partial(steps.commit, outputs, attempts=tries.used, replaces=replaces, given_up=over.is_set)
                return self._patient.use_output(
                    "writing the video", commit, limit_s=config.publish_timeout_s, num_animations=1, spared=True
                )
            except (JobError, CancelledError):
                raise
            except Exception as error:  # noqa: BLE001 - the row boundary
                over.set()  # a put that has not begun never begins: the row may have failed by then
                if isinstance(error, STORE_AWAY) and self._draining.is_set():
                    raise CancelledError from None  # the stop has ended its wait
                attempts = tries.used
                if not tries.has_another(error):
                    return self._failed(row, row_error(error), attempts=attempts)
                log.info("row %s, try %d of %d: %s", row.id, attempts, config.max_attempts, error)
                if isinstance(error, TimeoutError):
                    self._require_threads(entry)
                alone = alone or isinstance(error, OutOfMemory)
            if (self._stopped if outputs else self._draining).wait(tries.pause_s):
                raise CancelledError

    def _make(self, takes: RowTakes, entry: InFlight, *, alone: bool, attempts: int) -> steps.Outputs | ResultRow:
        config, row = self._config, takes.next_row
        if self._draining.is_set():
            raise CancelledError
        entry.begin(attempt=attempts)
        waits = TurnWaits()
        fetched = takes.fetched
        if fetched is None or takes.is_first:
            fetched = self._patient.read(
                "fetching the picture",
                lambda: steps.fetch(row, config, web=self._web.noting(waits.note)),
                limit_s=config.fetch_timeout_s,
                stopped=self._draining,
                may_wait=waits.since_last,
            )
            self._sources.answered(row)
        takes.fetched = fetched
        entry.picture_bytes = 3 * fetched.image.width * fetched.image.height
        request = steps.request_of(row, fetched, deadline_s=config.row_timeout_s)
        animation = self._animate(request, entry, alone=alone)
        entry.enter_stage("publish")
        encode = partial(
            steps.encode_outputs,
            animation,
            row,
            fetched=fetched,
            config=config,
            run_id=self._run_id,
            attempts=attempts,
            judged=takes.judged,
            publishes=takes.publishes,
        )
        return self._stages.call("encoding the video", encode, limit_s=config.publish_timeout_s, spared=True)

    def _animate(self, request: AnimationRequest, entry: InFlight, *, alone: bool) -> Animation:
        """The animation, by the next animator too where one is replaced meanwhile.

        Raises:
            TimeoutError: the engine hung, and the row is charged with it.
            CancelledError: the run stops; or the engine hung over this row and others, which is to run alone.
            DeviceLost: the engine hangs, and the process has to end.
        """
        limit_s = self._config.row_timeout_s + self._config.hang_timeout_s
        while True:
            animator = self.animator
            if self._draining.is_set():
                raise CancelledError
            if entry.suspected and not alone:
                raise CancelledError
            future = entry.submit(animator, request, alone=alone)
            if self._draining.is_set() and not entry.started:  # it may have come too late for `drain` to see it
                future.cancel()
            if entry.wait(limit_s) or (not entry.started and entry.wait(self._config.row_timeout_s)):
                try:
                    return future.result()
                except CancelledError:
                    if animator is self.animator:
                        raise
                    continue
            self._end_hang(animator, entry)

    def _end_hang(self, animator: RowAnimator, entry: InFlight) -> None:
        """Replaces the animator, unless another row's thread has done so.

        Raises:
            TimeoutError: only this row hung.
            DeviceLost: the process has to end; the records say which row is charged.
        """
        with self._rows.lock:
            if animator is not self.animator:
                return
            guilty = self._rows.is_only_hung(entry)
            text = f"animating has not ended within {self._config.row_timeout_s:g} s, and the engine does not answer"
            if self._replace_animator is None:
                self._rows.charge(entry if guilty else None)
                raise DeviceLost(f"row {entry.row_id}: {text}")
            log.warning("row %s: %s: the engine is replaced", entry.row_id, text)
            self.animator = self._replace_animator()
            if self.animator is animator:  # there is no other one
                guilty = True
                entry.cancel()
            else:
                self._rows.leave(animator, suspected=not guilty)
        if guilty:
            raise TimeoutError(text)

    def _require_threads(self, entry: InFlight) -> None:
        """Ends a process in which too many threads hang.

        Raises:
            DeviceLost: that is so.
        """
        if self._replace_animator is None and self._stages.num_hung > MOST_HUNG:
            with self._rows.lock:
                self._rows.charge(entry)
            raise DeviceLost(f"{self._stages.num_hung} stages of rows hang in this process")

    def _failed(self, row: ManifestRow, error: RowError | OutputError, *, attempts: int) -> ResultRow:
        """The row with its failure; after one of the output without a verdict."""
        verdict = "is put off" if isinstance(error, OutputError) else f"failed: {error.code}"
        log.warning("row %s %s: %s", row.id, verdict, first_line(error))
        version = self.animator.version_of(row.params.style)
        return without_video(row, error, model=version, run_id=self._run_id, attempts=attempts)
