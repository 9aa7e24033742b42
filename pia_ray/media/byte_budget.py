"""`ByteBudget`, which bounds the memory that threads of a process take together."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager


class ByteBudget:
    """So many bytes, which threads take in the order in which they come. More than all of it is had alone."""

    def __init__(self, total_bytes: int) -> None:
        self._total_bytes = total_bytes
        self._taken_bytes = 0
        self._changed = threading.Condition()
        self._queue: deque[object] = deque()

    @contextmanager
    def taken(self, num_bytes: int) -> Iterator[None]:
        """Takes the bytes for the time of the block, and waits for them first."""
        num_bytes, ticket = min(num_bytes, self._total_bytes), object()
        with self._changed:
            self._queue.append(ticket)
            self._changed.wait_for(
                lambda: self._queue[0] is ticket and self._taken_bytes + num_bytes <= self._total_bytes
            )
            self._queue.popleft()
            self._taken_bytes += num_bytes
            self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._taken_bytes -= num_bytes
                self._changed.notify_all()
