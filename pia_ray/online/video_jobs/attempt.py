"""One attempt at a video job: rendered by an engine, kept by heartbeats, stored, and ended, postponed or given back."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import traceback
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass
from typing import Final, ParamSpec, Protocol, TypeVar, cast

from pia_ray.errors import (
    Busy,
    Cancelled,
    JobConflict,
    JobError,
    JobNotFound,
    OutOfMemory,
    PiaRayError,
    StorageError,
    Timeout,
    UnexpectedError,
    WorkerDied,
)
from pia_ray.online.documents.document import Revision
from pia_ray.online.rendering.renderer import BATCH_LINE, Event, Rendered, Renderer, RenderRequest, StepDone
from pia_ray.online.video_jobs import JobStore, VideoJob, VideoResult

RETRY_DELAY_S: Final = 2.0
"""Before the second attempt of a job; doubles for each further one."""
FIRST_REPORT_S: Final = 1.0
"""Seconds after which a job that has begun is said to be in progress."""

_P = ParamSpec("_P")
_T = TypeVar("_T")
_log = logging.getLogger(__name__)


class InThread(Protocol):
    """Makes a blocking call in a thread."""

    def __call__(self, call: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs) -> Awaitable[_T]:
        """The value of the call."""
        ...


@dataclass(frozen=True)
class AttemptSettings:
    """The settings of attempts."""

    max_attempts: int = 3
    job_timeout_s: float | None = None
    heartbeat_s: float = 3.0
    """Between two reports of its progress; the first one is made within FIRST_REPORT_S."""
    retry_delay_s: float = RETRY_DELAY_S


class Attempt:
    """An attempt at a job that this process has claimed. All methods belong to one event loop."""

    def __init__(
        self,
        held: Revision[VideoJob],
        *,
        renderer: Renderer,
        jobs: JobStore,
        settings: AttemptSettings,
        in_thread: InThread,
        report: Callable[[VideoJob], None] = lambda job: None,
    ) -> None:
        """`report` is called with the job after each report of its progress to storage."""
        self._held = held
        self._renderer = renderer
        self._jobs = jobs
        self._settings = settings
        self._in_thread = in_thread
        self._report = report
        self._changed = asyncio.Event()
        self._progress: int | None = None
        self._eta_s: float | None = None
        self._first_step = 0
        self._first_step_at = 0.0
        self._storing: asyncio.Future[VideoResult] | None = None
        self.gpu_s = 0.0
        """Seconds of engine time until now."""

    def check(self) -> None:
        """Has the document read at once, because it may have changed."""
        self._changed.set()

    async def run(self) -> VideoJob | None:
        """The job as it has ended, or None where it is to be tried again.

        Cancelling this gives the job back; the attempt then does not count.

        Raises:
            JobConflict, JobNotFound: another process has the job, or its owner cancelled or deleted it; nothing of this
                attempt is left.
            Busy: the engines are full; the job is given back.
            StorageError: the store failed, and the job stays claimed until its lease runs out.
        """
        making = asyncio.create_task(self._make())
        try:
            await self._keep_claim(making)
            if making.cancelled():
                raise WorkerDied("the engine cancelled the request")
            result = making.result()
        except asyncio.CancelledError:  # this process shuts down
            await self._stop(making)
            with contextlib.suppress(JobConflict, JobNotFound):
                await self._in_thread(self._jobs.queue.give_back, self._held)
            raise
        except (JobConflict, JobNotFound):
            await self._stop(making)
            raise
        except Busy:
            await self._in_thread(self._jobs.queue.give_back, self._held)
            raise
        except Cancelled:  # the engine shuts down, which is not the job's fault
            await self._in_thread(self._jobs.queue.give_back, self._held, delay_s=self._settings.retry_delay_s)
            return None
        except PiaRayError as error:
            return await self._end_or_postpone(error)
        return await self._in_thread(self._jobs.queue.complete, self._held, result)

    async def _make(self) -> VideoResult:
        """The video, rendered and stored."""
        job, timeout_s = self._held.document, self._settings.job_timeout_s
        request = await self._in_thread(self._jobs.request, job, deadline_s=timeout_s)
        rendered = await self._render(request)
        self._storing = asyncio.ensure_future(self._in_thread(self._jobs.queue.store, self._held, rendered))
        return await asyncio.shield(self._storing)

    async def _render(self, request: RenderRequest) -> Rendered:
        events = cast(AsyncGenerator[Event, None], self._renderer.render(request))
        try:
            async with contextlib.aclosing(events):
                async for event in events:
                    if isinstance(event, Rendered):
                        self.gpu_s = event.video.total_gpu_s
                        return event
                    if isinstance(event, StepDone):
                        self._count(event)
        except PiaRayError:
            raise
        except Exception as error:  # the row boundary: it belongs to this job alone
            raise UnexpectedError(f"{type(error).__name__}: {error}\n{traceback.format_exc()}") from error
        raise UnexpectedError("the engine ended without a video")

    def _count(self, step: StepDone) -> None:
        now = time.monotonic()
        self.gpu_s = step.gpu_s
        if self._progress is None:
            self._first_step, self._first_step_at = step.done, now
        elif step.done > self._first_step:
            step_s = (now - self._first_step_at) / (step.done - self._first_step)
            self._eta_s = step_s * (step.total - step.done)
        self._progress = min(99, 100 * step.done // max(step.total, 1))

    async def _keep_claim(self, making: asyncio.Task[VideoResult]) -> None:
        """Renews the lease and reports the progress until `making` is done.

        Raises:
            JobConflict, JobNotFound: the claim is lost.
        """
        reported, reported_at = self._progress, time.monotonic()
        while not making.done():
            changed = asyncio.create_task(self._changed.wait())
            wait_s = self._report_s(is_first=reported is None)
            try:
                await asyncio.wait((making, changed), timeout=wait_s, return_when=asyncio.FIRST_COMPLETED)
            finally:
                changed.cancel()
            is_late = time.monotonic() - reported_at > self._jobs.queue.lease_s / 4
            if making.done() or not (self._progress != reported or is_late or self._changed.is_set()):
                continue
            self._changed.clear()
            reported, reported_at = self._progress, time.monotonic()
            eta_s = None if reported is None else self._eta_s
            try:
                self._held = await self._in_thread(
                    self._jobs.queue.heartbeat, self._held, progress=reported, eta_s=eta_s
                )
            except StorageError as error:
                _log.warning("the heartbeat of %s is late: %s", self._held.document.id, error.message)
            else:
                self._report(self._held.document)

    def _report_s(self, *, is_first: bool) -> float:
        """Seconds until the progress is reported: nobody waits for that of a batch's line."""
        heartbeat_s = self._settings.heartbeat_s
        if self._held.document.priority >= BATCH_LINE:
            return min(0.4 * self._jobs.queue.lease_s, 2 * heartbeat_s)
        return min(FIRST_REPORT_S, heartbeat_s) if is_first else heartbeat_s

    async def _stop(self, making: asyncio.Task[VideoResult]) -> None:
        """Takes the request back from the engine, and removes the files that have been stored."""
        making.cancel()
        await asyncio.wait((making,))
        if self._storing is not None:
            await asyncio.wait((self._storing,))
            with contextlib.suppress(StorageError):
                await self._in_thread(self._jobs.queue.discard, self._held)
        for done in (making, self._storing):
            if done is not None and not done.cancelled():
                done.exception()  # asyncio logs the errors that nobody retrieves

    async def _end_or_postpone(self, error: PiaRayError) -> VideoJob | None:
        job, settings = self._held.document, self._settings
        # A Timeout has used its time. An error of an engine may not occur in the next one.
        may_succeed = (error.retryable or isinstance(error, JobError)) and not isinstance(error, Timeout)
        # What does not fit even alone fits only where something else had the device's memory: it is tried once more.
        max_attempts = min(settings.max_attempts, 2) if isinstance(error, OutOfMemory) else settings.max_attempts
        _log.warning("%s, attempt %d: %s: %s", job.id, job.attempt, error.code, error.message)
        if may_succeed and job.attempt < max_attempts:
            delay_s = settings.retry_delay_s * 2 ** (job.attempt - 1)
            await self._in_thread(self._jobs.queue.postpone, self._held, delay_s=delay_s)
            return None
        return await self._in_thread(self._jobs.queue.fail, self._held, error)
