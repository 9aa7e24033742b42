"""Works through batches: reads their lines, feeds these to the job queue, and writes down what became of them.

A line becomes a video job of the lowest priority, so that it waits for the engines that there are and for everybody who
asks for one video. Several processes may run this: a lease in its document gives each batch to one of them, and a
line's idempotency key makes one job of it, whoever asks. Knows no routes.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any, Final

from pia_ray.errors import Conflict, JobConflict, JobNotFound, NotFound, PiaRayError, RowError
from pia_ray.ledger import RunRecord
from pia_ray.online.batches.results import row_of_job, row_without_job, write_ledger
from pia_ray.online.batches.store import Batch, BatchFault, BatchStore, Outcome
from pia_ray.online.files import FileStore, StoredFile
from pia_ray.online.http import error_responses
from pia_ray.online.public_errors import PublicError, public_error
from pia_ray.online.video_jobs import JobStore, VideoJob
from pia_ray.online.video_jobs.creation import LineAsked

ENDPOINT: Final = "/v1/videos"
MAX_LINES: Final = 50_000
MAX_FAULTS: Final = 100
"""Faults of an input file that its batch tells of."""

WINDOW: Final = 32
"""Lines of one batch that are video jobs at the same time."""

LEASE_S: Final = 60.0
"""A runner that has not written a batch's document for so long has died; another takes over."""

_KEPT_FILES: Final = 2
_CANCELLED: Final = PublicError(
    code="batch_cancelled", message="The batch was cancelled before this line was made.", retryable=True
)
_EXPIRED: Final = PublicError(
    code="batch_expired", message="The batch's time was over before this line was made.", retryable=True
)
_DELETED: Final = PublicError(code="video_deleted", message="The video was deleted before the batch ended.")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BatchLine:
    """One request of a batch's input file."""

    custom_id: str
    body: Mapping[str, Any]


@dataclass(frozen=True)
class _Place:
    """A line and where it stands."""

    batch_id: str
    number: int
    line: BatchLine

    @property
    def id(self) -> str:
        """Names the request in the batch's files."""
        return f"batch_req_{self.batch_id.removeprefix('batch_')}_{self.number}"


Submit = Callable[[LineAsked], Awaitable[VideoJob]]
"""Makes the video job of a line, or finds the one that was made.

Raises:
    RowError: what the body asks for cannot be done; a retryable one is tried again later.
"""


