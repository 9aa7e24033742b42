"""What a run knows of outages: calls that wait for the output's store, and sources of pictures that are away."""

from __future__ import annotations

import logging
import threading
import time
from typing import Final
from urllib.parse import urlsplit

from pia_ray import storage
from pia_ray.types import ManifestRow

log = logging.getLogger(__name__)

FAILING_ROWS: Final = 3
"""A source counts as away once so many of its rows have failed in a row: fewer may be faults of their own."""


class Outage:
    """The calls of this process that wait for a store that is away. Threads share it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waits: dict[object, tuple[str, int]] = {}

    @property
    def reason(self) -> str:
        """The reason of a call that waits; empty where none does."""
        with self._lock:
            return next((reason for reason, _ in self._waits.values()), "")

    @property
    def num_animations(self) -> int:
        """Finished animations that wait in memory."""
        with self._lock:
            return sum(number for _, number in self._waits.values())

    def notice(self, *, num_animations: int = 0) -> storage.Notice:
        """A notice for `storage.patience`, by whose calls so many finished animations wait."""
        call = object()

        def note(reason: str) -> None:
            with self._lock:
                before = bool(self._waits)
                if reason:
                    self._waits[call] = reason, num_animations
                else:
                    self._waits.pop(call, None)
                after = bool(self._waits)
            if after and not before:
                log.warning("the store is away: %s", reason)
            elif before and not after:
                log.warning("the store is back, or no longer waited for")

        return note


class Sources:
    """The hosts and buckets that rows read from, as this process has found them. Threads share it.

    Only a source that has answered before can be away: an address that never did is not worth waiting for.
    """

    def __init__(self, *, patience_s: float) -> None:
        self._patience_s = patience_s
        self._lock = threading.Lock()
        self._answered: set[frozenset[str]] = set()
        self._failing: dict[frozenset[str], set[str]] = {}
        self._since: dict[frozenset[str], float] = {}

    def succeeded(self, row: ManifestRow) -> None:
        """Notes that the row's files were read."""
        source = _source(row)
        with self._lock:
            self._answered.add(source)
            self._failing.pop(source, None)
            self._since.pop(source, None)

    def is_away(self, row: ManifestRow) -> bool:
        """Whether the row's source, which has just failed, is away as a whole, and patience with it is not spent."""
        source = _source(row)
        with self._lock:
            failing = self._failing.setdefault(source, set())
            if len(failing) < FAILING_ROWS:
                failing.add(row.work_key)
            since = self._since.setdefault(source, time.monotonic())
            away = source in self._answered and len(failing) >= FAILING_ROWS
        return away and time.monotonic() - since < self._patience_s


def _source(row: ManifestRow) -> frozenset[str]:
    """The hosts and buckets of a row's files; local files and the manifest's own bytes are of one source."""
    uris = (row.image, *row.references.values())
    return frozenset(urlsplit(uri[:2048]).netloc if uri.startswith(("https://", "s3://")) else "" for uri in uris)
