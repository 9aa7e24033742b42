"""Works through batches: reads their lines, makes video jobs of these, and collects their outcomes.

A line becomes a video job of the lowest priority, so that synchronous calls and single videos go first. Several
processes may run this: a lease in its document gives each batch to one of them, and a line's idempotency key makes one
job of it, however often it is submitted. Knows no routes.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any, Final

import anyio
from cachetools import LRUCache

from pia_ray.errors import Conflict, JobConflict, JobNotFound, NotFound, PiaRayError
from pia_ray.ledger import RunRecord
from pia_ray.online.batches.input_file import BatchLine, read_lines
from pia_ray.online.batches.outcomes import Outcomes
from pia_ray.online.batches.results import write_ledger
from pia_ray.online.batches.store import Batch, BatchLineError, BatchStore, Outcome
from pia_ray.online.batches.submissions import OWNER_WINDOW, PAUSES_S, WINDOW, Progress, Submissions, Submit
from pia_ray.online.files import FileStore, StoredFile
from pia_ray.online.public_errors import PublicError
from pia_ray.online.video_jobs import JobStore, VideoJob

MAX_ERRORS: Final = 100
"""Errors of an input file that its batch names."""

LEASE_S: Final = 60.0
"""A runner that has not written a batch's document for so long has died; another takes over."""

_STEPS_PER_OWNER: Final = 2
"""Batches of one owner that advance at the same time; the others of this owner wait for their turn."""

_CACHED_BYTES: Final = 128 * 2**20
"""Size of the input files whose lines are kept in memory."""

_MOST_POLLS: Final = 8
"""Most intervals of polls between two rounds. They are fewer where lines are on their way, or end fast."""

_CHECK_S: Final = 600.0
"""Seconds after which also the jobs that the queue still names are read."""

_CANCELLED: Final = PublicError(
    code="batch_cancelled", message="The batch was cancelled before this line was made.", retryable=True
)
_EXPIRED: Final = PublicError(
    code="batch_expired", message="The batch's time was over before this line was made.", retryable=True
)
_DELETED: Final = PublicError(code="video_deleted", message="The video was deleted before the batch ended.")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Input:
    """The lines of an input file, and its size."""

    lines: list[BatchLine]
    num_bytes: int

    @classmethod
    def of(cls, lines: list[BatchLine], content: bytes) -> _Input:
        """The lines, which count as the file's bytes."""
        return cls(lines, min(len(content), _CACHED_BYTES))


