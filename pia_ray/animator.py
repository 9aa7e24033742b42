"""The Animator: one warm model on one thread, fed by any number of callers. No Ray, no files, no URIs.

`animate` takes a list and gives a list; `submit` gives a future. Requests join the running stepper at its next step.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Literal

import numpy as np

from pia_ray.config import DEFAULT_BATCH_SIZE, ModelConfig
from pia_ray.errors import Cancelled, ConfigError, DeviceLost, PiaRayError, RowError, Timeout
from pia_ray.params import Animation, AnimationRequest
from pia_ray.pia.assemble import assemble
from pia_ray.pia.engine import Engine, Row
from pia_ray.pia.speed import set_cpu_threads
from pia_ray.request import prepare
from pia_ray.weights import resolve as resolve_weights

log = logging.getLogger(__name__)

OnStep = Callable[[int, int], None]
"""Called after each denoising step with steps done and steps in all, on the engine's thread: return at once."""


@dataclass(eq=False)
class _Ticket:
    request: AnimationRequest
    future: Future[Animation]
    submitted_at: float
    alone: bool
    on_step: OnStep | None
    row: Row | None = None
    reported: int = 0

    @property
    def expired(self) -> bool:
        limit = self.request.deadline_s
        return limit is not None and time.monotonic() - self.submitted_at > limit


@dataclass(eq=False)
class _Encoding:
    """A prompt to encode between two steps."""

    prompt: str
    clip_skip: int | None
    future: Future[np.ndarray[Any, Any]]


