"""The outages of a run: calls that wait for a store or the hub, and sources of pictures that are away."""

from __future__ import annotations

import logging
import re
import threading
import time
from dataclasses import dataclass
from typing import Final

from cachetools import LRUCache

from pia_ray import storage
from pia_ray.errors import FetchUnavailable, HubUnavailable, PiaRayError, RowError
from pia_ray.storage.host_rates import KNOWN_HOSTS
from pia_ray.types import ManifestRow

log = logging.getLogger(__name__)

FAILING_ROWS: Final = 3
"""A source counts as away once so many of its rows have failed in a row: fewer may be faults of their own."""


@dataclass(frozen=True)
class OutageState:
    """An outage that is waited out; the reason is empty where there is none."""

    what: str = ""
    """Names what is away: "the store", "the hub", "the host of the pictures"."""
    reason: str = ""
    num_animations: int = 0
    """Finished animations that wait in memory."""


NO_OUTAGE: Final = OutageState()


def what_is_away(error: PiaRayError) -> str:
    """A name for what does not answer, by the error that says so."""
    if isinstance(error, HubUnavailable):
        return "the hub"
    return "the host of the pictures" if isinstance(error, FetchUnavailable) else "the store"


class Outage:
    """The calls of this process that wait for what is away. Threads share it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waits: dict[object, tuple[PiaRayError, int]] = {}

    @property
    def state(self) -> OutageState:
        """The outage of the call that waits longest, with the animations of all."""
        with self._lock:
            error = next((error for error, _ in self._waits.values()), None)
            number = sum(number for _, number in self._waits.values())
        return NO_OUTAGE if error is None else OutageState(what_is_away(error), error.message, number)

    def notice(self, *, num_animations: int = 0) -> storage.Notice:
        """A notice for `storage.patience`, by whose calls so many finished animations wait."""
        call = object()

        def note(error: PiaRayError | None) -> None:
            with self._lock:
                before = bool(self._waits)
                if error is not None:
                    self._waits[call] = error, num_animations
                else:
                    self._waits.pop(call, None)
                after = bool(self._waits)
            if error is not None and not before:
                log.warning("%s is away: %s", what_is_away(error), error.message)
            elif before and not after:
                log.warning("what was away is back, or no longer waited for")

        return note


class Sources:
    """The hosts that rows read from, as this process has found them. Threads share it.

    Only a host that has answered before can be away: an address that never did is not worth waiting for. An answer of
    503 may be the picture's own fault, so it takes several. For stores `storage.patience` waits. Of `KNOWN_HOSTS`
    sources it is known how they do.
    """

    def __init__(self, outage: Outage, *, patience_s: float) -> None:
        self._outage = outage
        self._patience_s = patience_s
        self._lock = threading.Lock()
        self._answered: LRUCache[frozenset[str], bool] = LRUCache(KNOWN_HOSTS)
        self._failing: LRUCache[frozenset[str], set[str]] = LRUCache(KNOWN_HOSTS)
        self._since: LRUCache[frozenset[str], float] = LRUCache(KNOWN_HOSTS)
        self._notices: dict[frozenset[str], storage.Notice] = {}

    def answered(self, row: ManifestRow) -> None:
        """Notes that the row's source is not away: its files were read, or are not there."""
        source = _source(row)
        with self._lock:
            self._answered[source] = True
            self._failing.pop(source, None)
            self._since.pop(source, None)
            notice = self._notices.pop(source, None)
        if notice is not None:
            notice(None)

    def are_away(self, row: ManifestRow, error: Exception) -> bool:
        """Whether the row has failed because its source is away as a whole, and patience with it is not spent."""
        if not isinstance(error, FetchUnavailable):
            if isinstance(error, RowError):
                self.answered(row)
            return False
        source = _source(row)
        with self._lock:
            failing = self._failing.setdefault(source, set())
            if len(failing) < FAILING_ROWS:
                failing.add(row.work_key)
            since = self._since.setdefault(source, time.monotonic())
            away = source in self._answered and len(failing) >= FAILING_ROWS
            away = away and time.monotonic() - since < self._patience_s
            notice = (
                self._notices.setdefault(source, self._outage.notice()) if away else self._notices.pop(source, None)
            )
        if notice is not None:
            notice(error if away else None)
        return away


def _source(row: ManifestRow) -> frozenset[str]:
    """The hosts and buckets of a row's files; local files and the manifest's own bytes are of one source."""
    return frozenset(_host(uri) for uri in (row.image, *row.references.values()))


def _host(uri: str) -> str:
    # Not urlsplit, which raises for hosts that are not valid.
    found = _HOST.match(uri)
    return found[1] if found else ""


_HOST: Final = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]{0,30}://([^/?#]{0,300})")
