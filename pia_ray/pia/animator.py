"""The Animator: warm models on one thread, fed by any number of callers. No Ray, no files, no URIs.

`animate` takes a list and gives a list; `submit` gives a future. Requests join the running stepper at its next step.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, replace
from functools import partial
from types import TracebackType
from typing import Any, Literal

import numpy as np

from pia_ray.animation import Animation
from pia_ray.config.knobs import DEFAULT_STYLE
from pia_ray.config.model import ModelConfig, check_style_name, model_for
from pia_ray.config.workers import DEFAULT_BATCH_SIZE, DEFAULT_KEEP_MODELS, MAX_AUTO_BATCH_SIZE
from pia_ray.errors import (
    Cancelled,
    ConfigError,
    DeviceLost,
    ModelUnavailable,
    PiaRayError,
    RowError,
    Timeout,
    WeightsError,
)
from pia_ray.pia.admission import Line
from pia_ray.pia.components import Components
from pia_ray.pia.device.placement import set_cpu_threads
from pia_ray.pia.engine import Engine, Row
from pia_ray.pia.loading.load import assemble
from pia_ray.pia.loading.weight_sharing import Pool
from pia_ray.pia.model_cache import Shelf
from pia_ray.prepare import prepare
from pia_ray.types import AnimationRequest
from pia_ray.weights import resolve as resolve_weights
from pia_ray.weights import version

log = logging.getLogger(__name__)

OnStep = Callable[[int, int], None]
"""Called after each denoising step with steps done and steps in all, on a thread of the animator: return at once."""


@dataclass(eq=False)
class _Ticket:
    request: AnimationRequest
    model: str
    """Key of the model that animates it."""
    future: Future[Animation]
    submitted_at: float
    alone: bool
    on_step: OnStep | None
    priority: int
    row: Row | None = None
    reported: int = 0

    @property
    def gone(self) -> bool:
        """Whether its caller took it back or its deadline passed."""
        limit = self.request.deadline_s
        return self.future.cancelled() or (limit is not None and time.monotonic() - self.submitted_at > limit)


@dataclass(eq=False)
class _Finished:
    """Word from the thread that finishes rows."""

    ticket: _Ticket
    spoiled: PiaRayError | None


@dataclass(eq=False)
class _Encoding:
    """A prompt to encode between two steps."""

    prompt: str
    clip_skip: int | None
    model: str
    """Key of the model that encodes it."""
    future: Future[np.ndarray[Any, Any]]
    priority: Literal[0] = 0
    gone: Literal[False] = False


class Animator:
    """PIA models held warm. Use as a context manager, or call `close`.

    `model` animates requests without a `style`, `styles` are the models that others name. `keep_models` bounds those
    in memory at once: one is loaded when first asked for, beside the rows that run, and the least recently used makes
    room. Weights that models have in common are in memory once.

    `batch_size` bounds the rows that denoise together; "auto" is 4 on a CPU, and on a GPU as many as are found to pay
    by timing the first ones; `cpu_threads` the threads of CPU operators (None: torch's own
    choice). Constructing it loads `model`: seconds on a CPU, longer from a cold disk.

    Raises:
        WeightsError: the model cannot be loaded.
        ConfigError: the device is not there.
    """

    def __init__(
        self,
        model: ModelConfig,
        *,
        styles: Mapping[str, ModelConfig] | None = None,
        keep_models: int = DEFAULT_KEEP_MODELS,
        batch_size: int | Literal["auto"] = "auto",
        cpu_threads: int | None = None,
    ) -> None:
        if batch_size != "auto" and batch_size < 1:
            raise ConfigError(f'batch_size must be "auto" or at least 1 (got {batch_size})')
        if keep_models < 1:
            raise ConfigError(f"keep_models must be at least 1 (got {keep_models})")
        for name in styles or ():
            try:
                check_style_name(name)
            except ValueError as error:
                raise ConfigError(f"styles: {error}") from None
        if cpu_threads is not None:
            set_cpu_threads(cpu_threads)
        self.model = model
        self.styles = dict(styles or {})
        self._models = {_key(each): each for each in (model, *self.styles.values())}
        self._pool = Pool() if self.styles else None
        components = self._load(model)
        self.model_version = components.version
        most = MAX_AUTO_BATCH_SIZE if components.device.type == "cuda" else DEFAULT_BATCH_SIZE
        self.batch_size = most if batch_size == "auto" else batch_size
        self._engine = Engine(batch_size=self.batch_size, tunes=batch_size == "auto")
        self._arrivals: queue.SimpleQueue[_Ticket | _Encoding | _Finished | Literal["loaded"] | None] = (
            queue.SimpleQueue()
        )
        self._shelf = Shelf(keep=keep_models, when_loaded=lambda: self._arrivals.put("loaded"))
        self._shelf.put(_key(model), components)
        self._line: Line[_Ticket | _Encoding] = Line()
        self._present: dict[Row, _Ticket] = {}
        self._finishing: set[_Ticket] = set()
        """Rows that have been denoised; their frames are on the way, beside the next rows' denoising."""
        self._held = False
        """Whether the row that goes next waits for one of these to end."""
        self._denoised: queue.SimpleQueue[tuple[Row, _Ticket] | None] = queue.SimpleQueue()
        self._closed = False
        self._spoiled: PiaRayError | None = None
        self._lock = threading.Lock()
        # No ThreadPoolExecutor: it takes nothing more once the main thread has ended, and callers on others may wait.
        self._finisher = threading.Thread(target=self._finish_all, name=f"finisher-{model.name}", daemon=True)
        self._finisher.start()
        self._thread = threading.Thread(target=self._run, name=f"animator-{model.name}", daemon=True)
        self._thread.start()

    def animate(self, requests: Sequence[AnimationRequest]) -> list[Animation | RowError]:
        """One animation, or that request's own error, per request and in order.

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
                results.append(Cancelled("the request was taken back"))
        return results

    @property
    def num_loads(self) -> int:
        """How often a model has been loaded so far, `model` at the start included."""
        return self._shelf.num_loads

    def version_of(self, style: str) -> str:
        """Name and version of the model of that style; the name alone where its weights are not to be found.

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

    def submit(
        self,
        request: AnimationRequest,
        *,
        alone: bool = False,
        on_step: OnStep | None = None,
        priority: int = 0,
    ) -> Future[Animation]:
        """A future of the animation; its exception is a `RowError`, or a `JobError` where the process is spoiled.

        `future.cancel()` works until the end: the row leaves at the next step. `alone` keeps other rows out of the
        engine while this one runs, for a row that is suspected of killing its process. Rows start in the order they
        come, but those of a smaller `priority` sooner: each step of it lets 64 later rows go first.
        """
        future: Future[Animation] = Future()
        try:
            model = model_for(request.params.style, self.model, self.styles)
            ready = prepare(request, model)
        except RowError as error:
            future.set_exception(error)
            return future
        ticket = _Ticket(ready, _key(model), future, time.monotonic(), alone, on_step, priority)
        with self._lock:
            if self._spoiled is not None:
                future.set_exception(self._spoiled)
            elif self._closed:
                future.set_exception(Cancelled("the animator is closed"))
            else:
                self._arrivals.put(ticket)
        return future

    def encode_prompt(
        self, prompt: str, *, clip_skip: int | None = None, style: str = DEFAULT_STYLE
    ) -> np.ndarray[Any, Any]:
        """The embedding of a text by the model of a style, float32 [L, C]: given as a request's `prompt_embeds` or
        `negative_prompt_embeds` it makes the same video as the text.

        Waits for the running step, as the model has one thread. LoRAs act as on a request that names none.

        Raises:
            BadParameter: there is no such style, or clip_skip leaves no layer of this text encoder.
            ModelUnavailable: the model cannot be loaded, or has been dropped and this is called by on_step_end.
            Cancelled: the animator is closed.
        """
        model = _key(model_for(style, self.model, self.styles))
        if threading.current_thread() is self._thread:  # called by a request's on_step_end
            if model not in self._shelf:
                raise ModelUnavailable(f"the model of style {style} is not in memory, and on_step_end cannot wait")
            return self._engine.encode_prompt(prompt, self._shelf.use(model), clip_skip=clip_skip)
        encoding = _Encoding(prompt, clip_skip, model, Future())
        with self._lock:
            if self._spoiled is not None:
                raise self._spoiled
            if self._closed:
                raise Cancelled("the animator is closed")
            self._arrivals.put(encoding)
        return encoding.future.result()

    def close(self) -> None:
        """Ends the threads and drops the models; requests still waiting or denoising fail with `Cancelled`.

        Called by on_step or on_step_end it does not wait for that: the running step is the last.
        """
        with self._lock:
            if not self._closed:
                self._closed = True
                self._arrivals.put(None)
        if threading.current_thread() in (self._thread, self._finisher):
            return
        self._thread.join()
        self._finisher.join()
        self._shelf.close()

    def __enter__(self) -> Animator:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self) -> None:
        try:
            while self._take():
                self._collect()
                self._admit()
                self._load_next()
                self._drop()
                if self._engine.rows:
                    self._step()
        except PiaRayError as error:
            self._fail_all(error)
        except BaseException as error:
            # A bug of the stepper itself: no caller may wait for ever on a dead thread.
            self._fail_all(DeviceLost(f"the animator's thread died: {type(error).__name__}: {error}"))
            raise
        else:
            self._fail_all(Cancelled("the animator is closed"))
            # Here, too, for it may be a callback that closed the animator, which cannot wait for its own thread.
            self._shelf.close()
        finally:
            self._denoised.put(None)  # the last word: what has been denoised is still finished

    @property
    def _only_loads(self) -> bool:
        """Whether no row can join before a model has been loaded."""
        return bool(self._shelf.coming) and not any(model in self._shelf for model in self._line.models)

    def _take(self) -> bool:
        """Moves arrivals to the line; blocks only when there is nothing to do. False once closed."""
        idle = not self._engine.rows and (not self._line or self._only_loads or self._held)
        while True:
            try:
                ticket = self._arrivals.get(block=idle)
            except queue.Empty:
                return True
            if ticket is None:
                return False
            if isinstance(ticket, _Finished):
                self._finishing.discard(ticket.ticket)
                if ticket.spoiled is not None:
                    raise ticket.spoiled
                idle = False
                continue
            if isinstance(ticket, _Encoding) and ticket.model in self._shelf:
                self._encode(ticket)  # without waiting for a place
                continue
            if ticket != "loaded":
                self._line.add(ticket.model, ticket, priority=ticket.priority)
            idle = False

    def _encode(self, encoding: _Encoding) -> None:
        try:
            model = self._shelf.use(encoding.model)
            embedding = self._engine.encode_prompt(encoding.prompt, model, clip_skip=encoding.clip_skip)
            encoding.future.set_result(embedding)
        except PiaRayError as error:
            encoding.future.set_exception(error)
            if not isinstance(error, RowError):
                raise

    def _admit(self) -> None:
        shelf = self._shelf
        self._held = False
        while len(self._present) < self._engine.room:
            if len(self._finishing) > self._engine.room:  # frames of more would pile up
                self._held = True
                return
            ticket = self._line.next(ready=shelf, coming=shelf.coming)
            if ticket is None:
                return
            if isinstance(ticket, _Encoding):
                self._line.pop(ticket.model)
                self._encode(ticket)
                continue
            others = (*self._present.values(), *self._finishing)
            if others and (ticket.alone or any(other.alone for other in others)):
                self._held = not self._present
                return
            self._line.pop(ticket.model)
            if ticket.gone:
                _settle(ticket, _late(ticket))
                continue
            try:
                ticket.row = self._engine.join(ticket.request, shelf.use(ticket.model))
            except PiaRayError as error:
                # Settled before anything else: this ticket is in no list any more.
                _settle(ticket, error)
                if not isinstance(error, RowError):
                    raise
                continue
            self._present[ticket.row] = ticket

    def _load(self, model: ModelConfig) -> Components:
        started = time.perf_counter()
        components = assemble(resolve_weights(model), model, self._pool)
        log.info("model %s loaded in %.1f s", components.version, time.perf_counter() - started)
        return components

    def _load_next(self) -> None:
        """Starts to load the model that rows have waited for longest, if one in memory can make room for it."""
        wanted = self._line.models
        missing = next((key for key in wanted if key not in self._shelf), None)
        if missing is None or missing in self._shelf.coming:
            return
        busy = {ticket.model for ticket in self._present.values()}
        if missing != wanted[0] or self._line.first_may_wait:
            busy.update(wanted)  # rows that wait for a model in memory go first
        if self._shelf.begin(missing, partial(self._load, self._models[missing]), busy=busy):
            self._engine.measure_memory()  # another one may have been dropped for it

    def _collect(self) -> None:
        """Takes in models that have been loaded; where that failed, fails the rows that wait for it."""
        num_loads, num_models = self._shelf.num_loads, len(self._shelf)
        failed = self._shelf.collect()
        if (self._shelf.num_loads, len(self._shelf)) != (num_loads, num_models):
            self._engine.measure_memory()
        for key, error in failed.items():
            while key in self._line.models:
                _settle(self._line.pop(key), error)

    def _drop(self) -> None:
        """Lets rows go whose caller took them back or whose deadline passed, whether they run or wait."""
        for row, ticket in list(self._present.items()):
            if ticket.gone:
                self._engine.leave(row)
                del self._present[row]
                _settle(ticket, _late(ticket))
        for waiting in self._line.remove(lambda ticket: ticket.gone):
            assert isinstance(waiting, _Ticket)  # a prompt to encode stays
            _settle(waiting, _late(waiting))

    def _step(self) -> None:
        ended = self._engine.advance()
        for row, ticket in self._present.items():
            done = row.evaluation.step
            if done != ticket.reported:
                ticket.reported = done
                _report(ticket, done, row.evaluation.num_steps)
        for row in ended:
            ticket = self._present.pop(row)
            self._finishing.add(ticket)
            self._denoised.put((row, ticket))

    def _finish_all(self) -> None:
        """Finishes rows one after the other, on a thread of its own."""
        while (denoised := self._denoised.get()) is not None:
            self._finish(*denoised)
            del denoised  # its frames on the device would lie there until the next one

    def _finish(self, row: Row, ticket: _Ticket) -> None:
        """Waits for the frames of a row that ended, and gives its caller the outcome."""
        spoiled: PiaRayError | None = None
        outcome: Animation | PiaRayError
        try:
            outcome = self._engine.finish(row)
            if isinstance(outcome, Animation):
                outcome = replace(outcome, animate_s=time.monotonic() - ticket.submitted_at)
                _report(ticket, row.evaluation.num_steps, row.evaluation.num_steps)
        except PiaRayError as error:
            outcome = spoiled = error
        except BaseException as error:
            # A bug of ours: no caller may wait for ever on it.
            outcome = spoiled = DeviceLost(f"the animator's thread died: {type(error).__name__}: {error}")
            log.exception("a row could not be finished")
        _settle(ticket, outcome)
        self._arrivals.put(_Finished(ticket, spoiled))

    def _fail_all(self, error: PiaRayError) -> None:
        with self._lock:
            self._closed = True
            if not isinstance(error, Cancelled):
                self._spoiled = error
        while not self._arrivals.empty():
            late = self._arrivals.get()
            if isinstance(late, _Ticket | _Encoding):
                self._line.add(late.model, late)
        for ticket in [*self._present.values(), *self._line]:
            _settle(ticket, error)
        self._present.clear()
        self._line = Line()
        self._engine.rows.clear()


def _key(model: ModelConfig) -> str:
    """Equal for models that are the same in memory."""
    return model.model_dump_json(exclude={"defaults", "description", "long_edge", "size_step"})


def _report(ticket: _Ticket, done: int, total: int) -> None:
    if ticket.on_step is None:
        return
    try:
        ticket.on_step(done, total)
    except Exception:  # a caller's code, on the thread of all callers
        log.exception("on_step of %s failed; it is not called again", ticket.request.id)
        ticket.on_step = None


def _late(ticket: _Ticket) -> Timeout:
    limit = ticket.request.deadline_s
    return Timeout(f"not finished within its deadline of {limit:g} s" if limit is not None else "taken back")


def _settle(ticket: _Ticket | _Encoding, outcome: Animation | PiaRayError) -> None:
    """Gives the caller the outcome, or tells a caller who took the request back that it is gone."""
    if not ticket.future.set_running_or_notify_cancel():
        return
    if isinstance(outcome, Animation):
        assert isinstance(ticket, _Ticket)
        ticket.future.set_result(outcome)
    else:
        ticket.future.set_exception(outcome)