class Animator:
    """A PIA model held warm. Use as a context manager, or call `close`.

    `batch_size` bounds the rows that denoise together; `cpu_threads` the threads of CPU operators (None: torch's own
    choice). Constructing it loads the model: seconds on a CPU, longer from a cold disk.

    Raises:
        WeightsError: the model cannot be loaded.
        ConfigError: the device is not there.
    """

    def __init__(
        self,
        model: ModelConfig,
        *,
        batch_size: int | Literal["auto"] = "auto",
        cpu_threads: int | None = None,
    ) -> None:
        if batch_size != "auto" and batch_size < 1:
            raise ConfigError(f'batch_size must be "auto" or at least 1 (got {batch_size})')
        if cpu_threads is not None:
            set_cpu_threads(cpu_threads)
        self.model = model
        self.batch_size = DEFAULT_BATCH_SIZE if batch_size == "auto" else batch_size
        components = assemble(resolve_weights(model), model)
        self.model_version = components.version
        self._engine = Engine(components, batch_size=self.batch_size)
        self._arrivals: queue.SimpleQueue[_Ticket | _Encoding | None] = queue.SimpleQueue()
        self._waiting: deque[_Ticket] = deque()
        self._present: dict[Row, _Ticket] = {}
        self._closed = False
        self._spoiled: PiaRayError | None = None
        self._lock = threading.Lock()
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

    def submit(
        self, request: AnimationRequest, *, alone: bool = False, on_step: OnStep | None = None
    ) -> Future[Animation]:
        """A future of the animation; its exception is a `RowError`, or a `JobError` where the process is spoiled.

        `future.cancel()` works until the end: the row leaves at the next step. `alone` keeps other rows out of the
        engine while this one runs, for a row that is suspected of killing its process.
        """
        future: Future[Animation] = Future()
        try:
            ready = prepare(request, self.model)
        except RowError as error:
            future.set_exception(error)
            return future
        ticket = _Ticket(ready, future, time.monotonic(), alone, on_step)
        with self._lock:
            if self._spoiled is not None:
                future.set_exception(self._spoiled)
            elif self._closed:
                future.set_exception(Cancelled("the animator is closed"))
            else:
                self._arrivals.put(ticket)
        return future

    def encode_prompt(self, prompt: str, *, clip_skip: int | None = None) -> np.ndarray[Any, Any]:
        """The model's embedding of a text, float32 [L, C]: given as a request's `prompt_embeds` or
        `negative_prompt_embeds` it makes the same video as the text.

        Waits for the running step, as the model has one thread. LoRAs act as on a request that names none.

        Raises:
            BadParameter: clip_skip leaves no layer of this text encoder.
            Cancelled: the animator is closed.
        """
        if threading.current_thread() is self._thread:  # called by a request's on_step_end
            return self._engine.encode_prompt(prompt, clip_skip=clip_skip)
        encoding = _Encoding(prompt, clip_skip, Future())
        with self._lock:
            if self._spoiled is not None:
                raise self._spoiled
            if self._closed:
                raise Cancelled("the animator is closed")
            self._arrivals.put(encoding)
        return encoding.future.result()

    def close(self) -> None:
        """Ends the thread; requests still waiting or running fail with `Cancelled`."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._arrivals.put(None)
        self._thread.join()

    def __enter__(self) -> Animator:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self) -> None:
        try:
            while self._take():
                self._admit()
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

    def _take(self) -> bool:
        """Moves arrivals to the waiting list; blocks only when there is nothing to do. False once closed."""
        idle = not self._waiting and not self._engine.rows
        while True:
            try:
                ticket = self._arrivals.get(block=idle)
            except queue.Empty:
                return True
            if ticket is None:
                return False
            if isinstance(ticket, _Encoding):
                self._encode(ticket)
                continue
            self._waiting.append(ticket)
            idle = False

    def _encode(self, encoding: _Encoding) -> None:
        try:
            encoding.future.set_result(self._engine.encode_prompt(encoding.prompt, clip_skip=encoding.clip_skip))
        except PiaRayError as error:
            encoding.future.set_exception(error)
            if not isinstance(error, RowError):
                raise

    def _admit(self) -> None:
        while self._waiting and len(self._present) < self.batch_size:
            ticket = self._waiting[0]
            crowded = ticket.alone or any(other.alone for other in self._present.values())
            if crowded and self._present:
                return
            self._waiting.popleft()
            if ticket.future.cancelled() or ticket.expired:
                _settle(ticket, _late(ticket))
                continue
            try:
                ticket.row = self._engine.join(ticket.request)
            except PiaRayError as error:
                # Settled before anything else: this ticket is in no list any more.
                _settle(ticket, error)
                if not isinstance(error, RowError):
                    raise
                continue
            self._present[ticket.row] = ticket

    def _drop(self) -> None:
        """Lets rows go whose caller took them back or whose deadline passed."""
        for row, ticket in list(self._present.items()):
            if ticket.future.cancelled() or ticket.expired:
                self._engine.leave(row)
                del self._present[row]
                _settle(ticket, _late(ticket))

    def _step(self) -> None:
        ended = self._engine.step()
        for row, ticket in self._present.items():
            done = row.evaluation.step
            if done != ticket.reported:
                ticket.reported = done
                _report(ticket, done, row.evaluation.num_steps)
        for row, outcome in ended:
            ticket = self._present.pop(row)
            if isinstance(outcome, Animation):
                outcome = replace(outcome, animate_s=time.monotonic() - ticket.submitted_at)
                _report(ticket, row.evaluation.num_steps, row.evaluation.num_steps)
            _settle(ticket, outcome)

    def _fail_all(self, error: PiaRayError) -> None:
        with self._lock:
            self._closed = True
            if not isinstance(error, Cancelled):
                self._spoiled = error
        while not self._arrivals.empty():
            late = self._arrivals.get()
            if isinstance(late, _Encoding):
                late.future.set_exception(error)
            elif late is not None:
                self._waiting.append(late)
        for ticket in [*self._present.values(), *self._waiting]:
            _settle(ticket, error)
        self._present.clear()
        self._waiting.clear()
        self._engine.rows.clear()


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


def _settle(ticket: _Ticket, outcome: Animation | PiaRayError) -> None:
    """Gives the caller the outcome, or tells a caller who took the request back that it is gone."""
    if not ticket.future.set_running_or_notify_cancel():
        return
    if isinstance(outcome, Animation):
        ticket.future.set_result(outcome)
    else:
        ticket.future.set_exception(outcome)
