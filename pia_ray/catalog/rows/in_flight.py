"""The rows that one worker has begun: their attempt records, and their stay in the engine. Knows no steps."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, Future
from contextlib import contextmanager, suppress
from typing import Final

from pia_ray import ledger, logs, storage
from pia_ray.animation import Animation, RowAnimator
from pia_ray.catalog.rows.engine_clock import EngineClock
from pia_ray.catalog.rows.first_row import FirstRow
from pia_ray.catalog.rows.stages import Stages
from pia_ray.errors import StorageError
from pia_ray.types import AnimationRequest, ManifestRow

log = logging.getLogger(__name__)

RECORD_TIMEOUT_S: Final = 120.0
"""Seconds for a change of an attempt record, which the row goes on without."""


OnStage = Callable[[ledger.Stage, float], None]
"""Called with each stage of a row as it ends, and its seconds; on any thread, so it must return at once."""


class InFlight:
    """A row that a worker has begun."""

    def __init__(self, rows: InFlightRows, row_id: str, work_key: str) -> None:
        self.row_id = row_id
        self.work_key = work_key
        self.stage: ledger.Stage = "check"
        self.record: ledger.AttemptRecord | None = None
        self.earlier: tuple[ledger.AttemptRecord, ...] = ()
        """The records that were there before."""
        self.suspected = False
        """Whether the engine hung over this row and others, so that it has to go on alone."""
        self.animator: RowAnimator | None = None
        self.future: Future[Animation] | None = None
        self.started = False
        """Whether the row has been in the engine."""
        self.has_room = False
        """Whether the engine had room for it, so that it starts as soon as it is submitted."""
        self.moved_at = 0.0
        """Time of its latest step."""
        self.begun_at = self.stage_at = time.monotonic()
        """Times at which the row and its stage have begun."""
        self.steps = (0, 0)
        """Denoising steps done, and to do."""
        self.picture_bytes = 0
        """Memory of its decoded picture."""
        self._rows = rows
        self._changed = threading.Event()

    @property
    def records(self) -> tuple[ledger.AttemptRecord, ...]:
        """The records that were there before, then its own."""
        return (*self.earlier, self.record) if self.record is not None else self.earlier

    @property
    def takes_room(self) -> bool:
        """Whether it is in the engine, or in its queue, or has been promised room there."""
        return self.has_room if self.future is None else not self.future.done()

    def enter_stage(self, stage: ledger.Stage) -> None:
        """Says that the row has got to that stage."""
        self._rows.end_stage(self)
        self.stage, self.stage_at = stage, time.monotonic()

    def begin(self, *, attempt: int) -> None:
        """Says that a try of the row begins, which is not in the engine yet."""
        logs.add_fields(attempt=attempt)
        self._rows.num_tries += 1
        self.enter_stage("fetch")
        self.started = False
        self.future = None

    def submit(self, animator: RowAnimator, request: AnimationRequest, *, alone: bool) -> Future[Animation]:
        """The future animation. A row that starts at once is recorded as animating first: it may end the process."""
        with self._rows.first.turn() as is_first:
            return self._submit(animator, request, alone=alone, is_first=is_first)

    def _submit(
        self, animator: RowAnimator, request: AnimationRequest, *, alone: bool, is_first: bool
    ) -> Future[Animation]:
        self.has_room = self.has_room or is_first
        if self._rows.take_room(self, animator) and self.record is not None and self.record.state == "waiting":
            self.record = self._rows.set_state(self.record, "animating")
        self.animator, self.started = animator, False
        self._changed.clear()
        self.enter_stage("queue")
        visit = object()

        def start() -> None:
            self._rows.engine.enter(visit)
            self.enter_stage("animate")
            self._start()

        def end(future: Future[Animation]) -> None:
            self._rows.engine.leave(visit)
            if is_first:
                self._rows.first.end()
            self._changed.set()

        self.future = animator.submit(request, alone=alone or is_first, on_start=start, on_step=self._step)
        self.future.add_done_callback(end)
        return self.future

    def cancel(self) -> None:
        """Takes it out of the animator's queue or batch."""
        if self.future is not None:
            self.future.cancel()

    def wait(self, timeout_s: float) -> bool:
        """Whether the row has left the engine within the time; writes that it is in the engine when that is so."""
        assert self.future is not None
        ends_at = time.monotonic() + timeout_s
        while not self.future.done() and self._changed.wait(max(0.0, ends_at - time.monotonic())):
            self._changed.clear()
            waits = self.record is not None and self.record.state == "waiting" and not self.future.done()
            if waits and self.started:
                assert self.record is not None
                self.record = self._rows.set_state(self.record, "animating")
        return self.future.done()

    def _start(self) -> None:
        self.started, self.moved_at = True, time.monotonic()
        self._changed.set()

    def _step(self, done: int, total: int) -> None:
        self.moved_at, self.steps = time.monotonic(), (done, total)