class BatchRunner:
    """Works through the open batches of a store."""

    def __init__(
        self,
        batches: BatchStore,
        files: FileStore,
        *,
        jobs: JobStore,
        submit: Submit,
        show: Callable[[VideoJob], Mapping[str, Any]],
    ) -> None:
        self._batches = batches
        self._files = files
        self._jobs = jobs
        self._submit = submit
        self._show = show
        """The video object of a job, as callers get it."""
        self._worker = uuid.uuid4().hex
        self._lines: dict[str, list[BatchLine]] = {}
        self._stopped = asyncio.Event()
        self._writing: asyncio.Future[Batch] | None = None
        """The latest change of a batch's document; one at a time."""

    async def run(self, poll_s: float) -> None:
        """Works until it is stopped or cancelled; then other runners may go on at once. One call at a time."""
        stopped = self._stopped = asyncio.Event()  # of this event loop
        try:
            while not stopped.is_set():
                try:
                    await self.tick()
                except PiaRayError as error:
                    _log.warning("batches wait: %s", error.message)
                with suppress(TimeoutError):
                    await asyncio.wait_for(stopped.wait(), poll_s)
        finally:
            if self._writing is not None:  # a thread goes on when its caller is cancelled, and would renew the lease
                await asyncio.gather(self._writing, return_exceptions=True)
            await asyncio.to_thread(self._release)

    def stop(self) -> None:
        """Ends `run` as soon as it has done what it is at."""
        self._stopped.set()

    async def tick(self) -> None:
        """Brings every open batch as far as it can be brought now."""
        for batch in await asyncio.to_thread(lambda: list(self._batches.open_batches())):
            try:
                await self._advance(batch)
            except (NotFound, Conflict):  # it was deleted, or another runner has it
                continue
            except RowError as error:
                _log.warning("%s waits: %s", batch.id, error.message)

    async def _advance(self, batch: Batch) -> None:
        batch = await self._change(batch, self._lease)
        if batch.status == "validating":
            batch = await self._validate(batch)
        elif not batch.ended:
            batch = await self._work(batch)
        if batch.status == "finalizing" or (batch.status == "cancelling" and not batch.jobs and self._all_told(batch)):
            batch = await self._finish(batch)
        if batch.ended:
            self._lines.pop(batch.id, None)

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
        """Reads the input file and says what is wrong with it, or how many lines it has."""
        try:
            content = await asyncio.to_thread(self._files.read, batch.owner, batch.input_file_id)
            lines, faults = await asyncio.to_thread(read_lines, content)
            await asyncio.to_thread(self._batches.write_input, batch, content)
        except NotFound as error:
            lines, faults = [], [BatchFault(code="file_not_found", message=error.message, param="input_file_id")]
        now = await self._now()
        if faults:
            _log.info("%s failed: %s", batch.id, faults[0].message)
            change = {"status": "failed", "failed_at": now, "errors": tuple(faults[:MAX_FAULTS])}
        else:
            self._keep(batch, lines)
            change = {"status": "in_progress", "in_progress_at": now, "num_lines": len(lines)}
        return await self._record(batch, change)

    async def _work(self, batch: Batch) -> Batch:
        """Notes which jobs have ended and makes jobs of the next lines."""
        now = await self._now()
        end = _CANCELLED if batch.status == "cancelling" else _EXPIRED if now >= batch.expires_at else None
        lines = await self._lines_of(batch)
        jobs, outcomes = dict(batch.jobs), list[Outcome]()
        for number, job_id in batch.jobs.items():
            outcome = await self._look(_Place(batch.id, number, lines[number]), batch.owner, job_id, end=end)
            if outcome is not None:
                outcomes.append(outcome)
                del jobs[number]
        next_line, renewed_at = batch.next_line, time.monotonic()
        while next_line < batch.num_lines and (end is not None or len(jobs) < WINDOW):
            place = _Place(batch.id, next_line, lines[next_line])
            if end is not None:
                outcomes.append(_refused(place, end))
            else:
                try:
                    asked = LineAsked(batch.owner, batch.id, place.line.body, f"{batch.id}:{next_line}")
                    jobs[next_line] = (await self._submit(asked)).id
                except RowError as error:
                    if error.retryable:
                        _log.info("%s waits at line %d: %s", batch.id, next_line + 1, error.message)
                        break
                    outcomes.append(_rejected(place, error))
            next_line += 1
            if time.monotonic() - renewed_at > LEASE_S / 4:  # fetching pictures takes its time
                break
        change: dict[str, Any] = {"jobs": jobs, "next_line": next_line}
        if outcomes:
            part = await asyncio.to_thread(self._batches.write_outcomes, batch, outcomes)
            done = sum(outcome.succeeded for outcome in outcomes)
            change |= {
                "outcomes": (*batch.outcomes, part),
                "num_completed": batch.num_completed + done,
                "num_failed": batch.num_failed + len(outcomes) - done,
                "ran_out_of_time": batch.ran_out_of_time or any(each.out_of_time for each in outcomes),
            }
        if not jobs and next_line == batch.num_lines and batch.status == "in_progress":
            change |= {"status": "finalizing", "finalizing_at": await self._now()}
        return await self._record(batch, change)

    async def _look(self, place: _Place, owner: str, job_id: str, *, end: PublicError | None) -> Outcome | None:
        """What became of a line's job; None while it goes on. With an `end`, the batch waits for it no longer."""
        try:
            job = await asyncio.to_thread(self._jobs.get, owner, job_id)
            if end is not None and not job.ended:
                await asyncio.to_thread(self._jobs.cancel, owner, job_id)
                return _refused(place, end)
        except JobConflict:  # it has ended just now
            return None
        except JobNotFound:
            return _refused(place, _DELETED)
        if not job.ended:
            return None
        line, error = place.line, job.error
        record = {
            "id": place.id,
            "custom_id": line.custom_id,
            "response": {"status_code": 200, "request_id": job.id, "body": self._show(job)},
            "error": None if error is None else {"code": error.code, "message": error.message},
        }
        row = row_of_job(job, batch_id=place.batch_id, line=place.number, custom_id=line.custom_id)
        return Outcome(line=place.number, record=record, row=row)

    def _all_told(self, batch: Batch) -> bool:
        return batch.next_line == batch.num_lines

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
        if batch.id not in self._lines:
            content = await asyncio.to_thread(self._batches.read_input, batch)
            self._keep(batch, (await asyncio.to_thread(read_lines, content))[0])
        return self._lines[batch.id]

    def _keep(self, batch: Batch, lines: list[BatchLine]) -> None:
        while len(self._lines) >= _KEPT_FILES:
            self._lines.pop(next(iter(self._lines)))
        self._lines[batch.id] = lines

    async def _record(self, batch: Batch, change: Mapping[str, Any]) -> Batch:
        """Writes what this runner found, unless another has taken the batch over. A cancel that came between stays."""

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
        self._writing = asyncio.ensure_future(asyncio.to_thread(self._batches.change, batch.owner, batch.id, edit))
        return await asyncio.shield(self._writing)

    async def _now(self) -> float:
        return await asyncio.to_thread(self._batches.now)


