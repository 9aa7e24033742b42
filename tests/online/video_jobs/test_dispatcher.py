"""Dispatchers between a job store and renderers: each job is rendered and ended once, whoever dies or is in the way."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import io
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pia_ray import storage
from pia_ray.config.knobs import AnimationParams
from pia_ray.config.serve import ServeConfig
from pia_ray.errors import Busy, Cancelled, DeviceLost, NonFiniteFrames, OutOfMemory, RowError, Timeout
from pia_ray.media import video
from pia_ray.online.documents.document import Revision
from pia_ray.online.rendering.local_renderer import LocalRenderer
from pia_ray.online.rendering.renderer import (
    BATCH_LINE,
    VIDEO_JOB,
    Event,
    FinishedVideo,
    Load,
    Queued,
    Rendered,
    RenderRequest,
    StepDone,
)
from pia_ray.online.video_jobs import JobQueue, JobStore, VideoJob
from pia_ray.online.video_jobs.dispatcher import Dispatcher
from pia_ray.online.video_jobs.documents import JobDocuments
from pia_ray.testing import FakeAnimator
from tests.chaos_proxy import ChaosProxy, chaos
from tests.s3_server import s3, s3_server

__all__ = ["chaos", "s3", "s3_server"]  # fixtures

STEPS = 10
QUICK = {"poll_s": 0.05, "heartbeat_s": 0.05}


class ScriptedRenderer:
    """Does what the prompt says, `step_s` a step; notes what began, ended and was taken back."""

    def __init__(self, name: str = "", *, step_s: float = 0.01) -> None:
        self.name = name
        self.step_s = step_s
        self.begun: list[str] = []
        self.ended: list[str] = []
        self.taken_back: list[str] = []
        self.most_at_once = 0
        self.failures: dict[str, list[BaseException]] = {}
        """By prompt, what to raise at each attempt in turn."""
        self.go_on = asyncio.Event()
        """Prompts that begin with "wait" stop at half until it is set."""

    @property
    def num_running(self) -> int:
        return len(self.begun) - len(self.ended) - len(self.taken_back)

    async def render(self, request: RenderRequest) -> AsyncGenerator[Event, None]:
        prompt = request.params.prompt
        self.begun.append(prompt)
        self.most_at_once = max(self.most_at_once, self.num_running)
        failed = False
        try:
            yield Queued(0)
            for done in range(1, STEPS + 1):
                await asyncio.sleep(self.step_s)
                yield StepDone(done, STEPS)
                if done == STEPS // 2:
                    if left := self.failures.get(prompt):
                        failed = True
                        raise left.pop(0)
                    if prompt.startswith("wait"):
                        await self.go_on.wait()
            yield rendered(request, f"{prompt} by {self.name}".encode())
            self.ended.append(prompt)
        except GeneratorExit:  # whoever has the video may close it
            self.ended.append(prompt)
            raise
        except asyncio.CancelledError:
            self.taken_back.append(prompt)
            raise
        finally:
            if failed:
                self.ended.append(prompt)

    async def load(self) -> Load:
        return Load(self.num_running, 0, self.step_s, ())


def rendered(request: RenderRequest, content: bytes) -> Rendered:
    made = FinishedVideo(
        num_frames=16,
        width=64,
        height=64,
        fps=8,
        size_bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        params=request.params,
        model_version="scripted",
        gpu_s=1.0,
        animate_s=1.0,
        motion=0.1,
    )
    return Rendered(made, content, "mp4", b"thumbnail", b"sheet")


@pytest.fixture
def local(tmp_path: Path) -> str:
    return str(tmp_path / "serve")


def create(
    jobs: JobStore, prompt: str = "a boat", *, priority: int = VIDEO_JOB, owner: str = "ann", **more: Any
) -> VideoJob:
    request = RenderRequest("", AnimationParams(prompt=prompt, num_inference_steps=STEPS), b"", priority=priority)
    return jobs.create(request, owner=owner, model="demo", seconds="2", size="64x64", **more)


def run(work: Callable[[], Coroutine[Any, Any, Any]], *, timeout_s: float = 60) -> Any:
    async def bounded() -> Any:
        async with asyncio.timeout(timeout_s):
            return await work()

    return asyncio.run(bounded())


@contextlib.asynccontextmanager
async def running(*dispatchers: Dispatcher) -> AsyncIterator[None]:
    tasks = [asyncio.create_task(one.run()) for one in dispatchers]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        for task in tasks:
            with contextlib.suppress(asyncio.CancelledError):
                await task


async def until(jobs: JobStore, job: VideoJob, reached: Callable[[VideoJob], bool]) -> VideoJob:
    while not reached(now := await asyncio.to_thread(jobs.get, "ann", job.id)):
        await asyncio.sleep(0.02)
    return now


async def ended(jobs: JobStore, job: VideoJob) -> VideoJob:
    return await until(jobs, job, lambda now: now.ended)


@pytest.fixture(params=["local", "s3"])
def prefix(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "serve") if request.param == "local" else f"{request.getfixturevalue('s3')}/serve"


def test_a_job_shows_its_true_progress_and_then_its_video(prefix: str) -> None:
    async def work() -> None:
        jobs, renderer = JobStore(prefix), ScriptedRenderer("one")
        job = create(jobs, "wait")
        async with running(Dispatcher(renderer, jobs, **QUICK)):
            half = await until(jobs, job, lambda now: now.progress == 50)
            assert half.status == "in_progress"
            assert half.eta_at is not None
            renderer.go_on.set()
            done = await ended(jobs, job)
        assert (done.status, done.progress, done.attempt) == ("completed", 100, 1)
        assert done.result is not None
        assert storage.read_bytes(done.result.video_uri) == b"wait by one"

    run(work)


def test_a_failed_job_that_is_queued_again_is_rendered_by_the_same_dispatcher(local: str) -> None:
    async def work() -> None:
        jobs, renderer = JobStore(local), ScriptedRenderer("one", step_s=0.001)
        renderer.failures["a boat"] = [NonFiniteFrames("NaN")]
        job = create(jobs)
        async with running(Dispatcher(renderer, jobs, **QUICK)):
            assert (await ended(jobs, job)).status == "failed"
            queued = await asyncio.to_thread(jobs.retry, job.id)
            assert (queued.id, queued.status) == (job.id, "queued")
            assert (await ended(jobs, job)).status == "completed"
        assert renderer.begun == ["a boat", "a boat"]

    run(work)


def test_many_dispatchers_render_each_job_once(prefix: str) -> None:
    async def work() -> None:
        renderers = [ScriptedRenderer(str(at)) for at in range(3)]
        stores = [JobStore(prefix) for _ in renderers]
        made = [create(stores[0], f"job {at}") for at in range(9)]
        dispatchers = [
            Dispatcher(renderer, jobs, max_in_flight=2, **QUICK)
            for renderer, jobs in zip(renderers, stores, strict=True)
        ]
        async with running(*dispatchers):
            for job in made:
                assert (await ended(stores[1], job)).status == "completed"
        begun = [prompt for renderer in renderers for prompt in renderer.begun]
        assert sorted(begun) == [f"job {at}" for at in range(9)]
        assert max(renderer.most_at_once for renderer in renderers) <= 2

    run(work)


def test_jobs_go_by_priority_and_then_by_age(local: str) -> None:
    async def work() -> None:
        jobs, renderer = JobStore(local), ScriptedRenderer()
        create(jobs, "line", priority=BATCH_LINE)
        last = create(jobs, "first"), create(jobs, "second"), create(jobs, "line 2", priority=BATCH_LINE)
        async with running(Dispatcher(renderer, jobs, max_in_flight=1, **QUICK)):
            await ended(jobs, last[2])
        assert renderer.begun == ["first", "second", "line", "line 2"]

    run(work)


@pytest.mark.parametrize("take_away", [JobStore.cancel, JobStore.delete])
@pytest.mark.parametrize("nudge", [True, False])
def test_a_job_that_is_taken_away_frees_the_engine(local: str, take_away: Callable[..., object], nudge: bool) -> None:
    async def work() -> None:
        jobs, renderer = JobStore(local, lease_s=60 if nudge else 1), ScriptedRenderer()
        job = create(jobs, "wait")
        dispatcher = Dispatcher(renderer, jobs, max_in_flight=1, **QUICK)
        async with running(dispatcher):
            await until(jobs, job, lambda now: now.progress == 50)
            await asyncio.to_thread(take_away, jobs, "ann", job.id)
            if nudge:
                dispatcher.recheck(job.id)
            other = create(jobs, "other")
            dispatcher.wake()
            await ended(jobs, other)
        assert renderer.taken_back == ["wait"]
        left = [found.uri for found in storage.list_objects(f"{local}/content")]
        assert not [uri for uri in left if job.id in uri]

    run(work)


def test_cancelling_frees_the_real_renderer_at_its_next_step(local: str) -> None:
    async def work() -> None:
        config = ServeConfig.model_validate({"batch_size": 1})
        animator = FakeAnimator(config.models["demo"], styles=config.models, batch_size=1, seconds_per_step=0.05)
        renderer, jobs = LocalRenderer(animator, config), JobStore(local)
        picture = io.BytesIO()
        Image.new("RGB", (64, 64), "red").save(picture, "PNG")
        ids = []
        for steps in (1000, 2):
            params = AnimationParams(prompt="a", num_frames=4, num_inference_steps=steps, width=64, height=64)
            asked = RenderRequest("", params, picture.getvalue())
            ids.append(jobs.create(asked, owner="ann", model="demo", seconds="2", size="64x64"))
        dispatcher = Dispatcher(renderer, jobs, max_in_flight=2, **QUICK)
        async with running(dispatcher):
            await until(jobs, ids[0], lambda now: now.status == "in_progress")
            await asyncio.to_thread(jobs.cancel, "ann", ids[0].id)
            dispatcher.recheck(ids[0].id)
            done = await ended(jobs, ids[1])
            assert (await renderer.load()).num_running == 0
        await renderer.close()
        assert done.result is not None
        assert video.probe(storage.read_bytes(done.result.video_uri)).num_frames == 4
        assert done.size == "64x64"

    run(work)


def test_a_dispatcher_that_shuts_down_in_order_gives_its_job_back(local: str) -> None:
    async def work() -> None:
        jobs, first, second = JobStore(local, lease_s=600), ScriptedRenderer("1"), ScriptedRenderer("2")
        second.go_on.set()
        job = create(jobs, "wait")
        async with running(Dispatcher(first, jobs, **QUICK)):
            await until(jobs, job, lambda now: now.progress == 50)
        assert first.taken_back == ["wait"]
        assert jobs.get("ann", job.id).status == "queued"
        async with running(Dispatcher(second, jobs, **QUICK)):
            done = await ended(jobs, job)
        assert (done.status, done.attempt) == ("completed", 1)

    run(work)


def test_a_drained_dispatcher_ends_what_it_has_and_takes_no_more(local: str) -> None:
    async def work() -> None:
        jobs, renderer = JobStore(local), ScriptedRenderer(step_s=0.05)
        has, late = create(jobs, "has"), create(jobs, "late")
        dispatcher = Dispatcher(renderer, jobs, max_in_flight=1, **QUICK)
        async with running(dispatcher):
            await until(jobs, has, lambda now: now.status == "in_progress")
            await dispatcher.drain(timeout_s=30)
            await asyncio.sleep(0.3)
        assert jobs.get("ann", has.id).status == "completed"
        assert jobs.get("ann", late.id).attempt == 0

    run(work)


def test_a_dispatcher_drains_for_that_time_and_then_gives_back_what_goes_on(local: str) -> None:
    async def work() -> None:
        jobs, renderer = JobStore(local, lease_s=600), ScriptedRenderer()
        has, waits = create(jobs, "has"), create(jobs, "wait")
        dispatcher = Dispatcher(renderer, jobs, max_in_flight=2, **QUICK)
        async with running(dispatcher):
            await until(jobs, waits, lambda now: now.progress == 50)
            started = time.monotonic()
            await dispatcher.drain(timeout_s=1)
            assert 0.9 < time.monotonic() - started < 10
        assert jobs.get("ann", has.id).status == "completed"
        left = jobs.get("ann", waits.id)
        assert (left.status, left.attempt, left.lease_owner) == ("queued", 0, None)

    run(work)


class SlowClaims(JobQueue):
    """A queue whose claims take a while."""

    def __init__(self, documents: JobDocuments) -> None:
        super().__init__(documents)
        self.begun = threading.Event()

    def claim(self, at: Revision[VideoJob], *, worker: str) -> Revision[VideoJob]:
        self.begun.set()
        time.sleep(0.5)
        return super().claim(at, worker=worker)


@pytest.mark.parametrize("drains", [False, True])
def test_a_claim_that_is_under_way_at_the_end_of_a_dispatcher_is_not_lost(local: str, drains: bool) -> None:
    async def work() -> None:
        jobs, renderer = JobStore(local, lease_s=600), ScriptedRenderer()
        jobs.queue = SlowClaims(JobDocuments(local, job_ttl_s=60, lease_s=600))
        job = create(jobs)
        dispatcher = Dispatcher(renderer, jobs, **QUICK)
        async with running(dispatcher):
            await asyncio.to_thread(jobs.queue.begun.wait, 60)
            if drains:
                await dispatcher.drain(timeout_s=60)
        now = jobs.get("ann", job.id)
        assert (now.status, now.attempt) == (("completed", 1) if drains else ("queued", 0))
        assert now.lease_owner is None

    run(work)


def test_a_job_whose_engine_shuts_down_is_given_back_and_that_is_no_attempt(local: str) -> None:
    async def work() -> None:
        jobs, renderer = JobStore(local), ScriptedRenderer()
        renderer.failures["a boat"] = [Cancelled("the engine is shutting down") for _ in range(3)]
        job = create(jobs)
        async with running(Dispatcher(renderer, jobs, max_attempts=1, retry_delay_s=0.05, **QUICK)):
            done = await ended(jobs, job)
        assert (done.status, done.attempt) == ("completed", 1)
        assert len(renderer.begun) == 4

    run(work)


DISPATCHER = """
import asyncio, sys
sys.path.insert(0, {root!r})
from pia_ray.online.video_jobs.dispatcher import Dispatcher
from pia_ray.online.video_jobs import JobStore
from tests.online.video_jobs.test_dispatcher import ScriptedRenderer

