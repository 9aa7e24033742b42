"""A clock for asyncio that skips waits: hours of a loop that mostly sleeps pass in seconds."""

from __future__ import annotations

import asyncio
import selectors
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_real = time.monotonic
_skipped_s = 0.0


def _monotonic() -> float:
    return _real() + _skipped_s


class _Selector(selectors.DefaultSelector):
    """Skips the time of a wait in which no thread works and no socket is ready."""

    num_threads = 0

    def select(self, timeout: float | None = None) -> list[Any]:
        global _skipped_s
        if timeout is None or timeout <= 0 or self.num_threads:
            return super().select(timeout)
        if not (ready := super().select(0.001)):  # what threads call soon arrives by a socket
            _skipped_s += timeout
        return ready


class _Loop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._waits = _Selector()
        super().__init__(self._waits)

    def run_in_executor(self, executor: Any, func: Any, *args: Any) -> asyncio.Future[Any]:  # type: ignore[override]
        self._waits.num_threads += 1
        future = super().run_in_executor(executor, func, *args)
        future.add_done_callback(self._end)
        return future

    def _end(self, _: object) -> None:
        self._waits.num_threads -= 1


@contextmanager
def runner() -> Iterator[asyncio.Runner]:
    """A runner on such a clock. `time.monotonic` of this process follows it for as long as the block lasts."""
    time.monotonic = _monotonic
    try:
        with asyncio.Runner(loop_factory=_Loop) as runner:
            yield runner
    finally:
        time.monotonic = _real
