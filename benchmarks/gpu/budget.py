"""The time that all parts have together."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class OutOfTime(BaseException):
    """The time ended while a part measured. No `Exception`, so that nothing in between takes it for its own error."""


class Budget:
    """Seconds that pass by a clock: `time.monotonic`, or another one in tests."""

    def __init__(self, seconds: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._start = clock()
        self._end = self._start + seconds

    @property
    def spent_s(self) -> float:
        """Seconds since the start."""
        return self._clock() - self._start

    @property
    def left_s(self) -> float:
        """Seconds until the end, at least 0."""
        return max(0.0, self._end - self._clock())

    @contextmanager
    def enforced(self) -> Iterator[None]:
        """A context in which `OutOfTime` is raised at the end of the time; a call of native code ends first.

        Only a process's main thread can be interrupted so; on another one nothing is raised.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def stop(number: int, frame: FrameType | None) -> None:
            raise OutOfTime

        before = signal.signal(signal.SIGALRM, stop)
        signal.setitimer(signal.ITIMER_REAL, max(self.left_s, 0.001))
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)

    @contextmanager
    def ended_by(self, end: Callable[[], object], *, after_s: float) -> Iterator[None]:
        """A context that calls `end` on another thread if it is still open so long after the end of the time.

        Native code that does not return, and compiling on another thread, cannot be interrupted.
        """
        timer = threading.Timer(self.left_s + after_s, end)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
