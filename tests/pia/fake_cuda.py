"""CUDA's runtime for the fake GPU: streams, events and memory, of which nothing takes time. It counts what waits."""

from __future__ import annotations

import sys
from collections import Counter
from contextlib import nullcontext
from typing import Any

import pytest
import torch


class FakeRuntime:
    """What torch.cuda does on a machine without one; `waits` counts by the functions of ours that wait for an event."""

    def __init__(self) -> None:
        self.waits: Counter[str] = Counter()

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Puts it in place of torch's for a test."""
        stream = _Stream(self)
        free = 2**34
        replaced: dict[str, Any] = {
            "Event": lambda **_: _Event(self),
            "Stream": lambda *_: stream,
            "stream": lambda _: nullcontext(),
            "current_stream": lambda *_: stream,
            "synchronize": lambda *_: self.wait(),
            "empty_cache": lambda: None,
            "mem_get_info": lambda *_: (free, free),
            "get_per_process_memory_fraction": lambda *_: 1.0,
            "memory_snapshot": list,
            "get_device_name": lambda *_: "a GPU",
        }
        for name, value in replaced.items():
            monkeypatch.setattr(torch.cuda, name, value)

    def wait(self) -> None:
        """Counts a wait of the function that called the runtime."""
        self.waits[sys._getframe(2).f_code.co_qualname] += 1


class _Stream:
    cuda_stream = 0

    def __init__(self, runtime: FakeRuntime) -> None:
        self._runtime = runtime

    def record_event(self, event: _Event) -> None:
        """Records nothing."""

    def synchronize(self) -> None:
        self._runtime.wait()


class _Event:
    def __init__(self, runtime: FakeRuntime) -> None:
        self._runtime = runtime
        self._known_to_be_over = False

    def record(self) -> None:
        """Records nothing."""

    def query(self) -> bool:
        self._known_to_be_over = True
        return True

    def synchronize(self) -> None:
        if not self._known_to_be_over:
            self._runtime.wait()

    def elapsed_time(self, _: _Event) -> float:
        return 1.0
