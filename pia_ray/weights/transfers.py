"""The bytes that this process fetches from the hub, for those who show the progress of a start."""

from __future__ import annotations

import threading
from typing import Any, Final

from huggingface_hub.utils.tqdm import tqdm


class Transfers:
    """Bytes of all files that have been begun, and those that are here. Threads share it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._bars: list[CountedBar] = []

    def begin(self, bar: CountedBar) -> None:
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


class CountedBar(tqdm):
    """The hub's own progress bar, which also counts, whether it is shown or not."""

    def __init__(self, *args: Any, **how: Any) -> None:
        # Of a snapshot there are two bars of bytes: as they come over the network, and as they are put together.
        counts = how.get("unit") == "B" and not str(how.get("name") or "").endswith(".transfer")
        self.num_bytes = how.get("initial") or 0
        super().__init__(*args, **how)  # type: ignore[no-untyped-call]
        if counts:
            TRANSFERS.begin(self)

    def update(self, n: float | None = 1) -> Any:
        """As tqdm's, which does nothing where the bar is not shown."""
        self.num_bytes += n or 0
        return super().update(n)
