"""The Animator: models in memory on one thread, called from any number of threads. No Ray, no files, no URIs.

`animate` takes a list and returns a list; `submit` returns a future. A request joins the running rows at their next
step.
"""

from __future__ import annotations

import atexit
import queue
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import CancelledError, Future
from typing import Any, Final, Literal
from weakref import WeakSet

import numpy as np

from pia_ray.animation import Animation, OnStart, OnStep
from pia_ray.config.knobs import DEFAULT_STYLE, AnimationParams
from pia_ray.config.model import ModelConfig, model_for
from pia_ray.config.resolving import parse_params
from pia_ray.config.workers import DEFAULT_BATCH_SIZE, DEFAULT_KEEP_MODELS, MAX_AUTO_BATCH_SIZE
from pia_ray.errors import Cancelled, ConfigError, DeviceLost, ModelUnavailable, PiaRayError, RowError, WeightsError
from pia_ray.pia.admission import AdmissionQueue
from pia_ray.pia.device.placement import set_cpu_threads
from pia_ray.pia.engine import Engine, Row
from pia_ray.pia.finisher import Finisher
from pia_ray.pia.model_cache import cache_key
from pia_ray.pia.style_models import StyleModels
from pia_ray.pia.submissions import Arrival, Finished, PromptToEncode, Submission
from pia_ray.pia.warm_up import warm_up
from pia_ray.prepare import prepare
from pia_ray.types import AnimationRequest, PreparedRequest
from pia_ray.weights import version

EXIT_S: Final = 10.0
"""Seconds that the end of the program waits for each thread of an animator that is open."""


