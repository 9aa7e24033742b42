"""Claims video jobs in storage and has them rendered. Every HTTP replica may run one: each job is ended by one.

One asyncio task. The job of a dispatcher that died is taken over when its lease runs out; one that shuts down in order
gives its jobs back at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import random
import secrets
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final, ParamSpec, TypeVar

from pia_ray.errors import (
    Busy,
    JobConflict,
    JobNotFound,
    StorageError,
    WorkerDied,
)
from pia_ray.online.documents.document import IndexEntry, Revision
from pia_ray.online.rendering.renderer import BATCH_LINE, Renderer
from pia_ray.online.video_jobs import JobStore, VideoJob
from pia_ray.online.video_jobs.attempt import RETRY_DELAY_S, Attempt, AttemptSettings
from pia_ray.online.video_jobs.fair_shares import FairShares
from pia_ray.online.video_jobs.queue_snapshot import QueueSnapshot
from pia_ray.online.video_jobs.webhook_sender import WebhookSender
from pia_ray.online.video_jobs.webhooks import Webhooks

MAX_ENTRIES: Final = 250
"""Entries of the queue that a dispatcher reads; of a longer queue it reads the oldest jobs of some owners."""
MOST_OWNERS: Final = 8
"""Owners whose jobs are read in a longer queue, as it becomes their turn."""
IDLE_POLLS: Final = 20
"""After so many times the interval of polls the queue is read also where there was nothing to claim."""
_SNAPSHOT_S: Final = 2.0
_PACE_S: Final = 30.0
"""Age up to which a reading of the queue says how many jobs of an owner are polled."""

_P = ParamSpec("_P")
_T = TypeVar("_T")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outlook:
    """The expected course of a job."""

    position: int
    """Open jobs before it; MAX_ENTRIES stands for every greater number."""
    eta_s: float | None
    """Estimated seconds until it has ended; None while the duration of jobs is unknown."""
    least_poll_s: float = 0.0
    """Seconds between the polls of a job at which all open jobs of its owner may be polled."""

    @property
    def poll_after_ms(self) -> int:
        """Milliseconds until a client should poll again: half of the remaining time, within bounds."""
        by_eta_ms = 1000.0 if self.eta_s is None else max(1000.0, min(10_000.0, self.eta_s * 1000 / 2))
        return int(max(by_eta_ms, min(60_000.0, self.least_poll_s * 1000)))


@dataclass(frozen=True)
class _Running:
    attempt: Attempt
    task: asyncio.Task[None]


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
        heartbeat_s: float = 3.0,
        sweep_s: float = 300.0,
        retry_delay_s: float = RETRY_DELAY_S,
        count: Callable[[str, float, int], None] = lambda *_: None,
        weights: Mapping[str, float] | None = None,
        polls_per_minute: float = math.inf,
    ) -> None:
        """`count` gets the owner, engine seconds and stored bytes of each attempt that its engine has not broken off.

        `weights` of owners are by owner, 1 where there is none; an owner polls its jobs `polls_per_minute` times.
        """
        self.worker: Final = f"dispatcher-{secrets.token_hex(8)}"
        """Its name in leases."""
        self._renderer = renderer
        self._jobs = jobs
        self._max_in_flight = max_in_flight
        self._settings = AttemptSettings(
            max_attempts=max_attempts,
            job_timeout_s=job_timeout_s,
            heartbeat_s=heartbeat_s,
            retry_delay_s=retry_delay_s,
        )
        self._sender = None
        if webhooks is not None:
            self._sender = WebhookSender(jobs, webhooks, worker=self.worker, poll_s=5 * poll_s)
        self._shares = FairShares({jobs.owner_folder(owner): weight for owner, weight in (weights or {}).items()})
        self._count = count
        self._polls_per_minute = polls_per_minute
        self._poll_s = poll_s
        self._sweep_s = sweep_s
        self._threads: ThreadPoolExecutor | None = None
        """Threads of its own while it runs, because a store that stalls must delay neither other work of the process
        nor the heartbeats."""
        self._running: dict[str, _Running] = {}
        self._claiming: asyncio.Future[Revision[VideoJob]] | None = None
        self._wake = asyncio.Event()
        self._claimable_at: dict[str, float] = {}
        """The times of the next try of jobs that cannot be claimed now, by their ids."""
        self._paused_until = 0.0
        self._draining = False
        self._job_s: float | None = None
        self._snapshot = QueueSnapshot(self._read_queue)

    async def run(self) -> None:
        """Works until it is cancelled; then its jobs are given back. One call at a time."""
        threads = self._threads = ThreadPoolExecutor(2 * self._max_in_flight + 4, thread_name_prefix="jobs")
        self._wake = asyncio.Event()  # of this event loop; an app may be started again in another
        self._snapshot.expire()
        self._draining = False
        loops = [self._dispatch(), self._sweep()]
        if self._sender is not None:
            loops.append(self._sender.run())
        tasks = [asyncio.create_task(loop) for loop in loops]
        try:
            await asyncio.gather(*tasks)
        finally:
            tasks += [each.task for each in self._running.values()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            threads.shutdown(wait=False)

    async def drain(self, *, timeout_s: float) -> None:
        """Claims no more jobs, and waits until those that are being rendered have ended, or for that time."""
        self._draining = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while waits := self._unfinished():
                    await asyncio.wait(waits)

    def _unfinished(self) -> list[asyncio.Future[Any]]:
        claiming = [] if self._claiming is None else [self._claiming]
        return [*claiming, *(each.task for each in self._running.values())]

    def wake(self) -> None:
        """Has the queue read at once, because there is a new job; else it is found within `poll_s`."""
        self._snapshot.expire()
        self._wake.set()

    def recheck(self, job_id: str) -> None:
        """Has a job read at once, because it was cancelled or deleted; if it is rendered here, its engine drops it."""
        self._wake_sender()
        if (running := self._running.get(job_id)) is not None:
            running.attempt.check()

    async def outlook(self, job: VideoJob) -> Outlook:
        """The expected course of a job, whichever process renders it.

        Raises:
            StorageError: the queue cannot be read.
        """
        if job.ended:
            return Outlook(position=0, eta_s=0.0)
        await self._snapshot.refresh(most_age_s=_SNAPSHOT_S if job.eta_at is None else _PACE_S)
        if self._snapshot.is_whole:
            folder = self._jobs.owner_folder(job.owner)
            entries = self._snapshot.entries
            num_open = sum(entry.owner_folder == folder and entry.rank < BATCH_LINE for entry in entries)
        else:
            num_open = await self._in_thread(self._jobs.num_open, job.owner)
        least_poll_s = 60 * num_open / self._polls_per_minute
        if job.eta_at is not None:
            left_s = max(0.0, job.eta_at - await self._in_thread(self._jobs.now))
            return Outlook(position=0, eta_s=left_s, least_poll_s=least_poll_s)
        position = self._position(job)
        job_s = self._job_s
        if job_s is None:
            step_s = (await self._renderer.load()).step_s
            job_s = None if step_s is None else step_s * job.params.num_inference_steps
        eta_s = None if job_s is None else job_s * (1 + position / self._max_in_flight)
        return Outlook(position, eta_s, least_poll_s)

    def _position(self, job: VideoJob) -> int:
        """Open jobs that go before a job which waits: those that are claimed, and those before it in turn."""
        known = self._snapshot.entries
        entries = list(self._shares.ordered(entry for entry in known if entry.id not in self._running))
        last = len(entries) if self._snapshot.is_whole else MAX_ENTRIES
        place = next((place for place, entry in enumerate(entries) if entry.id == job.id), last)
        return place + sum(entry.id in self._running and entry.id != job.id for entry in known)

    def seconds_until_one_ends(self) -> float:
        """Estimated seconds until a job of an owner with many open jobs ends, as the owners take turns: 1 to 60."""
        if self._job_s is None:
            return 10.0
        num_owners = len({entry.owner_folder for entry in self._snapshot.entries}) or 1
        return max(1.0, min(60.0, self._job_s * num_owners / self._max_in_flight))

    async def _dispatch(self) -> None:
        polls = 1.0
        while True:
            is_woken = self._wake.is_set()
            self._wake.clear()
            if (pause_s := self._paused_until - time.monotonic()) <= 0 and self._has_room():
                most_age_s = _SNAPSHOT_S if is_woken and self._snapshot.is_whole else 0.0
                try:
                    num_claimed = await self._claim_some(most_age_s=most_age_s)
                except StorageError as error:
                    _log.warning("the queue of video jobs cannot be read: %s", error.message)
                else:
                    if num_claimed and not self._snapshot.is_whole:
                        continue  # others of the same priority may wait
                    if num_claimed and not is_woken:  # other processes make jobs
                        polls = 1.0
                    elif not num_claimed:
                        polls = min(IDLE_POLLS, 2 * polls)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), max(pause_s, self._wait_s(polls)))

    def _wait_s(self, polls: float) -> float:
        """Seconds until the queue is read again: that many polls, but no longer than until a known job is claimable.

        They vary, so that replicas do not read the queue, and claim the same job, at the same time.
        """
        poll_s = self._poll_s * random.uniform(0.75, 1.25)  # noqa: S311
        next_s = min(self._claimable_at.values(), default=math.inf) - time.monotonic()
        return min(polls * poll_s, max(next_s, 0.0) + poll_s / 4) if self._has_room() else polls * poll_s

    def _has_room(self) -> bool:
        return not self._draining and len(self._running) < self._max_in_flight

    async def _read_queue(self) -> tuple[tuple[IndexEntry, ...], bool]:
        """The entries of the queue, and whether they are all of it; of a longer queue those of some owners."""
        queue, num_owners = self._jobs.queue, max(2, self._max_in_flight - len(self._running))
        entries = await self._in_thread(queue.entries, MAX_ENTRIES)
        if len(entries) < MAX_ENTRIES:
            return entries, True
        num_owners = min(MOST_OWNERS, num_owners)
        return await self._in_thread(queue.heads, self._shares.in_turn, num_owners=num_owners), False

    async def _claim_some(self, *, most_age_s: float) -> int:
        """The number of jobs that are claimed now, as long as there is room."""
        await self._snapshot.refresh(most_age_s=most_age_s)
        entries, num_claimed = self._snapshot.entries, 0
        served: set[str] = set()
        ids = {entry.id for entry in entries}
        self._claimable_at = {job_id: at for job_id, at in self._claimable_at.items() if job_id in ids}
        for entry in self._shares.ordered(entries):
            if not self._has_room():
                break
            if entry.id in self._running or entry.id in self._snapshot.ended:
                continue
            if self._claimable_at.get(entry.id, 0.0) > time.monotonic():
                continue
            if not self._snapshot.is_whole and entry.owner_folder in served:
                break  # it is the turn of owners that were not read
            try:
                if await self._claim(entry):
                    num_claimed += 1
                    served.add(entry.owner_folder)
            except (JobConflict, JobNotFound):
                self._claimable_at[entry.id] = time.monotonic() + self._poll_s
            except StorageError as error:
                _log.error("%s cannot be claimed: %s", entry.id, error.message)
                self._claimable_at[entry.id] = time.monotonic() + 60
        return num_claimed

    async def _claim(self, entry: IndexEntry) -> bool:
        """Whether the job was claimed and begun."""
        found = self._jobs.queue.made(entry)
        if found is None:
            found = await self._in_thread(self._jobs.queue.read, entry)
        wait_s = found.document.claimable_at - await self._in_thread(self._jobs.now)
        if wait_s > 0:
            # A job that has ended may be queued again.
            self._claimable_at[entry.id] = time.monotonic() + (wait_s if math.isfinite(wait_s) else self._poll_s)
            return False
        held = await self._claimed(found)
        if held.document.attempt > self._settings.max_attempts:
            died = WorkerDied(f"The engine died at each of {self._settings.max_attempts} attempts at this video.")
            await self._in_thread(self._jobs.queue.fail, held, died)
            self._wake_sender()
            return False
        self._claimable_at.pop(entry.id, None)
        self._shares.count(entry.owner_folder)
        _log.info("%s claimed, attempt %d", entry.id, held.document.attempt)
        attempt = Attempt(
            held,
            renderer=self._renderer,
            jobs=self._jobs,
            settings=self._settings,
            in_thread=self._in_thread,
            report=lambda job: None if self._sender is None else self._sender.progress.report(job),
        )
        task = asyncio.create_task(self._work(held.document, attempt))
        self._running[entry.id] = _Running(attempt, task)
        return True

    async def _claimed(self, found: Revision[VideoJob]) -> Revision[VideoJob]:
        """The claimed job. A claim that is under way when this is cancelled is given back."""
        queue = self._jobs.queue
        self._claiming = asyncio.ensure_future(self._in_thread(queue.claim, found, worker=self.worker))
        try:
            return await asyncio.shield(self._claiming)
        except asyncio.CancelledError:  # the thread goes on
            with contextlib.suppress(JobConflict, JobNotFound, StorageError):
                await self._in_thread(queue.give_back, await self._claiming)
            raise
        finally:
            self._claiming = None

    async def _work(self, job: VideoJob, attempt: Attempt) -> None:
        """Runs one attempt. Never raises but when it is cancelled."""
        begun, ended = time.monotonic(), None
        try:
            ended = await attempt.run()
            if ended is not None:
                self._count(job.owner, attempt.gpu_s, 0 if ended.result is None else ended.result.size_bytes)
            if ended is not None and ended.status == "completed":
                took_s = time.monotonic() - begun
                self._job_s = took_s if self._job_s is None else 0.7 * self._job_s + 0.3 * took_s
        except Busy as error:
            self._paused_until = time.monotonic() + error.retry_after_s
        except (JobConflict, JobNotFound):
            self._count(job.owner, attempt.gpu_s, 0)
            _log.info("%s was cancelled, deleted or claimed by another process", job.id)
        except StorageError as error:
            _log.error("%s stays claimed until its lease runs out: %s", job.id, error.message)
        finally:
            if ended is not None:
                self._snapshot.ended.add(job.id)
            if ended is None or not self._has_room():
                self._wake.set()
            del self._running[job.id]
            if self._sender is not None:
                self._sender.progress.forget(job.id)
            if ended is not None and ended.webhook_state == "pending":
                self._wake_sender()

    def _wake_sender(self) -> None:
        if self._sender is not None:
            self._sender.wake()

    async def _sweep(self) -> None:
        while True:
            try:
                if num := await self._in_thread(self._jobs.sweep):
                    _log.info("removed %d expired video jobs", num)
            except StorageError as error:
                _log.warning("expired video jobs are kept for now: %s", error.message)
            await asyncio.sleep(self._sweep_s * random.uniform(0.75, 1.25))  # noqa: S311

    async def _in_thread(self, call: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        def run() -> _T:
            return call(*args, **kwargs)

        return await asyncio.get_running_loop().run_in_executor(self._threads, run)
