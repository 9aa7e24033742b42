"""Time on the device: what work took there, and how far the host may run ahead of it.

A GPU runs what it is told later than it is told. Nothing here makes it wait.
"""

from __future__ import annotations

import time
from collections import deque
from typing import Final, Protocol

import torch

MOST_AHEAD: Final = 2
"""Steps that the host may have queued on a GPU beyond the one it is at: enough that the GPU never waits for the host,
and few enough that rows which join, leave or turn NaN are noticed soon."""


class Mark(Protocol):
    """A place in the queue of a device, such as `torch.cuda.Event`."""

    def synchronize(self) -> None:
        """Waits until the device has got there."""


class Stopwatch:
    """Times what a device does between the making of this and `stop`."""

    def __init__(self, device: torch.device) -> None:
        self._timed = device.type == "cuda"
        self._started = _event() if self._timed else None
        self._ended: torch.cuda.Event | None = None
        self._started_s = time.perf_counter()
        self._ended_s = self._started_s

    def stop(self) -> Stopwatch:
        """Ends it, where the device's queue ends now."""
        self._ended_s = time.perf_counter()
        if self._timed:
            self._ended = _event()
        return self

    @property
    def seconds(self) -> float:
        """What the device took; waits until it is through."""
        if self._started is None or self._ended is None:
            return self._ended_s - self._started_s
        self._ended.synchronize()
        return float(self._started.elapsed_time(self._ended)) / 1000


class Lead:
    """Holds the host back where it is more than `MOST_AHEAD` steps ahead of a device."""

    def __init__(self) -> None:
        self._marks: deque[Mark] = deque()

    def step(self, mark: Mark) -> None:
        """Takes note of the end of a step; waits for the end of an earlier one, never for this."""
        self._marks.append(mark)
        while len(self._marks) > MOST_AHEAD:
            self._marks.popleft().synchronize()


def mark_of(device: torch.device) -> Mark | None:
    """Where the queue of the device ends now; None for a device without one, whose work is done when told."""
    if device.type != "cuda":
        return None
    mark: Mark = torch.cuda.Event(blocking=True)  # a thread that waits sleeps, and leaves its core to the encoders
    torch.cuda.current_stream(device).record_event(mark)  # type: ignore[arg-type]
    return mark


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
