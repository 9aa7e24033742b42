"""Takes video jobs from storage to the engine and back. Every HTTP replica may run one: each job is ended by one.

One asyncio task. A job that a dead dispatcher had in hand is taken over when its lease runs out; one that goes down in
order gives its jobs back at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import secrets
import time
import traceback
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Final, ParamSpec, TypeVar, cast

from pia_ray.errors import (
    Busy,
    Cancelled,
    JobConflict,
    JobError,
    JobNotFound,
    PiaRayError,
    StorageError,
    Timeout,
    UnexpectedError,
    WorkerDied,
)
from pia_ray.online.documents.document import IndexEntry, Revision
from pia_ray.online.rendering.renderer import Event, Rendered, Renderer, RenderRequest, Step
from pia_ray.online.video_jobs import JobStore, VideoJob, VideoResult
from pia_ray.online.video_jobs.webhook_sender import Courier
from pia_ray.online.video_jobs.webhooks import Webhooks

RETRY_DELAY_S: Final = 2.0
"""Before the second attempt of a job; doubles for each further one."""
LOOKED_AT: Final = 1000
"""Jobs at the head of the queue that a dispatcher looks at: one page of S3's lists, however long the queue is."""
_SNAPSHOT_S: Final = 2.0

_P = ParamSpec("_P")
_T = TypeVar("_T")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outlook:
    """What can be told of a job's future."""

    position: int
    """Open jobs that go before it; LOOKED_AT stands for any number above."""
    eta_s: float | None
    """About so many seconds until it has ended; None while nobody knows how long a job takes."""

    @property
    def poll_after_ms(self) -> int:
        """When asking again makes sense: often enough to see progress, seldom where it takes long."""
        return 1000 if self.eta_s is None else max(250, min(10_000, int(self.eta_s * 1000 / 10)))


