"""Threads for calls that may hang. A thread whose call has ended takes the next one, because a start costs 50 µs."""

from __future__ import annotations

import contextvars
import queue
import threading
from collections.abc import Callable
from typing import Final

IDLE_S: Final = 10.0
"""Seconds without a call after which a thread ends."""

_Call = tuple[str, Callable[[], object]]


def start(call: Callable[[], object], *, name: str) -> None:
    """Begins the call on a daemon thread of that name, which waits for no other call, in an empty context.

    The call raises nothing.
    """
    try:
        thread = _idle.pop()
    except IndexError:
        thread = _SpareThread()
        thread.start()
    thread.calls.put((name, call))


class _SpareThread(threading.Thread):
    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.calls: queue.SimpleQueue[_Call] = queue.SimpleQueue()

    def run(self) -> None:
        while self._run_next():
            _idle.append(self)

    def _run_next(self) -> bool:
        """Whether there was a call. No reference to it stays, because its values may be large."""
        try:
            self.name, call = self.calls.get(timeout=IDLE_S)
        except queue.Empty:
            try:
                _idle.remove(self)
            except ValueError:  # somebody has just taken this thread
                self.name, call = self.calls.get()
            else:
                return False
        contextvars.Context().run(call)
        return True


_idle: Final[list[_SpareThread]] = []
"""The threads that wait for a call, the last one first: its memory is warm."""
