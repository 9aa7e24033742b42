"""The stop of a run: signals, and the time that rows which denoise then have to end."""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Final, Literal

Ending = Literal["finished", "deadline", "interrupted"]

GRACE_S: Final = 60.0

CONTAINER_GRACE_S: Final = 25.0
"""Kubernetes kills a container 30 s after SIGTERM, unless its terminationGracePeriodSeconds says otherwise."""

_CONTAINER_FILES: Final = ("/.dockerenv", "/run/.containerenv", "/var/run/secrets/kubernetes.io")


def grace_of(grace_s: float | None) -> float:
    """The seconds that rows which denoise at a stop have to end; None stands for those of this machine."""
    if grace_s is not None:
        return grace_s
    return CONTAINER_GRACE_S if any(Path(name).exists() for name in _CONTAINER_FILES) else GRACE_S


@contextmanager
def stop_on_signals() -> Iterator[threading.Event]:
    """An event that the first SIGINT or SIGTERM of the block sets; a second one raises KeyboardInterrupt.

    A signal whose handler is not Python code keeps it, and so does each one where this is not the main thread.
    """
    stop = threading.Event()

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    kept = {}
    if threading.current_thread() is threading.main_thread():
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        kept = {number: handler for number, handler in handlers.items() if callable(handler)}
    for number in kept:
        signal.signal(number, handle)
    try:
        yield stop
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


class RunStop:
    """The stop of a run: whether it begins no more rows, why, and until when rows may end."""

    def __init__(self, requested: threading.Event, *, deadline: float, grace_s: float) -> None:
        self._requested = requested
        self._deadline = deadline
        self._grace_s = grace_s
        self._ends_at = math.inf
        self.ending: Ending = "finished"
        """The ending of a run that stops now with rows left."""

    def begins(self, now: float) -> bool:
        """Whether it is now that the run is to begin no more rows."""
        if self.ending != "finished" or not (self._requested.is_set() or now > self._deadline):
            return False
        self.ending = "interrupted" if self._requested.is_set() else "deadline"
        self._ends_at = now + self._grace_s
        return True

    def is_over(self, now: float) -> bool:
        """Whether the rows that went on have had their time."""
        return now >= self._ends_at
