"""Time on the device: how long work took there, and how far the host may run ahead of it.

A GPU runs work later than the host queues it. Nothing here makes the GPU wait.
"""

from __future__ import annotations

import time
from collections import deque
from typing import Final, Protocol

import torch

MOST_AHEAD: Final = 2
"""Steps that the host may have queued on a GPU beyond the running one: enough that the GPU never waits for the host,
and few enough that rows which join, leave or turn NaN are noticed soon."""


class DeviceEvent(Protocol):
    """A point in the queue of a device, such as `torch.cuda.Event`."""

    def synchronize(self) -> None:
        """Waits until the device has reached it."""


class Stopwatch:
    """Times the work of a device between the constructor and `stop`."""

    def __init__(self, device: torch.device) -> None:
        self._timed = device.type == "cuda"
        self._started = _event() if self._timed else None
        self._ended: torch.cuda.Event | None = None
        self._started_s = time.perf_counter()
        self._ended_s = self._started_s

    def stop(self) -> Stopwatch:
        """Ends the timing at the present end of the device's queue; returns itself."""
        self._ended_s = time.perf_counter()
        if self._timed:
            self._ended = _event()
        return self

    @property
    def has_ended(self) -> bool:
        """Whether the device's work is done, so that `seconds` does not wait."""
        return self._ended is None or self._ended.query()

    @property
    def seconds(self) -> float:
        """The device's time; waits until its work is done."""
        if self._started is None or self._ended is None:
            return self._ended_s - self._started_s
        self._ended.synchronize()
        return float(self._started.elapsed_time(self._ended)) / 1000


class RunAheadLimit:
    """Makes the host wait where it is more than `MOST_AHEAD` steps ahead of a device."""

    def __init__(self) -> None:
        self._events: deque[DeviceEvent] = deque()

    def step(self, event: DeviceEvent) -> None:
        """Records the end of a step; waits for the end of an earlier step, never for this one."""
        self._events.append(event)
        while len(self._events) > MOST_AHEAD:
            self._events.popleft().synchronize()


def record_event(device: torch.device) -> DeviceEvent | None:
    """The present end of the device's queue; None for a CPU, which has no queue."""
    if device.type != "cuda":
        return None
    # A thread that waits for a blocking event sleeps, and so leaves its core to the encoders.
    event: DeviceEvent = torch.cuda.Event(blocking=True)
    torch.cuda.current_stream(device).record_event(event)  # type: ignore[arg-type]
    return event


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