class InFlightRows:
    """The rows that one worker has begun. With `first_alone` the first one has the engine to itself."""

    def __init__(
        self, *, hang_timeout_s: float, on_stage: OnStage = lambda stage, seconds: None, first_alone: bool = False
    ) -> None:
        self.lock = threading.Lock()
        """Held while a hang is dealt with."""
        self.stages = Stages()
        self.engine = EngineClock()
        self.first = FirstRow(alone=first_alone)
        self.num_tries = 0
        """The tries of all rows until now."""
        self._on_stage = on_stage
        self._hang_timeout_s = hang_timeout_s
        self._entries: set[InFlight] = set()
        self._changed = threading.Condition()

    def __len__(self) -> int:
        return len(self._entries)

    def take_room(self, entry: InFlight, animator: RowAnimator) -> bool:
        """Whether the engine has room for the row, which from now on takes it."""
        with self._changed:
            taken = sum(other.takes_room for other in self._entries if other is not entry)
            entry.has_room = entry.has_room or taken < self.first.room(animator.batch_size)
            return entry.has_room

    @contextmanager
    def enter(self, row: ManifestRow) -> Iterator[InFlight]:
        """A row that is begun for the block."""
        entry = InFlight(self, row.id, row.work_key)
        with self._changed:
            self._entries.add(entry)
        try:
            with logs.block_fields(row_id=row.id):
                yield entry
        finally:
            self.end_stage(entry)
            with self._changed:
                self._entries.discard(entry)
                self._changed.notify_all()

    def end_stage(self, entry: InFlight) -> None:
        """Tells the observer of the stage that the row has been in."""
        self._on_stage(entry.stage, time.monotonic() - entry.stage_at)

    def shown(self) -> tuple[ledger.RowInFlight, ...]:
        """The rows for those who watch the run, the oldest first."""
        now = time.monotonic()
        return tuple(
            ledger.RowInFlight(
                entry.row_id, entry.work_key, entry.stage, stage_s=now - entry.stage_at, age_s=now - entry.begun_at
            )
            for entry in sorted(self._now(), key=lambda entry: entry.begun_at)
        )

    @property
    def furthest_step(self) -> tuple[int, int]:
        """Denoising steps done, and to do, of the row that is furthest; twice 0 where none denoises."""
        return max((entry.steps for entry in self._now()), default=(0, 0))

    @property
    def num_queued(self) -> int:
        """The rows that wait for the engine."""
        return sum(entry.stage == "queue" for entry in self._now())

    @property
    def largest_picture_bytes(self) -> int:
        """Memory of the largest decoded picture; 0 where there is none."""
        return max((entry.picture_bytes for entry in self._now()), default=0)

    def wait_until_empty(self, *, timeout_s: float) -> bool:
        """Whether all rows have ended within the time."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._entries, timeout_s)

    def cancel_waiting(self) -> None:
        """Takes back the rows that have not been in the engine."""
        for entry in self._now():
            if not entry.started:
                entry.cancel()
        self.stages.cancel()

    def cancel(self) -> None:
        """Takes back all rows whose video is not being written."""
        for entry in self._now():
            entry.cancel()
        self.stages.cancel()

    def is_only_hung(self, entry: InFlight) -> bool:
        """Whether no other row hangs with this one: none has begun in its engine, or one has since moved."""
        others = [other for other in self._in_engine(entry.animator) if other is not entry]
        since = time.monotonic() - self._hang_timeout_s
        return entry.started and (not others or any(other.moved_at > since for other in others))

    def charge(self, guilty: InFlight | None) -> None:
        """Prepares the records for the end of the process: that of `guilty` counts, its neighbours' are removed.

        Where no row is known to be guilty, all that have been in the engine are suspects, and none is charged.
        """
        for entry in self._now():
            if entry.record is None:
                continue
            if entry is guilty:
                entry.record = self.set_state(entry.record, "timeout")
            elif guilty is None and entry.started:
                entry.record = self.set_state(entry.record, "suspected")
            else:
                self.remove((entry.record,))
                entry.record = None

    def leave(self, animator: RowAnimator, *, suspected: bool) -> None:
        """Takes all rows out of an animator that has been replaced, which ends when it no longer hangs."""
        for entry in self._in_engine(animator):
            entry.suspected = entry.suspected or suspected
        for entry in self._now():
            if entry.animator is animator:
                entry.cancel()
        threading.Thread(target=animator.close, name="close-hung", daemon=True).start()

    def set_state(self, record: ledger.AttemptRecord, state: ledger.AttemptState) -> ledger.AttemptRecord:
        """The record in its new state, which is written where the store answers."""
        try:
            return self.stages.call(
                "writing an attempt record",
                lambda: ledger.set_attempt_state(record, state),
                limit_s=RECORD_TIMEOUT_S,
                spared=True,
            )
        except (StorageError, TimeoutError) as error:
            log.warning("the attempt record of a row stays as it is: %s", error)
            return record

    def remove(self, records: Iterable[ledger.AttemptRecord]) -> None:
        """Removes the records where the store answers at once. Those left count for nothing when the run has ended."""

        def remove() -> None:
            with storage.hurry(), suppress(StorageError):
                ledger.remove_attempts(records)

        with suppress(TimeoutError, CancelledError):
            self.stages.call("removing attempt records", remove, limit_s=RECORD_TIMEOUT_S, spared=True)

    def _now(self) -> tuple[InFlight, ...]:
        with self._changed:
            return tuple(self._entries)

    def _in_engine(self, animator: RowAnimator | None) -> list[InFlight]:
        return [
            entry
            for entry in self._now()
            if entry.animator is animator and entry.started and entry.future is not None and not entry.future.done()
        ]