def read_lines(content: bytes) -> tuple[list[BatchLine], list[BatchFault]]:
    """The requests of an input file, and what is wrong with it: a batch with a fault does not begin."""
    lines: list[BatchLine] = []
    faults: list[BatchFault] = []
    seen: set[str] = set()
    for number, text in enumerate(content.split(b"\n"), start=1):
        if not text.strip():
            continue
        if len(lines) + len(faults) >= MAX_LINES:
            faults.append(BatchFault(code="too_many_lines", message=f"a batch has at most {MAX_LINES:,} lines"))
            break
        fault = _fault_of(text, number, seen)
        if isinstance(fault, BatchFault):
            faults.append(fault)
        else:
            lines.append(fault)
    if not lines and not faults:
        faults.append(BatchFault(code="empty_file", message="the input file has no lines"))
    return lines, faults


def _fault_of(text: bytes, number: int, seen: set[str]) -> BatchLine | BatchFault:
    def fault(code: str, message: str, param: str | None = None) -> BatchFault:
        return BatchFault(code=code, message=message, line=number, param=param)

    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        return fault("invalid_json_line", "this line is not JSON")
    if not isinstance(record, dict):
        return fault("invalid_json_line", "this line is not a JSON object")
    custom_id, body = record.get("custom_id"), record.get("body")
    if not isinstance(custom_id, str) or not 1 <= len(custom_id) <= 512:
        return fault("missing_required_parameter", "custom_id must be text of 1 to 512 characters", "custom_id")
    if custom_id in seen:
        return fault("duplicate_custom_id", "custom_id must be another for each line", "custom_id")
    seen.add(custom_id)
    if record.get("method") != "POST":
        return fault("invalid_method", "method must be POST", "method")
    if record.get("url") != ENDPOINT:
        return fault("invalid_url", f"url must be {ENDPOINT}", "url")
    if not isinstance(body, dict):
        return fault("missing_required_parameter", "body must be a JSON object", "body")
    return BatchLine(custom_id=custom_id, body=body)


def _rejected(place: _Place, error: RowError) -> Outcome:
    response = {
        "status_code": error_responses.status_of(error),
        "request_id": place.id,
        "body": error_responses.body_of(error),
    }
    record = {"id": place.id, "custom_id": place.line.custom_id, "response": response, "error": None}
    return Outcome(line=place.number, record=record, row=_row(place, public_error(error)))


def _refused(place: _Place, error: PublicError) -> Outcome:
    told = {"code": error.code, "message": error.message}
    record = {"id": place.id, "custom_id": place.line.custom_id, "response": None, "error": told}
    return Outcome(line=place.number, record=record, row=_row(place, error), out_of_time=error is _EXPIRED)


def _row(place: _Place, error: PublicError) -> dict[str, Any]:
    line = place.line
    return row_without_job(error, batch_id=place.batch_id, line=place.number, custom_id=line.custom_id, body=line.body)
