"""Requests that an animator has accepted, each with the future of its caller, and what its thread is sent.

Knows no engine and no queue.
"""

from __future__ import annotations

import logging
import time
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from pia_ray.animation import Animation, OnStart, OnStep
from pia_ray.config.knobs import AnimationParams
from pia_ray.errors import PiaRayError, Timeout
from pia_ray.pia.engine import Row
from pia_ray.types import PreparedRequest

log = logging.getLogger(__name__)


@dataclass(eq=False)
class Submission:
    """A request with its future; `row` is set while the engine denoises it."""

    request: PreparedRequest
    model: str
    """Key of the model that animates it."""
    future: Future[Animation]
    alone: bool
    on_step: OnStep | None
    on_start: OnStart | None
    priority: float
    row: Row | None = None
    reported_steps: int = 0
    submitted_at: float = field(default_factory=time.monotonic)

    @property
    def params(self) -> AnimationParams:
        """The knobs of its request."""
        return self.request.params

    @property
    def is_abandoned(self) -> bool:
        """Whether its caller cancelled it or its deadline passed."""
        limit = self.request.deadline_s
        return self.future.cancelled() or (limit is not None and time.monotonic() - self.submitted_at > limit)

    def start(self) -> None:
        """Calls `on_start`, because the row is about to join the batch."""
        if self.on_start is not None:
            try:
                self.on_start()
            except Exception:  # a caller's code, on the thread of all callers
                log.exception("on_start of %s failed", self.request.id)

    def report(self, done: int, total: int) -> None:
        """Calls `on_step`, where the number of finished steps has changed."""
        if self.on_step is None or done == self.reported_steps:
            return
        self.reported_steps = done
        try:
            self.on_step(done, total)
        except Exception:  # a caller's code, on the thread of all callers
            log.exception("on_step of %s failed; it is not called again", self.request.id)
            self.on_step = None

    def abandon(self) -> None:
        """Ends it after its caller cancelled it or its deadline passed."""
        limit = self.request.deadline_s
        text = "cancelled by its caller" if limit is None else f"not finished within its deadline of {limit:g} s"
        self.end(Timeout(text))

    def end(self, outcome: Animation | PiaRayError) -> None:
        """Sets the outcome of the future; one that its caller cancelled is only notified."""
        if not self.future.set_running_or_notify_cancel():
            return
        if isinstance(outcome, Animation):
            self.future.set_result(outcome)
        else:
            self.future.set_exception(outcome)


@dataclass(eq=False)
class PromptToEncode:
    """A prompt to encode between two steps, with the future of its embedding."""

    params: AnimationParams
    """The prompt, `clip_skip` and the LoRAs; other knobs play no part."""
    model: str
    """Key of the model that encodes it."""
    future: Future[np.ndarray[Any, Any]]
    priority: Literal[0] = 0
    is_abandoned: Literal[False] = False

    def end(self, outcome: np.ndarray[Any, Any] | PiaRayError) -> None:
        """Sets the outcome of the future."""
        if isinstance(outcome, PiaRayError):
            self.future.set_exception(outcome)
        else:
            self.future.set_result(outcome)


@dataclass(frozen=True)
class Finished:
    """Sent to the animator's thread when a submission has ended."""

    submission: Submission
    fatal: PiaRayError | None


Arrival = Submission | PromptToEncode | Finished | Literal["loaded"] | None
"""Sent to the animator's thread; "loaded": a model has been loaded; None: the animator is to close."""
