"""The queue of video jobs as a dispatcher has read it last. Calls that need it at the same time share one reading."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from pia_ray.online.documents.document import IndexEntry


class QueueSnapshot:
    """The entries of the queue at the latest reading. It belongs to one event loop at a time."""

    def __init__(self, read: Callable[[], Awaitable[tuple[tuple[IndexEntry, ...], bool]]]) -> None:
        """`read` reads the entries, and says whether they are the whole queue."""
        self._read = read
        self._read_at = float("-inf")
        self._reading: asyncio.Task[None] | None = None
        """A reading that is under way."""
        self.entries: tuple[IndexEntry, ...] = ()
        self.is_whole = True
        """Whether the entries are the whole queue."""
        self.ended: set[str] = set()
        """Jobs that have ended since the reading began."""

    def expire(self) -> None:
        """Makes the next `refresh` read the queue anew, also where a reading is under way."""
        self._read_at, self._reading = float("-inf"), None

    async def refresh(self, *, most_age_s: float) -> None:
        """Reads the queue where it was read longer ago than that.

        Raises:
            StorageError: the queue cannot be read.
        """
        while time.monotonic() - self._read_at > most_age_s:
            reading = self._reading
            if reading is None or reading.done():
                reading = self._reading = asyncio.create_task(self._update())
            await asyncio.shield(reading)
            if reading is self._reading:
                break

    async def _update(self) -> None:
        self.ended = set()
        self.entries, self.is_whole = await self._read()
        if self._reading is asyncio.current_task():  # no job was made meanwhile
            self._read_at = time.monotonic()
