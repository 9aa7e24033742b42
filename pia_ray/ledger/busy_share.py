"""The busy share of a run's engines, from its result rows."""

from __future__ import annotations

from datetime import datetime


class BusyShare:
    """Takes result rows. Only times of one worker's clock are compared with each other."""

    def __init__(self) -> None:
        self._spans: dict[str, tuple[float, float, float]] = {}

    def add(
        self,
        *,
        worker: str,
        finished_at: datetime,
        fetch_s: float | None,
        animate_s: float | None,
        gpu_s: float | None,
    ) -> None:
        """Counts a row; one without engine time has none of its own."""
        if gpu_s is None:
            return
        end = finished_at.timestamp()
        begin = end - (fetch_s or 0.0) - (animate_s or 0.0)
        first, last, busy_s = self._spans.get(worker, (begin, end, 0.0))
        self._spans[worker] = min(first, begin), max(last, end), busy_s + gpu_s

    @property
    def value(self) -> float | None:
        """Engine time over the time between each worker's first and last row, 0 to 1; None without any row."""
        span_s = sum(last - first for first, last, _ in self._spans.values())
        if span_s <= 0:
            return None
        return sum(min(busy_s, last - first) for first, last, busy_s in self._spans.values()) / span_s
