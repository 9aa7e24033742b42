"""The bytes that this process fetches from the hub, for those who show the progress of a start."""

from __future__ import annotations

import threading
from typing import Any, Final, Protocol


class Bar(Protocol):
    """The transfer of a file."""

    num_bytes: float
    total: Any


class Transfers:
    """Bytes of all files that have been begun, and those that are here. Threads share it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._bars: list[Bar] = []

    def begin(self, bar: Bar) -> None:
        """Counts a bar in."""
        with self._lock:
            self._bars.append(bar)

    @property
    def bytes(self) -> tuple[int, int]:
        """Those that are here, and all. The hub names the size of a file when its transfer begins."""
        with self._lock:
            bars = list(self._bars)
        return sum(int(bar.num_bytes) for bar in bars), sum(int(bar.total or 0) for bar in bars)


TRANSFERS: Final = Transfers()
"""Of this process."""