@dataclass(eq=False)
class _InHand:
    """A job that this dispatcher renders."""

    held: Revision[VideoJob]
    nudged: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when somebody may have changed it."""
    progress: int | None = None
    eta_s: float | None = None
    first_step: int = 0
    first_step_at: float = 0.0
    storing: asyncio.Future[VideoResult] | None = None
    task: asyncio.Task[None] | None = None

    def count(self, step: Step) -> None:
        """Takes in a step of the engine."""
        now = time.monotonic()
        if self.progress is None:
            self.first_step, self.first_step_at = step.done, now
        elif step.done > self.first_step:
            step_s = (now - self.first_step_at) / (step.done - self.first_step)
            self.eta_s = step_s * (step.total - step.done)
        self.progress = min(99, 100 * step.done // max(step.total, 1))


class Dispatcher:
    """Feeds a renderer from a job store, at most `max_in_flight` jobs at once, and sends the webhooks.

    `max_in_flight` is best a little above what the engines denoise together. All methods belong to one event loop.
    """

    def __init__(
        self,
        renderer: Renderer,
        jobs: JobStore,
        *,
        max_in_flight: int = 5,
        max_attempts: int = 3,
        job_timeout_s: float | None = None,
        webhooks: Webhooks | None = None,
        poll_s: float = 1.0,
        heartbeat_s: float = 1.0,
        sweep_s: float = 300.0,
        retry_delay_s: float = RETRY_DELAY_S,
    ) -> None:
        self.worker: Final = f"dispatcher-{secrets.token_hex(8)}"
        """Its name in leases."""
        self._renderer = renderer
        self._jobs = jobs
        self._max_in_flight = max_in_flight
        self._max_attempts = max_attempts
        self._job_timeout_s = job_timeout_s
        self._courier = None if webhooks is None else Courier(jobs, webhooks, worker=self.worker, poll_s=5 * poll_s)
        self._poll_s = poll_s
        self._heartbeat_s = heartbeat_s
        self._sweep_s = sweep_s
        self._retry_delay_s = retry_delay_s
        self._threads: ThreadPoolExecutor | None = None
        """Its own while it runs: a store that stalls must not hold back other work of the process, nor that the
        heartbeats."""
        self._in_hand: dict[str, _InHand] = {}
        self._wake = asyncio.Event()
        self._look_again_at: dict[str, float] = {}
        """By job, when it is worth a look, for those that others have in hand."""
        self._paused_until = 0.0
        self._draining = False
        self._job_s: float | None = None
        self._snapshot: tuple[IndexEntry, ...] = ()
        self._snapshot_at = float("-inf")

    @property
    def num_in_hand(self) -> int:
        """Jobs that this dispatcher has in hand."""
        return len(self._in_hand)

    async def run(self) -> None:
        """Works until it is cancelled; then its jobs are given back. One call at a time."""
        threads = self._threads = ThreadPoolExecutor(2 * self._max_in_flight + 4, thread_name_prefix="jobs")
        self._wake = asyncio.Event()  # of this event loop; an app may be started again in another
        self._snapshot_at = float("-inf")
        loops = [self._dispatch(), self._sweep()]
        if self._courier is not None:
            loops.append(self._courier.run())
        tasks = [asyncio.create_task(loop) for loop in loops]
        try:
            await asyncio.gather(*tasks)
        finally:
            tasks += [one.task for one in self._in_hand.values() if one.task is not None]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            threads.shutdown(wait=False)

    async def drain(self, *, timeout_s: float) -> None:
        """Takes no more jobs, and waits for those in hand to end, or for the time to pass."""
        self._draining = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while tasks := [one.task for one in self._in_hand.values() if one.task is not None]:
                    await asyncio.wait(tasks)

    def wake(self) -> None:
        """Says that there is a new job, which else is found within `poll_s`."""
        self._snapshot_at = float("-inf")
        self._wake.set()

    def nudge(self, job_id: str) -> None:
        """Says that a job was cancelled or deleted: if it is in hand here, the engine drops it at its next step."""
        self._tell_courier()
        if (one := self._in_hand.get(job_id)) is not None:
            one.nudged.set()

    async def outlook(self, job: VideoJob) -> Outlook:
        """What can be told of a job now, whoever has it in hand.

        Raises:
            StorageError: the queue cannot be read.
        """
        if job.ended:
            return Outlook(position=0, eta_s=0.0)
        if job.eta_at is not None:
            return Outlook(position=0, eta_s=max(0.0, job.eta_at - await self._in_thread(self._jobs.now)))
        if time.monotonic() - self._snapshot_at > _SNAPSHOT_S:
            await self._look_at_queue()
        mine = (job.priority, job.id)
        position = sum((entry.rank, entry.id) < mine for entry in self._snapshot)
        job_s = self._job_s
        if job_s is None:
            step_s = (await self._renderer.load()).step_s
            job_s = None if step_s is None else step_s * job.params.num_inference_steps
        return Outlook(position, None if job_s is None else job_s * (1 + position / self._max_in_flight))

    async def _dispatch(self) -> None:
        while True:
            self._wake.clear()
            pause_s = self._paused_until - time.monotonic()
            if pause_s <= 0 and not self._draining and len(self._in_hand) < self._max_in_flight:
                try:
                    await self._claim_some()
                except StorageError as error:
                    _log.warning("the queue of video jobs cannot be read: %s", error.message)
            # Jitter, so that several replicas do not ask, and go for the same job, in step.
            wait_s = max(pause_s, self._poll_s * random.uniform(0.75, 1.25))  # noqa: S311
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), wait_s)

    async def _look_at_queue(self) -> tuple[IndexEntry, ...]:
        self._snapshot = await self._in_thread(self._jobs.queue.entries, LOOKED_AT)
        self._snapshot_at = time.monotonic()
        return self._snapshot

    async def _claim_some(self) -> None:
        entries = await self._look_at_queue()
        here = {entry.id for entry in entries}
        self._look_again_at = {job: at for job, at in self._look_again_at.items() if job in here}
        for entry in entries:
            if len(self._in_hand) >= self._max_in_flight or self._draining:
                return
            if entry.id in self._in_hand or self._look_again_at.get(entry.id, 0.0) > time.monotonic():
                continue
            try:
                await self._claim(entry)
            except (JobConflict, JobNotFound):
                self._look_again_at[entry.id] = time.monotonic() + self._poll_s
            except StorageError as error:
                _log.error("%s cannot be taken up: %s", entry.id, error.message)
                self._look_again_at[entry.id] = time.monotonic() + 60

    async def _claim(self, entry: IndexEntry) -> None:
        found = await self._in_thread(self._jobs.queue.read, entry)
        wait_s = found.document.claimable_at - await self._in_thread(self._jobs.now)
        if wait_s > 0:
            self._look_again_at[entry.id] = time.monotonic() + wait_s
            return
        held = await self._in_thread(self._jobs.queue.claim, found, worker=self.worker)
        if held.document.attempt > self._max_attempts:
            died = WorkerDied(f"The engine died at each of {self._max_attempts} attempts at this video.")
            await self._in_thread(self._jobs.queue.fail, held, died)
            self._tell_courier()
            return
        _log.info("%s taken up, attempt %d", entry.id, held.document.attempt)
        one = self._in_hand[entry.id] = _InHand(held)
        one.task = asyncio.create_task(self._work(one))

    async def _work(self, one: _InHand) -> None:
        """Sees one job through, and never raises but when it is cancelled."""
        job_id, begun = one.held.document.id, time.monotonic()
        try:
            ended = await self._attempt(one)
            if ended is not None and ended.status == "completed":
                took_s = time.monotonic() - begun
                self._job_s = took_s if self._job_s is None else 0.7 * self._job_s + 0.3 * took_s
        except (JobConflict, JobNotFound):
            _log.info("%s was cancelled, deleted or taken over, and is left", job_id)
        except StorageError as error:
            _log.error("%s is left until its lease runs out: %s", job_id, error.message)
        finally:
            del self._in_hand[job_id]
            self._wake.set()
            self._tell_courier()

    async def _attempt(self, one: _InHand) -> VideoJob | None:
        """The job as it has ended, or None where it is to be tried again.

        Raises:
            JobConflict, JobNotFound: it is ours no longer; nothing of this attempt is left.
            StorageError: the store could not be told how it ended.
        """
        queue = self._jobs.queue
        making = asyncio.create_task(self._make(one))
        try:
            await self._keep(one, making)
            if making.cancelled():
                raise Cancelled("the engine took the request back")
            result = making.result()
        except asyncio.CancelledError:  # this process goes down
            await self._stop(one, making)
            with contextlib.suppress(JobConflict, JobNotFound):
                await self._in_thread(queue.give_back, one.held)
            raise
        except (JobConflict, JobNotFound):
            await self._stop(one, making)
            raise
        except Busy as error:
            self._paused_until = time.monotonic() + error.retry_after_s
            await self._in_thread(queue.give_back, one.held)
            return None
        except PiaRayError as error:
            return await self._end_or_postpone(one, error)
        return await self._in_thread(queue.complete, one.held, result)

    async def _make(self, one: _InHand) -> VideoResult:
        """Renders the video and stores its files."""
        job = one.held.document
        request = await self._in_thread(self._jobs.request, job, deadline_s=self._job_timeout_s)
        rendered = await self._render(one, request)
        one.storing = asyncio.ensure_future(self._in_thread(self._jobs.queue.store, one.held, rendered))
        return await asyncio.shield(one.storing)

    async def _render(self, one: _InHand, request: RenderRequest) -> Rendered:
        events = cast(AsyncGenerator[Event, None], self._renderer.render(request))
        try:
            async with contextlib.aclosing(events):
                async for event in events:
                    if isinstance(event, Rendered):
                        return event
                    if isinstance(event, Step):
                        one.count(event)
        except PiaRayError:
            raise
        except Exception as error:  # the row boundary: whatever it is belongs to this job alone
            raise UnexpectedError(f"{type(error).__name__}: {error}\n{traceback.format_exc()}") from error
        raise UnexpectedError("the engine ended without a video")

    async def _keep(self, one: _InHand, making: asyncio.Task[VideoResult]) -> None:
        """Renews the lease and tells the progress until `making` is done.

        Raises:
            JobConflict, JobNotFound: the job is ours no longer.
        """
        told, told_at = one.progress, time.monotonic()
        while not making.done():
            nudged = asyncio.create_task(one.nudged.wait())
            try:
                waits = (making, nudged)
                await asyncio.wait(waits, timeout=self._heartbeat_s, return_when=asyncio.FIRST_COMPLETED)
            finally:
                nudged.cancel()
            late = time.monotonic() - told_at > self._jobs.queue.lease_s / 4
            if making.done() or not (one.progress != told or late or one.nudged.is_set()):
                continue
            one.nudged.clear()
            told, told_at = one.progress, time.monotonic()
            try:
                one.held = await self._in_thread(
                    self._jobs.queue.heartbeat, one.held, progress=told, eta_s=one.eta_s if told is not None else None
                )
            except StorageError as error:
                _log.warning("the heartbeat of %s is late: %s", one.held.document.id, error.message)

    async def _stop(self, one: _InHand, making: asyncio.Task[VideoResult]) -> None:
        """Takes the request back from the engine, and removes what has been stored."""
        making.cancel()
        await asyncio.wait((making,))
        if one.storing is not None:
            await asyncio.wait((one.storing,))
            with contextlib.suppress(StorageError):
                await self._in_thread(self._jobs.queue.discard, one.held)
        for done in (making, one.storing):
            if done is not None and not done.cancelled():
                done.exception()  # seen: asyncio complains of those that nobody looks at

    async def _end_or_postpone(self, one: _InHand, error: PiaRayError) -> VideoJob | None:
        job = one.held.document
        # A Timeout had its time. What is wrong with an engine may be over when the next one is asked.
        again = (error.retryable or isinstance(error, JobError)) and not isinstance(error, Timeout)
        _log.warning("%s, attempt %d: %s: %s", job.id, job.attempt, error.code, error.message)
        if again and job.attempt < self._max_attempts:
            delay_s = self._retry_delay_s * 2 ** (job.attempt - 1)
            await self._in_thread(self._jobs.queue.postpone, one.held, delay_s=delay_s)
            return None
        return await self._in_thread(self._jobs.queue.fail, one.held, error)

    def _tell_courier(self) -> None:
        if self._courier is not None:
            self._courier.wake()

    async def _sweep(self) -> None:
        while True:
            try:
                if num := await self._in_thread(self._jobs.sweep):
                    _log.info("%d video jobs have expired and are removed", num)
            except StorageError as error:
                _log.warning("expired video jobs stay for now: %s", error.message)
            await asyncio.sleep(self._sweep_s * random.uniform(0.75, 1.25))  # noqa: S311

    async def _in_thread(self, call: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        def run() -> _T:
            return call(*args, **kwargs)

        return await asyncio.get_running_loop().run_in_executor(self._threads, run)
