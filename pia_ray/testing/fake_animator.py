"""An animator without a model: the interface of `pia_ray.pia.animator.Animator`, faults on demand, no torch."""

from __future__ import annotations

import heapq
import json
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Final, Literal, Self

import numpy as np
from cachetools import LRUCache

from pia_ray.animation import Animation, OnStart, OnStep
from pia_ray.config.catalog import CatalogConfig
from pia_ray.config.knobs import DEFAULT_STYLE
from pia_ray.config.model import ModelConfig, model_for
from pia_ray.config.serve import ServeConfig
from pia_ray.config.workers import DEFAULT_KEEP_MODELS
from pia_ray.errors import Cancelled, NonFiniteFrames, OutOfMemory, RowError, Timeout
from pia_ray.types import AnimationRequest, PreparedRequest

FAULTS: Final = ("oom", "nan", "die", "die-once", "hang", "hang-once", "stuck", "stuck-once", "stuck-all")
"""Words that make `FakeAnimator` fail a row when they stand alone in its prompt."""


class FakeAnimator:
    """An `Animator` without a model: same methods, no torch, frames that depend on image, params and seed alone.

    Frame f shows the picture moved right by f times (motion_scale + 1) pixels, wrapped round, under faint noise from
    the row's seed; the first frame is the picture and its noise. A row takes `seconds_per_step` for each inference
    step; `batch_size` rows ("auto": 1) are at work side by side. `num_loads` says how often an `Animator` that keeps
    `keep_models` models would have loaded one, had its rows come in this order. `log` is a file to which each row that
    begins adds its id, its style and this process's id, a line of JSON, for all processes that animate.

    A row whose prompt holds the word uneven is brighter in every second frame by `seed % 61` 8-bit levels, so that its
    `flicker` depends on the seed. Where the model has a `safety_checker`, one whose prompt holds the word nsfw is not
    safe.

    Faults for tests of failure, each a word that stands alone in a row's prompt:
        oom       the row fails with `OutOfMemory`
        nan       the row fails with `NonFiniteFrames`
        die       the process ends at once with exit status 137, each time
        die-once  the same, but only the first time for that row's id; needs `marks`, a folder that outlives the process
        hang      the row ends only by its deadline (`Timeout`), by `future.cancel()` or by `close` (`Cancelled`)
        hang-once the same, but only the first time for that row's id, as die-once
        stuck     the row does not end before `close`, whatever its deadline, as an engine that hangs over it
        stuck-once the same, but only the first time for that row's id, as die-once
        stuck-all as stuck, and no other row that has begun ends either
    """

    def __init__(
        self,
        model: ModelConfig,
        *,
        styles: Mapping[str, ModelConfig] | None = None,
        keep_models: int = DEFAULT_KEEP_MODELS,
        batch_size: int | Literal["auto"] = "auto",
        cpu_threads: int | None = None,
        seconds_per_step: float = 0.0,
        marks: Path | None = None,
        log: Path | None = None,
    ) -> None:
        self.model = model
        self.styles = dict(styles or {})
        self.batch_size = 1 if batch_size == "auto" else batch_size
        self.model_version = f"{model.name}@fake"
        self.num_loads = 1
        self._styles_in_memory: LRUCache[str, None] = LRUCache(keep_models)
        self._styles_in_memory[DEFAULT_STYLE] = None
        self._lock = threading.Lock()
        self._seconds_per_step = seconds_per_step
        self._marks = marks
        self._log = log
        self.expected_rows: int | None = None
        self._closed = threading.Event()
        self._all_stuck = threading.Event()
        self._waiting: list[tuple[float, int, Callable[[], None]]] = []  # a heap: priority, number of arrival, work
        self._num_submitted = 0
        self._pool = ThreadPoolExecutor(self.batch_size, thread_name_prefix="fake-animator")

    def animate(self, requests: Sequence[AnimationRequest | PreparedRequest]) -> list[Animation | RowError]:
        """One animation or that row's error per request, in order."""
        outcomes: list[Animation | RowError] = []
        for future in [self.submit(request) for request in requests]:
            try:
                outcomes.append(future.result())
            except RowError as error:
                outcomes.append(error)
            except CancelledError:
                outcomes.append(Cancelled("the request was cancelled"))
        return outcomes

    def submit(
        self,
        request: AnimationRequest | PreparedRequest,
        *,
        alone: bool = False,
        on_step: OnStep | None = None,
        on_start: OnStart | None = None,
        priority: float = 0,
    ) -> Future[Animation]:
        """The future animation; its exception is a `RowError`. `future.cancel()` works until the end.

        `alone` changes nothing: rows share nothing here. `on_start` is called when the row begins, `on_step` with
        steps done and steps in all. Rows of a smaller `priority` start first.
        """
        future: Future[Animation] = Future()
        if self._closed.is_set():
            future.set_exception(Cancelled("the animator is closed"))
        else:
            work: Callable[[], None] = partial(self._settle, future, request, time.monotonic(), on_step, on_start)
            with self._lock:
                self._num_submitted += 1
                heapq.heappush(self._waiting, (priority, self._num_submitted, work))
            self._pool.submit(self._start_first)
        return future

    def expect_rows(self, num: int | None) -> None:
        """Keeps the number as `expected_rows`; nothing is compiled here."""
        self.expected_rows = num

    def version_of(self, style: str) -> str:
        """Identity of the model of that style, as results name it."""
        return f"{model_for(style, self.model, self.styles).name}@fake"

    def close(self) -> None:
        """Ends rows that are waiting or hanging with `Cancelled`, then the threads."""
        self._closed.set()
        self._pool.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start_first(self) -> None:
        with self._lock:
            *_, work = heapq.heappop(self._waiting)
        work()

    def _settle(
        self,
        future: Future[Animation],
        request: AnimationRequest | PreparedRequest,
        submitted: float,
        on_step: OnStep | None,
        on_start: OnStart | None,
    ) -> None:
        try:
            if on_start is not None:
                on_start()
            animation = self._run(future, request, submitted, on_step)
        except Exception as error:  # noqa: BLE001  # the row boundary: whatever it is belongs into the future
            if future.set_running_or_notify_cancel():
                future.set_exception(error)
        else:
            if future.set_running_or_notify_cancel():
                future.set_result(animation)

    def _run(
        self,
        future: Future[Animation],
        request: AnimationRequest | PreparedRequest,
        submitted: float,
        on_step: OnStep | None,
    ) -> Animation:
        started = time.monotonic()
        from pia_ray.prepare import prepare  # brings Pillow, which a program that only draws checkpoints needs not

        style = request.params.style
        ready = prepare(request, model_for(style, self.model, self.styles))
        params = ready.params
        self._check(future, request, submitted)
        self._use(style)
        self._log_row(request.id, style)
        self._fail(future, request, submitted)
        for step in range(params.num_inference_steps):
            self._check(future, request, submitted)
            if self._seconds_per_step:
                self._closed.wait(self._seconds_per_step)
            if on_step is not None:
                on_step(step + 1, params.num_inference_steps)
        self._check(future, request, submitted)
        frames = _frames_of(ready)
        ended = time.monotonic()
        return Animation(
            frames=frames,
            params=params,
            model=self.version_of(style),
            id=request.id,
            gpu_s=ended - started,
            animate_s=ended - submitted,
            motion=float(np.abs(frames.astype(np.int16) - frames[0].astype(np.int16)).mean() / 255),
            image=ready.image,
            nsfw=None if self.model.safety_checker is None else "nsfw" in params.prompt.lower().split(),
        )

    def _use(self, style: str) -> None:
        with self._lock:
            self.num_loads += style not in self._styles_in_memory
            self._styles_in_memory[style] = None

    def _log_row(self, row_id: str, style: str) -> None:
        if self._log is None:
            return
        line = json.dumps({"id": row_id, "style": style, "pid": os.getpid()}) + "\n"
        with self._log.open("ab", buffering=0) as stream:  # one write to its end: lines of processes do not mix
            stream.write(line.encode())

    def _check(self, future: Future[Animation], request: AnimationRequest | PreparedRequest, submitted: float) -> None:
        if self._all_stuck.is_set():
            self._closed.wait()
        if self._closed.is_set():
            raise Cancelled("the animator is closed")
        if future.cancelled():
            raise Cancelled("the request was cancelled")
        if request.deadline_s is not None and time.monotonic() - submitted > request.deadline_s:
            raise Timeout(f"not finished within its deadline of {request.deadline_s:g} s")

    def _fail(self, future: Future[Animation], request: AnimationRequest | PreparedRequest, submitted: float) -> None:
        words = set(request.params.prompt.lower().split())
        if "oom" in words:
            raise OutOfMemory("fault by prompt: the row does not fit on this device")
        if "nan" in words:
            raise NonFiniteFrames("fault by prompt: the model produced NaN")
        if "die" in words or ("die-once" in words and self._first_time(request.id)):
            os._exit(137)  # what a shell reports after kill -9
        if "stuck-all" in words:
            self._all_stuck.set()
        if words & {"stuck", "stuck-all"} or ("stuck-once" in words and self._first_time(request.id)):
            self._closed.wait()
        hangs = "hang" in words or ("hang-once" in words and self._first_time(request.id))
        while hangs:
            self._closed.wait(0.02)
            self._check(future, request, submitted)

    def _first_time(self, row_id: str) -> bool:
        if self._marks is None:
            raise ValueError("die-once, hang-once and stuck-once need FakeAnimator(marks=FOLDER)")
        try:
            (self._marks / row_id.encode("utf-8").hex()).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True


