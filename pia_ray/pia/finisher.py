"""The thread that waits for the frames of denoised rows, so that the animator's thread goes on with the next rows."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import replace

from pia_ray.animation import Animation
from pia_ray.errors import DeviceLost, PiaRayError
from pia_ray.pia.engine import Engine, Row
from pia_ray.pia.submissions import Submission

log = logging.getLogger(__name__)

OnFinished = Callable[[Submission, PiaRayError | None], None]
"""Called on the finisher's thread after a submission has ended; the error is set where the process is unusable."""


class Finisher:
    """Finishes rows one after the other on a thread of its own.

    It is no ThreadPoolExecutor, because that accepts no work once the main thread has ended, and callers on other
    threads may still wait.
    """

    def __init__(self, engine: Engine, on_finished: OnFinished, *, name: str) -> None:
        self._engine = engine
        self._on_finished = on_finished
        self._denoised: queue.SimpleQueue[tuple[Row, Submission] | None] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._run, name=name, daemon=True)
        self.thread.start()

    def add(self, row: Row, submission: Submission) -> None:
        """Queues a row that has been denoised."""
        self._denoised.put((row, submission))

    def stop(self) -> None:
        """Ends the thread after the rows that are queued; does not wait for it."""
        self._denoised.put(None)

    def _run(self) -> None:
        while (denoised := self._denoised.get()) is not None:
            self._finish(*denoised)
            del denoised  # it would keep its frames on the device until the next one

    def _finish(self, row: Row, submission: Submission) -> None:
        fatal: PiaRayError | None = None
        outcome: Animation | PiaRayError
        try:
            outcome = self._engine.finish(row)
            if isinstance(outcome, Animation):
                outcome = replace(outcome, animate_s=time.monotonic() - submission.submitted_at)
                submission.report(row.evaluation.num_steps, row.evaluation.num_steps)
        except PiaRayError as error:
            outcome = fatal = error
        except BaseException as error:
            # A bug of ours, which must not leave a caller waiting for ever.
            outcome = fatal = DeviceLost(f"the animator's thread died: {type(error).__name__}: {error}")
            log.exception("a row could not be finished")
        submission.end(outcome)
        self._on_finished(submission, fatal)