class Animator:
    """PIA models in memory. Use it as a context manager, or call `close`.

    `model` animates requests without a `style`; `styles` are the models of the other styles, by name. `keep_models`
    bounds the models in memory: a style's model is loaded when a request first needs it, while other rows run, and the
    least recently used one is dropped for it. Weights that models have in common are in memory once.

    `batch_size` bounds the rows that denoise together. "auto" is 4 on a CPU; on a GPU the first forwards are timed, and
    it is the number that pays. `cpu_threads` bounds the threads of CPU operators (None: torch's own choice). The
    constructor loads `model`: seconds on a CPU, longer from a cold disk. It then animates a row for each of `warm`,
    so that kernels are chosen and code is compiled for rows of that size; with a model that compiles, for minutes.
    The end of the program ends an animator that is open, after its running step.

    Raises:
        WeightsError: the model cannot be loaded.
        ConfigError: the model's device does not exist, or an argument is not valid.
    """

    def __init__(
        self,
        model: ModelConfig,
        *,
        styles: Mapping[str, ModelConfig] | None = None,
        keep_models: int = DEFAULT_KEEP_MODELS,
        batch_size: int | Literal["auto"] = "auto",
        cpu_threads: int | None = None,
        warm: Sequence[AnimationParams] = (),
    ) -> None:
        if batch_size != "auto" and batch_size < 1:
            raise ConfigError(f'batch_size must be "auto" or at least 1 (got {batch_size})')
        if cpu_threads is not None:
            set_cpu_threads(cpu_threads)
        self.model = model
        self.styles = dict(styles or {})
        self._arrivals: queue.SimpleQueue[Arrival] = queue.SimpleQueue()
        self._models = StyleModels(
            model, self.styles, keep=keep_models, when_loaded=lambda: self._arrivals.put("loaded")
        )
        self._cache, components = self._models.cache, self._models.first
        self.model_version = components.version
        most = MAX_AUTO_BATCH_SIZE if components.device.type == "cuda" else DEFAULT_BATCH_SIZE
        self.batch_size = most if batch_size == "auto" else batch_size
        self._engine = Engine(batch_size=self.batch_size, tunes=batch_size == "auto")
        self._queue: AdmissionQueue[Submission | PromptToEncode] = AdmissionQueue()
        self._running: dict[Row, Submission] = {}
        self._finishing: set[Submission] = set()
        """Rows that have been denoised; their frames are decoded while the next rows are denoised."""
        self._blocked = False
        """Whether the first waiting row waits for one of `_finishing` to end."""
        self._closed = self._closed_by_callback = False
        self._fatal: PiaRayError | None = None  # after it the process cannot animate any more
        self._lock = threading.Lock()
        self._finisher = Finisher(self._engine, self._on_finished, name=f"finisher-{model.name}")
        self._thread = threading.Thread(target=self._run, name=f"animator-{model.name}", daemon=True)
        self._warm_params = tuple(warm)
        self._warmed: Future[None] = Future()
        self._thread.start()
        self._warmed.result()

    def animate(self, requests: Sequence[AnimationRequest | PreparedRequest]) -> list[Animation | RowError]:
        """One animation, or the request's own error, for each request, in order.

        Raises:
            DeviceLost: the GPU needs a new process.
        """
        futures = [self.submit(request) for request in requests]
        results: list[Animation | RowError] = []
        for future in futures:
            try:
                results.append(future.result())
            except RowError as error:
                results.append(error)
            except CancelledError:
                results.append(Cancelled("the request was cancelled"))
        return results

    @property
    def num_loads(self) -> int:
        """Loads of models so far, the one of `model` by the constructor included."""
        return self._cache.num_loads

    def version_of(self, style: str) -> str:
        """Name and version of the model of that style; the name alone where its weights cannot be found.

        Raises:
            BadParameter: there is no such style.
        """
        model = model_for(style, self.model, self.styles)
        if model is self.model:
            return self.model_version
        try:
            return version(model)
        except WeightsError:
            return model.name

    def expect_rows(self, num: int | None) -> None:
        """Says how many rows this animator will be asked for in all, about; None: without end.

        With the model's `compile: auto` a kind of forward is compiled where that pays in the rows that are left.
        """
        self._engine.expected_rows = num

    def submit(
        self,
        request: AnimationRequest | PreparedRequest,
        *,
        alone: bool = False,
        on_step: OnStep | None = None,
        on_start: OnStart | None = None,
        priority: float = 0,
    ) -> Future[Animation]:
        """A future of the animation; its exception is a `RowError`, or a `JobError` where the process is unusable.

        `future.cancel()` works until the end: the row leaves at the next step. `alone` keeps other rows out of the
        engine while this one runs; it is for a row that may have killed its process. Rows start in the order of
        submission, rows of a smaller `priority` sooner: each step of it lets 64 later rows go first.
        """
        future: Future[Animation] = Future()
        try:
            model = model_for(request.params.style, self.model, self.styles)
            waiting = Submission(prepare(request, model), cache_key(model), future, alone, on_step, on_start, priority)
        except RowError as error:
            future.set_exception(error)
            return future
        with self._lock:
            if self._fatal is not None:
                future.set_exception(self._fatal)
            elif self._closed:
                future.set_exception(Cancelled("the animator is closed"))
            else:
                self._arrivals.put(waiting)
        return future

    def encode_prompt(
        self,
        prompt: str,
        *,
        clip_skip: int | None = None,
        style: str = DEFAULT_STYLE,
        lora: str = "default",
        lora_scale: float = 1.0,
    ) -> np.ndarray[Any, Any]:
        """The embedding of a text by the model of a style, float32 [L, C].

        As a request's `prompt_embeds` or `negative_prompt_embeds` it makes the same video as the text. The call waits
        for the running step, because the model has one thread. `clip_skip`, `lora` and `lora_scale` are the knobs of
        these names.

        Raises:
            BadParameter: a knob has no valid value, there is no such style or LoRA, or clip_skip leaves no layer of
                this text encoder.
            ModelUnavailable: the model cannot be loaded, or has been dropped and this is called by on_step_end.
            Cancelled: the animator is closed.
        """
        model = cache_key(model_for(style, self.model, self.styles))
        knobs = parse_params({"prompt": "-", "clip_skip": clip_skip, "lora": lora, "lora_scale": lora_scale})
        params = knobs.model_copy(update={"prompt": prompt})  # an empty text has an embedding, too
        if threading.current_thread() is self._thread:  # called by a request's on_step_end
            if model not in self._cache:
                raise ModelUnavailable(f"the model of style {style} is not in memory, and on_step_end cannot wait")
            return self._engine.encode_prompt(params, self._cache.get(model))
        waiting = PromptToEncode(params, model, Future())
        with self._lock:
            if self._fatal is not None:
                raise self._fatal
            if self._closed:
                raise Cancelled("the animator is closed")
            self._arrivals.put(waiting)
        return waiting.future.result()

    def close(self) -> None:
        """Ends the threads and drops the models; requests that wait or run fail with `Cancelled`.

        A call by on_step or on_step_end does not wait for that: the running step is the last one.
        """
        by_callback = threading.current_thread() in (self._thread, self._finisher.thread)
        with self._lock:
            if not self._closed:
                self._closed, self._closed_by_callback = True, by_callback
                self._arrivals.put(None)
        if by_callback:
            return
        self._thread.join()
        self._finisher.thread.join()
        self._cache.close()

    def __enter__(self) -> Animator:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self) -> None:
        _animators.add(self)
        try:
            self._warm_up()
            while self._receive():
                self._collect_loaded()
                self._admit()
                self._load_next()
                self._drop_abandoned()
                if self._engine.rows:
                    self._step()
        except PiaRayError as error:
            self._fail_all(error)
        except BaseException as error:
            # A bug of the stepper itself, which must not leave a caller waiting for ever.
            self._fail_all(DeviceLost(f"the animator's thread died: {type(error).__name__}: {error}"))
            raise
        else:
            self._fail_all(Cancelled("the animator is closed"))
            if self._closed_by_callback:  # which cannot wait for this thread, so `close` has not done it
                self._cache.close()
        finally:
            self._finisher.stop()  # after the rows that have been denoised

    def _warm_up(self) -> None:
        """Warms up on this thread, which owns the model's CUDA graphs; an error is the constructor's."""
        try:
            if self._warm_params:
                warm_up(self._engine, self._cache.get(cache_key(self.model)), self.model, self._warm_params)
        except BaseException as error:
            self._warmed.set_exception(error)
            raise
        self._warmed.set_result(None)

    @property
    def _only_loading(self) -> bool:
        """Whether no row can join before a model has been loaded."""
        return bool(self._cache.loading) and not any(model in self._cache for model in self._queue.models)

    def _receive(self) -> bool:
        """Moves arrivals to the queue; blocks only where nothing else can be done. False once closed."""
        idle = not self._engine.rows and (not self._queue or self._only_loading or self._blocked)
        while True:
            try:
                arrival = self._arrivals.get(block=idle)
            except queue.Empty:
                return True
            if arrival is None:
                return False
            if isinstance(arrival, Finished):
                self._finishing.discard(arrival.submission)
                if arrival.fatal is not None:
                    raise arrival.fatal
            elif isinstance(arrival, PromptToEncode) and arrival.model in self._cache:
                self._encode(arrival)  # without waiting for room in the batch
                continue
            elif arrival != "loaded":
                self._queue.add(arrival.model, arrival, priority=arrival.priority)
            idle = False

    def _encode(self, prompt: PromptToEncode) -> None:
        try:
            model = self._cache.get(prompt.model)
            prompt.end(self._engine.encode_prompt(prompt.params, model))
        except PiaRayError as error:
            prompt.end(error)
            if not isinstance(error, RowError):
                raise

    def _admit(self) -> None:
        cache = self._cache
        self._blocked = False
        while len(self._running) < self._engine.room:
            if len(self._finishing) > self._engine.room:  # frames of more rows would pile up in memory
                self._blocked = True
                return
            others = (*self._running.values(), *self._finishing)
            fits = (lambda row: cache.make_room(row.model, row.params)) if others else None
            first = self._queue.next(ready=cache, loading=cache.loading, fits=fits)
            if first is None:
                self._blocked = not self._running and bool(self._finishing)
                return
            if isinstance(first, Submission) and others and (first.alone or any(other.alone for other in others)):
                self._blocked = not self._running
                return
            self._queue.pop(first.model, first)
            if isinstance(first, PromptToEncode):
                self._encode(first)
            elif first.is_abandoned:
                first.abandon()
            else:
                self._join(first)

    def _join(self, submission: Submission) -> None:
        submission.start()
        try:
            submission.row = self._engine.join(submission.request, self._cache.get(submission.model))
        except PiaRayError as error:
            submission.end(error)  # before anything else, because no queue holds it any more
            if not isinstance(error, RowError):
                raise
        else:
            self._running[submission.row] = submission

    def _load_next(self) -> None:
        if self._models.start_next(self._queue, running=[row.model for row in self._running.values()]):
            self._engine.measure_memory()  # another one may have been dropped for it

    def _collect_loaded(self) -> None:
        """Adds models that have been loaded; where that failed, fails the rows that wait for them."""
        num_loads, num_models = self._cache.num_loads, len(self._cache)
        failed = self._cache.collect()
        if (self._cache.num_loads, len(self._cache)) != (num_loads, num_models):
            self._engine.measure_memory()
        for key, error in failed.items():
            while key in self._queue.models:
                self._queue.pop(key).end(error)

    def _drop_abandoned(self) -> None:
        """Drops rows that their callers cancelled or whose deadline passed, whether they run or wait."""
        for row, submission in list(self._running.items()):
            if submission.is_abandoned:
                self._engine.leave(row)
                del self._running[row]
                submission.abandon()
        for waiting in self._queue.remove(lambda waiting: waiting.is_abandoned):
            assert isinstance(waiting, Submission)  # a prompt to encode is never abandoned
            waiting.abandon()

    def _step(self) -> None:
        ended = self._engine.advance()
        for row, submission in self._running.items():
            submission.report(row.evaluation.step, row.evaluation.num_steps)
        for row in ended:
            submission = self._running.pop(row)
            self._finishing.add(submission)
            self._finisher.add(row, submission)

    def _on_finished(self, submission: Submission, fatal: PiaRayError | None) -> None:
        self._arrivals.put(Finished(submission, fatal))

    def _fail_all(self, error: PiaRayError) -> None:
        with self._lock:
            self._closed = True
            if not isinstance(error, Cancelled):
                self._fatal = error
        while not self._arrivals.empty():
            late = self._arrivals.get()
            if isinstance(late, Submission | PromptToEncode):
                self._queue.add(late.model, late)
        for waiting in [*self._running.values(), *self._queue]:
            waiting.end(error)
        self._running.clear()
        self._queue = AdmissionQueue()
        self._engine.rows.clear()


_animators: Final[WeakSet[Animator]] = WeakSet()


@atexit.register
def _end_threads() -> None:
    """A thread that is in torch when the interpreter ends would abort the process."""
    for animator in list(_animators):
        animator._arrivals.put(None)
        animator._thread.join(EXIT_S)
        animator._finisher.thread.join(EXIT_S)