def _frames_of(ready: PreparedRequest) -> np.ndarray:
    """The frames [T, H, W, 3], uint8, of a row."""
    params, picture = ready.params, np.asarray(ready.image)  # [H, W, 3], uint8
    noise = np.random.default_rng(params.seed).integers(-4, 5, picture.shape, dtype=np.int16)
    noisy = (picture.astype(np.int16) + noise).clip(0, 255).astype(np.uint8)
    shift = params.motion_scale + 1
    frames = np.stack([np.roll(noisy, index * shift, axis=1) for index in range(params.video_frames)])
    if "uneven" in params.prompt.lower().split():
        frames[1::2] = (frames[1::2].astype(np.int16) + ready.seed % 61).clip(0, 255).astype(np.uint8)
    return frames


def make_fake(
    config: CatalogConfig,
    cpu_threads: int | None,
    *,
    seconds_per_step: float = 0.0,
    marks: Path | None = None,
    log: Path | None = None,
) -> FakeAnimator:
    """A `FakeAnimator` for this config, as `run_catalog(make_animator=...)` and `build_processor` take it.

    It is importable by Ray's workers: `functools.partial(make_fake, marks=FOLDER)` pickles.
    """
    return FakeAnimator(
        config.model,
        styles=config.styles,
        keep_models=config.keep_models,
        batch_size=config.batch_size,
        cpu_threads=cpu_threads,
        seconds_per_step=seconds_per_step,
        marks=marks,
        log=log,
    )


def make_fake_engine(
    config: ServeConfig,
    cpu_threads: int,
    *,
    seconds_per_step: float = 0.0,
    marks: Path | None = None,
    log: Path | None = None,
) -> FakeAnimator:
    """As `make_fake`, for an endpoint: what `pia_ray.online.serve.build_endpoint(make_animator=...)` takes."""
    return FakeAnimator(
        config.models[config.default_model],
        styles=config.models,
        keep_models=config.keep_models,
        batch_size=config.max_batch_size,
        cpu_threads=cpu_threads,
        seconds_per_step=seconds_per_step,
        marks=marks,
        log=log,
    )