async def work():
    jobs = JobStore({prefix!r}, lease_s={lease_s})
    renderer = ScriptedRenderer("process", step_s=0.05)
    await Dispatcher(renderer, jobs, max_in_flight=2, max_attempts=99, poll_s=0.05, heartbeat_s=0.05).run()

asyncio.run(work())
"""


def start_dispatcher(prefix: str, *, lease_s: float) -> subprocess.Popen[bytes]:
    root = str(Path(__file__).parents[3])
    return subprocess.Popen([sys.executable, "-c", DISPATCHER.format(root=root, prefix=prefix, lease_s=lease_s)])


@pytest.mark.heavy
def test_the_job_of_a_killed_process_is_finished_by_another(prefix: str) -> None:
    async def work() -> None:
        jobs, renderer = JobStore(prefix, lease_s=2), ScriptedRenderer("other")
        renderer.go_on.set()
        job = create(jobs, "wait")
        with start_dispatcher(prefix, lease_s=2) as process:
            try:
                await until(jobs, job, lambda now: now.progress == 50)
            finally:
                process.send_signal(signal.SIGKILL)
        async with running(Dispatcher(renderer, jobs, **QUICK)):
            done = await ended(jobs, job)
        assert (done.status, done.attempt) == ("completed", 2)
        assert done.result is not None
        assert storage.read_bytes(done.result.video_uri) == b"wait by other"

    run(work)


@pytest.mark.heavy
def test_no_job_is_lost_or_ended_twice_whatever_is_killed(local: str) -> None:
    async def work() -> None:
        jobs = JobStore(local, lease_s=1)
        made = [create(jobs, f"job {at}") for at in range(20)]
        ends: dict[str, VideoJob] = {}
        processes = [start_dispatcher(local, lease_s=1) for _ in range(2)]
        kills = 0
        try:
            while len(ends) < len(made):
                await asyncio.sleep(0.3)
                for job in jobs.list("ann", limit=100).documents:
                    if job.ended:
                        assert ends.setdefault(job.id, job) == job  # what has ended never changes
                if kills < 4 and any(job.status == "in_progress" for job in jobs.list("ann", limit=100).documents):
                    victim = processes.pop(0)
                    victim.kill()
                    victim.wait()
                    processes.append(start_dispatcher(local, lease_s=1))
                    kills += 1
                    await asyncio.sleep(1.5)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        assert kills
        assert {job.status for job in ends.values()} == {"completed"}
        for job in made:
            result = ends[job.id].result
            assert result is not None
            assert storage.read_bytes(result.video_uri) == f"{job.prompt} by process".encode()
            jobs.delete("ann", job.id)
        assert jobs.queue.entries() == ()
        # A dispatcher killed while it ended a job leaves an entry that the sweep clears when it falls due.
        left = [found.uri.removeprefix(local) for found in storage.list_objects(local)]
        assert not [uri for uri in left if not uri.startswith("/expiring/")]

    run(work, timeout_s=150)


def test_a_job_whose_worker_dies_each_time_fails(local: str) -> None:
    async def work() -> None:
        jobs, renderer = JobStore(local, lease_s=0.0), ScriptedRenderer()
        job = create(jobs)
        for worker in ("a", "b", "c"):
            jobs.queue.claim(jobs.queue.read(jobs.queue.entries()[0]), worker=worker)  # and never heard of again
        async with running(Dispatcher(renderer, jobs, max_attempts=3, **QUICK)):
            done = await ended(jobs, job)
        assert done.error is not None
        assert done.error.code == "worker_died"
        assert renderer.begun == []

    run(work)


def test_a_dispatcher_that_wakes_too_late_changes_nothing(local: str) -> None:
    async def work() -> None:
        jobs, late, quick = JobStore(local, lease_s=1), ScriptedRenderer("late"), ScriptedRenderer("quick")
        quick.go_on.set()
        job = create(jobs, "wait")
        sleeper = Dispatcher(late, jobs, poll_s=0.05, heartbeat_s=3600)
        async with running(sleeper):
            while not late.begun:
                await asyncio.sleep(0.01)
            async with running(Dispatcher(quick, jobs, **QUICK)):
                done = await ended(jobs, job)
                late.go_on.set()
                await sleeper.drain(timeout_s=60)
        now = jobs.get("ann", job.id)
        assert now == done
        assert now.result is not None
        assert storage.read_bytes(now.result.video_uri) == b"wait by quick"
        assert len([found for found in storage.list_objects(f"{local}/content") if "video.mp4" in found.uri]) == 1

    run(work)


@pytest.mark.parametrize(
    ("raised", "attempts", "code"),
    [
        ([NonFiniteFrames("black")], 1, "nan_frames"),
        ([Timeout("too slow")], 1, "timeout"),
        ([OutOfMemory("full")] * 3, 2, "out_of_memory"),
        ([KeyError("/srv/secret")] * 3, 3, "unexpected"),
        ([DeviceLost("gone: /srv/secret")] * 3, 3, "device_lost"),
        ([OutOfMemory("full"), DeviceLost("gone")], 3, None),
        ([asyncio.CancelledError()], 2, None),
    ],
    ids=lambda value: "-".join(type(one).__name__ for one in value) if isinstance(value, list) else None,
)
def test_what_may_pass_is_tried_again_and_what_stays_fails(
    local: str, raised: list[RowError], attempts: int, code: str | None
) -> None:
    async def work() -> None:
        jobs, renderer = JobStore(local), ScriptedRenderer()
        renderer.failures["a boat"] = list(raised)
        job = create(jobs)
        async with running(Dispatcher(renderer, jobs, max_attempts=3, retry_delay_s=0.05, **QUICK)):
            done = await ended(jobs, job)
        assert done.attempt == attempts == len(renderer.begun)
        assert (None if done.error is None else done.error.code) == code
        assert done.status == ("completed" if code is None else "failed")
        assert done.error is None or "secret" not in done.error.message

    run(work)


def test_a_full_engine_gets_the_job_later_and_that_is_no_attempt(local: str) -> None:
    async def work() -> None:
        jobs, renderer = JobStore(local), ScriptedRenderer()
        renderer.failures["a boat"] = [Busy("full", 0.2), Busy("full", 0.2)]
        job = create(jobs)
        begun = time.monotonic()
        async with running(Dispatcher(renderer, jobs, max_attempts=1, **QUICK)):
            done = await ended(jobs, job)
        assert (done.status, done.attempt, len(renderer.begun)) == ("completed", 1, 3)
        assert time.monotonic() - begun > 0.4

    run(work)


def test_a_damaged_document_delays_no_other_job(local: str) -> None:
    async def work() -> None:
        jobs, renderer = JobStore(local), ScriptedRenderer()
        create(jobs, "damaged")
        storage.write_bytes(next(storage.list_objects(f"{local}/jobs")).uri, b"{")
        job = create(jobs, "sound")
        async with running(Dispatcher(renderer, jobs, max_in_flight=1, **QUICK)):
            await ended(jobs, job)
        assert renderer.begun == ["sound"]

    run(work)


@pytest.mark.heavy
def test_a_store_that_is_away_for_a_while_costs_no_job(chaos: ChaosProxy) -> None:
    async def work() -> None:
        jobs, renderer = JobStore(f"{chaos.bucket}/serve"), ScriptedRenderer(step_s=0.1)
        made = [create(jobs, f"job {at}") for at in range(3)]
        async with running(Dispatcher(renderer, jobs, **QUICK)):
            await until(jobs, made[0], lambda now: now.status == "in_progress")
            chaos.faults.extend([503] * 60)
            for job in made:
                done = await ended(jobs, job)
                assert (done.status, done.attempt) == ("completed", 1)
        assert not chaos.faults
        assert len(renderer.begun) == 3

    run(work, timeout_s=120)


def test_expired_jobs_are_removed(local: str) -> None:
    async def work() -> None:
        jobs, renderer = JobStore(local, job_ttl_s=0.0), ScriptedRenderer()
        job = create(jobs)
        async with running(Dispatcher(renderer, jobs, sweep_s=0.2, **QUICK)):
            while any(job.id in found.uri for found in storage.list_objects(local)):
                await asyncio.sleep(0.05)
        assert jobs.list("ann").documents == ()

    run(work)


def test_a_job_of_another_key_does_not_wait_for_a_long_queue_and_weights_count(local: str) -> None:
    async def work() -> None:
        jobs, renderer = JobStore(local), ScriptedRenderer(step_s=0.0)
        for number in range(6):
            create(jobs, f"ann {number}")
        late = [create(jobs, f"bob {number}", owner="bob") for number in range(4)]
        dispatcher = Dispatcher(renderer, jobs, max_in_flight=1, weights={"bob": 2.0}, **QUICK)
        assert (await dispatcher.outlook(late[0])).position == 1
        async with running(dispatcher):
            while len(renderer.ended) < 10:
                await asyncio.sleep(0.02)
        assert renderer.begun[:2] == ["ann 0", "bob 0"]
        assert [prompt for prompt in renderer.begun[:6] if "bob" in prompt] == [f"bob {number}" for number in range(4)]

    run(work)


def test_polls_are_so_far_apart_that_all_open_jobs_of_a_key_may_be_polled(local: str) -> None:
    async def work() -> None:
        jobs, renderer = JobStore(local), ScriptedRenderer(step_s=0.02)
        made = [create(jobs) for _ in range(5)]
        dispatcher = Dispatcher(renderer, jobs, max_in_flight=5, polls_per_minute=60, **QUICK)
        assert {(await dispatcher.outlook(job)).poll_after_ms for job in made} == {5000}
        other = create(jobs, owner="bob")
        dispatcher.wake()
        assert (await dispatcher.outlook(other)).poll_after_ms == 1000

    run(work)


def test_the_outlook_has_the_position_and_the_estimated_time(local: str) -> None:
    async def work() -> None:
        jobs, renderer = JobStore(local), ScriptedRenderer(step_s=0.02)
        dispatcher = Dispatcher(renderer, jobs, max_in_flight=1, **QUICK)
        now, then, line = create(jobs, "wait"), create(jobs), create(jobs, priority=BATCH_LINE)
        outlooks = [await dispatcher.outlook(job) for job in (now, then, line)]
        assert [one.position for one in outlooks] == [0, 1, 2]
        assert [one.eta_s for one in outlooks] == pytest.approx([0.2, 0.4, 0.6])
        async with running(dispatcher):
            half = await until(jobs, now, lambda job: job.progress == 50)
            outlook = await dispatcher.outlook(half)
            assert outlook.position == 0
            assert outlook.eta_s is not None
            assert outlook.eta_s < 10
            assert 250 <= outlook.poll_after_ms <= 10_000
            renderer.go_on.set()
            await ended(jobs, line)
        assert (await dispatcher.outlook(jobs.get("ann", line.id))).eta_s == 0

    run(work)