class BatchRunner:
    """Works through the open batches of a store, those of each owner by themselves.

    `video_object` gives the video object of a job, as callers get it. `pauses_s` are the waits between the tries of a
    line whose picture's server does not answer. At most `owner_window` lines of an owner are video jobs at a time.
    """

    def __init__(
        self,
        batches: BatchStore,
        files: FileStore,
        *,
        jobs: JobStore,
        submit: Submit,
        video_object: Callable[[VideoJob], Mapping[str, Any]],
        pauses_s: Sequence[float] = PAUSES_S,
        owner_window: int = OWNER_WINDOW,
    ) -> None:
        self._batches = batches
        self._files = files
        self._jobs = jobs
        self._submit = submit
        self._video_object = video_object
        self._worker = uuid.uuid4().hex
        self._lines: LRUCache[str, _Input] = LRUCache(_CACHED_BYTES, getsizeof=lambda each: each.num_bytes)
        self._checked_at: dict[str, float] = {}
        """By batch, the time at which all its jobs were read."""
        self._has_changed = False
        """Whether a batch has come to another status since the latest round."""
        self._num_ended = 0
        """Lines that have ended since the latest round."""
        self._owner_window = owner_window
        self._open_jobs: dict[str, tuple[str, int]] = {}
        """By batch, its owner and its lines that are video jobs."""
        self._stopped = asyncio.Event()
        self._pauses_s = pauses_s
        self._steps: dict[str, anyio.CapacityLimiter] = {}
        self._advancing: dict[str, asyncio.Task[None]] = {}
        self._submissions: dict[str, Submissions] = {}
        self._writing: set[asyncio.Future[Batch]] = set()
        """Changes of documents that are being written."""

    async def run(self, poll_s: float) -> None:
        """Works until it is stopped or cancelled; then other runners may go on at once. One call at a time."""
        stopped = self._stopped = asyncio.Event()  # of this event loop
        polls = 1
        try:
            while not stopped.is_set():
                try:
                    steps = await self._begin()
                except PiaRayError as error:
                    _log.warning("batches wait: %s", error.message)
                else:
                    is_busy = self._has_changed or any(each.is_busy for each in self._submissions.values())
                    if is_busy or not steps:
                        polls = 1
                    elif 4 * self._num_ended > WINDOW:  # or the engines would wait for lines
                        polls = max(1, polls // 2)
                    else:
                        polls = min(_MOST_POLLS, 2 * polls)
                    self._has_changed, self._num_ended = False, 0
                with suppress(TimeoutError):
                    await asyncio.wait_for(stopped.wait(), polls * poll_s)
            await asyncio.gather(*self._advancing.values())
        finally:
            await self._close()
            await asyncio.to_thread(self._release)

    def stop(self) -> None:
        """Ends `run` after its present step."""
        self._stopped.set()

    async def tick(self) -> None:
        """Advances every open batch by a step."""
        await asyncio.gather(*await self._begin())

    async def _begin(self) -> list[asyncio.Task[None]]:
        """The steps of all open batches, which run by themselves: no batch waits for one of another owner."""
        for batch_id, step in list(self._advancing.items()):
            if step.done():
                del self._advancing[batch_id]
                if not step.cancelled():
                    step.result()  # a bug ends the run
        advancing = self._advancing.keys()
        for batch in await asyncio.to_thread(lambda: list(self._batches.open_batches(without=advancing))):
            self._advancing[batch.id] = asyncio.create_task(self._step(batch))
        return list(self._advancing.values())

    async def _step(self, batch: Batch) -> None:
        steps = self._steps.setdefault(batch.owner, anyio.CapacityLimiter(_STEPS_PER_OWNER))
        async with steps:
            try:
                await self._advance(batch)
            except (NotFound, Conflict):  # it was deleted, or another runner has it
                await self._forget(batch.id)
            except PiaRayError as error:
                _log.warning("%s waits: %s", batch.id, error.message)
                await self._forget(batch.id)  # its document does not know which lines are on their way
        if not steps.borrowed_tokens and not steps.statistics().tasks_waiting:
            self._steps.pop(batch.owner, None)

    async def _forget(self, batch_id: str) -> None:
        self._lines.pop(batch_id, None)
        self._checked_at.pop(batch_id, None)
        self._open_jobs.pop(batch_id, None)
        if (submissions := self._submissions.pop(batch_id, None)) is not None:
            await submissions.close()

    async def _close(self) -> None:
        """Breaks all steps off."""
        for step in self._advancing.values():
            step.cancel()
        await asyncio.gather(*self._advancing.values(), return_exceptions=True)
        for batch_id in list(self._submissions):
            await self._forget(batch_id)
        # The thread of a change continues after the cancel, and would renew the lease.
        await asyncio.gather(*self._writing, return_exceptions=True)

    async def _advance(self, batch: Batch) -> None:
        if batch.lease_owner != self._worker or batch.lease_until - await self._now() < LEASE_S / 2:
            batch = await self._change(batch, self._lease)
        if batch.status == "validating":
            batch = await self._validate(batch)
        elif not batch.ended:
            batch = await self._work(batch)
        is_cancelled = batch.status == "cancelling" and _is_through(batch)
        if batch.status == "finalizing" or is_cancelled:
            batch = await self._finish(batch)
        if batch.ended:
            await self._forget(batch.id)

    def _lease(self, batch: Batch) -> dict[str, Any]:
        now = self._batches.now()
        if batch.ended or (batch.lease_owner != self._worker and batch.lease_until > now):
            raise Conflict(f"{batch.id} has ended, or another runner works on it")
        return {"lease_owner": self._worker, "lease_until": now + LEASE_S}

    def _release(self) -> None:
        def release(batch: Batch) -> dict[str, Any]:
            return {"lease_until": 0.0} if batch.lease_owner == self._worker else {}

        try:
            for batch in list(self._batches.open_batches()):
                with suppress(NotFound, Conflict):
                    self._batches.change(batch.owner, batch.id, release)
        except PiaRayError as error:
            _log.warning("batches stay with this runner until its lease is over: %s", error.message)

    async def _validate(self, batch: Batch) -> Batch:
        """The batch with the errors of its input file, or with the number of its lines."""
        try:
            content = await asyncio.to_thread(self._files.read, batch.owner, batch.input_file_id)
            lines, errors = await asyncio.to_thread(read_lines, content)
            await asyncio.to_thread(self._batches.write_input, batch, content)
        except NotFound as error:
            lines, errors = [], [BatchLineError(code="file_not_found", message=error.message, param="input_file_id")]
        now = await self._now()
        if errors:
            _log.info("%s failed: %s", batch.id, errors[0].message)
            change = {"status": "failed", "failed_at": now, "errors": tuple(errors[:MAX_ERRORS])}
        else:
            self._lines[batch.id] = _Input.of(lines, content)
            change = {"status": "in_progress", "in_progress_at": now, "num_lines": len(lines)}
        return await self._record(batch, change)

    async def _work(self, batch: Batch) -> Batch:
        """Collects the outcomes of jobs that have ended and makes jobs of the next lines."""
        end = _CANCELLED if batch.status == "cancelling" else None
        if end is None and await self._now() >= batch.expires_at:
            end = _EXPIRED
        now, progress = await self._now(), Progress.of(batch)
        submissions = self._submissions.get(batch.id)
        if submissions is None:
            submissions = self._submissions[batch.id] = Submissions(self._submit, pauses_s=self._pauses_s)
        await self._collect(batch, progress, end=end)
        window = self._window(batch)
        if end is not None:
            await submissions.give_up(batch, await self._lines_of(batch), progress, now=now, end=end)
        elif submissions.is_needed(batch.model_copy(update={"jobs": progress.jobs}), window=window):
            await submissions.advance(batch, await self._lines_of(batch), progress, now=now, window=window)
        self._open_jobs[batch.id] = (batch.owner, len(progress.jobs))
        outcomes = progress.outcomes
        self._num_ended += len(outcomes)
        change: dict[str, Any] = {
            "jobs": progress.jobs,
            "waiting": progress.waiting,
            "next_line": progress.next_line,
        }
        if outcomes:
            num_made = sum(outcome.succeeded for outcome in outcomes)
            change |= {
                "outcomes": (*batch.outcomes, await asyncio.to_thread(self._batches.write_outcomes, batch, outcomes)),
                "num_completed": batch.num_completed + num_made,
                "num_failed": batch.num_failed + len(outcomes) - num_made,
                "ran_out_of_time": batch.ran_out_of_time
                or (end is _EXPIRED and any(outcome.is_given_up for outcome in outcomes)),
            }
        if batch.status == "in_progress" and _is_through(batch.model_copy(update=change)):
            change |= {"status": "finalizing", "finalizing_at": await self._now()}
        return await self._record(batch, change)

    def _window(self, batch: Batch) -> int:
        """The most lines of a batch that may be video jobs now, beside those of its owner's other batches."""
        others = sum(
            num_jobs
            for batch_id, (owner, num_jobs) in self._open_jobs.items()
            if owner == batch.owner and batch_id != batch.id
        )
        window = min(WINDOW, self._owner_window - others)
        self._open_jobs[batch.id] = (batch.owner, max(window, len(batch.jobs)))  # until the step has ended
        return window

    async def _collect(self, batch: Batch, progress: Progress, *, end: PublicError | None) -> None:
        """Moves the jobs that have ended to the outcomes. With an `end` no job goes on."""
        waiting: Collection[str] = ()
        checked_at = self._checked_at.setdefault(batch.id, time.monotonic())
        if batch.jobs and end is None and time.monotonic() - checked_at < _CHECK_S:
            waiting = await asyncio.to_thread(self._jobs.open_lines, batch.owner)
        else:
            self._checked_at[batch.id] = time.monotonic()
        for index, job_id in batch.jobs.items():
            if job_id in waiting:
                continue
            line = (await self._lines_of(batch))[index]
            outcome = await self._outcome_of(batch, line, job_id, end=end)
            if outcome is not None:
                progress.outcomes.append(outcome)
                del progress.jobs[index]

    async def _outcome_of(
        self, batch: Batch, line: BatchLine, job_id: str, *, end: PublicError | None
    ) -> Outcome | None:
        """The outcome of a line's job; None while the job goes on. With an `end` the job is cancelled."""
        made = Outcomes(batch.id, await self._now())
        try:
            job = await asyncio.to_thread(self._jobs.get, batch.owner, job_id)
            if end is not None and not job.ended:
                await asyncio.to_thread(self._jobs.cancel, batch.owner, job_id)
                return made.given_up(line, end)
        except JobConflict:  # it has ended just now
            return None
        except JobNotFound:
            return made.of_deleted(line, _DELETED)
        return made.of_job(line, job, video=self._video_object(job)) if job.ended else None

    async def _finish(self, batch: Batch) -> Batch:
        """Writes the output and error files and the ledger, then the end of the batch."""
        outcomes = await asyncio.to_thread(self._batches.read_outcomes, batch)
        output = await self._write_file(batch, [each for each in outcomes if each.succeeded], "output")
        errors = await self._write_file(batch, [each for each in outcomes if not each.succeeded], "errors")
        began = datetime.fromtimestamp(batch.in_progress_at or batch.created_at, UTC)
        run = RunRecord(run_id=batch.id, manifest=batch.input_file_id, model="", started_at=began)
        rows = [each.row for each in outcomes]
        await asyncio.to_thread(partial(write_ledger, self._batches.output_uri(batch), rows, run=run))
        now = await self._now()
        change: dict[str, Any] = {
            "output_file_id": None if output is None else output.id,
            "error_file_id": None if errors is None else errors.id,
        }
        if batch.status == "cancelling":
            change |= {"status": "cancelled", "cancelled_at": now}
        elif batch.ran_out_of_time:
            change |= {"status": "expired", "expired_at": now}
        else:
            change |= {"status": "completed", "completed_at": now}
        _log.info("%s %s: %d made, %d not", batch.id, change["status"], batch.num_completed, batch.num_failed)
        return await self._record(batch, change)

    async def _write_file(self, batch: Batch, outcomes: list[Outcome], kind: str) -> StoredFile | None:
        if not outcomes:
            return None
        content = "".join(json.dumps(each.record) + "\n" for each in outcomes).encode()
        name = f"{batch.id}_{kind}.jsonl"
        create = partial(self._files.create, batch.owner, content, filename=name, purpose="batch_output")
        return await asyncio.to_thread(create)

    async def _lines_of(self, batch: Batch) -> list[BatchLine]:
        if (found := self._lines.get(batch.id)) is None:
            content = await asyncio.to_thread(self._batches.read_input, batch)
            lines = (await asyncio.to_thread(read_lines, content))[0]
            found = self._lines[batch.id] = _Input.of(lines, content)
        return found.lines

    async def _record(self, batch: Batch, change: Mapping[str, Any]) -> Batch:
        """Writes a change, unless another runner has taken the batch over. A cancel in between is kept."""
        if all(getattr(batch, name) == value for name, value in change.items()):
            return batch
        self._has_changed = self._has_changed or "status" in change

        def edit(now: Batch) -> dict[str, Any]:
            if now.lease_owner != self._worker:
                raise Conflict(f"{batch.id} was taken over by another runner")
            values = dict(change)
            if now.status == "cancelling" and batch.status != "cancelling" and values.get("status") != "failed":
                values.pop("status", None)
                values.pop("finalizing_at", None)
            return {**values, "lease_until": self._batches.now() + LEASE_S}

        return await self._change(batch, edit)

    async def _change(self, batch: Batch, edit: Callable[[Batch], Mapping[str, Any]]) -> Batch:
        writing = asyncio.ensure_future(asyncio.to_thread(self._batches.change_read, batch, edit))
        self._writing.add(writing)
        writing.add_done_callback(self._writing.discard)
        return await asyncio.shield(writing)

    async def _now(self) -> float:
        return await asyncio.to_thread(self._batches.now)


def _is_through(batch: Batch) -> bool:
    """Whether every line has an outcome."""
    return batch.next_line == batch.num_lines and not batch.jobs and not batch.waiting
