"""The use of each owner since midnight UTC, over all replicas, and its quotas.

One document per owner in storage holds the sums. Each process adds what it has counted every `FLUSH_S`, with
compare-and-swap, and checks quotas by the sums that it read last and its own counts. A check reads no storage. Sums of
other processes are up to two such periods old, and a process that dies loses what it counted since the last one.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Final

from pia_ray import storage
from pia_ray.config.serve import ServeConfig
from pia_ray.errors import QuotaExceeded, StorageError, StorageNotFound

FLUSH_S: Final = 10.0
"""Seconds between the writes of one owner's sums by one process, which bounds the requests to storage."""

_TRIES: Final = 5
_DAY_S: Final = 86_400

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Amounts:
    """The use of an owner, or a part of it."""

    gpu_s: float = 0.0
    """Engine time of videos with all their takes, and about that of requests which failed or were taken back."""
    num_bytes: int = 0
    """Bytes written for it: uploads, the pictures of jobs, finished videos of jobs."""
    num_requests: int = 0
    """Calls that make something, and lines of batches."""

    def __add__(self, other: Amounts) -> Amounts:
        return Amounts(
            self.gpu_s + other.gpu_s, self.num_bytes + other.num_bytes, self.num_requests + other.num_requests
        )

    def __sub__(self, other: Amounts) -> Amounts:
        return self + Amounts(-other.gpu_s, -other.num_bytes, -other.num_requests)


class Usage:
    """The use of all owners of an endpoint, as this process knows it. Safe in threads; without quotas it is empty."""

    def __init__(
        self,
        config: ServeConfig,
        *,
        clock: Callable[[], float] = time.time,
        store_clock: Callable[[], float] | None = None,
    ) -> None:
        """`store_clock` is the time on which all processes agree, and may block: it is read with the sums."""
        self._prefix = storage.join(config.storage, "usage")
        quotas = {
            "gpu_s": (config.gpu_seconds_per_day, "GPU seconds"),
            "num_bytes": (config.bytes_per_day, "stored bytes"),
            "num_requests": (config.requests_per_day, "requests"),
        }
        self._quotas = {name: (most, unit) for name, (most, unit) in quotas.items() if most is not None}
        self._clock = clock
        self._store_clock = store_clock or clock
        self._behind_s = 0.0
        """Seconds by which the clock of this process is behind the store's."""
        self._lock = threading.Lock()
        self._sums: dict[str, tuple[int, Amounts]] = {}
        """By owner, the day of the sums that were read last, and the sums."""
        self._counted: dict[str, Amounts] = {}
        """By owner, what was counted here and is not written yet."""
        self._seen: set[str] = set()
        """Owners whose sums are to be read."""

    def add(self, owner: str, amounts: Amounts) -> None:
        """Counts what an owner has used."""
        if self._quotas:
            with self._lock:
                self._counted[owner] = self._counted.get(owner, Amounts()) + amounts

    def check(self, owner: str) -> None:
        """Checks that an owner may use more.

        Raises:
            QuotaExceeded: it has used up a quota.
        """
        if not self._quotas:
            return
        now = self._now()
        with self._lock:
            self._seen.add(owner)
            day, sums = self._sums.get(owner, (0, Amounts()))
            used = (sums if day == now // _DAY_S else Amounts()) + self._counted.get(owner, Amounts())
        for name, (most, unit) in self._quotas.items():
            if (value := getattr(used, name)) >= most:
                midnight = datetime.fromtimestamp((now // _DAY_S + 1) * _DAY_S, UTC)
                raise QuotaExceeded(
                    f"This key has used {value:,.0f} of its {most:,.0f} {unit} a day; the next day begins at "
                    f"{midnight:%Y-%m-%d %H:%M} UTC.",
                    _DAY_S - now % _DAY_S,
                )

    async def run(self) -> None:
        """Writes and reads the sums until it is cancelled, and then once more."""
        try:
            while self._quotas:
                await asyncio.to_thread(self.flush)
                await asyncio.sleep(FLUSH_S)
        finally:
            if self._quotas:
                await asyncio.to_thread(self.flush)

    def flush(self) -> None:
        """Writes what was counted, and reads the sums of owners that were seen. Blocks."""
        with suppress(StorageError):
            self._behind_s = self._store_clock() - self._clock()
        day = self._now() // _DAY_S
        with self._lock:
            owners = self._counted.keys() | self._seen
            self._seen = set()
            self._sums = {owner: found for owner, found in self._sums.items() if found[0] == day}
        for owner in owners:
            try:
                self._settle(owner)
            except StorageError as error:
                log.warning("the use of %s is written later: %s", owner, error.message)

    def _now(self) -> float:
        return self._clock() + self._behind_s

    def _settle(self, owner: str) -> None:
        with self._lock:
            counted = self._counted.get(owner, Amounts())
        day = int(self._now() // _DAY_S)
        sums = self._merged(owner, counted, day)
        if sums is None:
            log.warning("the use of %s is written later: other processes write it", owner)
            return
        with self._lock:
            self._sums[owner] = (day, sums)
            left = self._counted.pop(owner, Amounts()) - counted
            if left != Amounts():
                self._counted[owner] = left

    def _merged(self, owner: str, counted: Amounts, day: int) -> Amounts | None:
        """The sums in storage, with what was counted added to them; None where others wrote at each try."""
        uri = storage.join(self._prefix, f"{hashlib.sha256(owner.encode()).hexdigest()[:32]}.json")
        for _ in range(_TRIES):
            try:
                content, etag = storage.read_object(uri)
            except StorageNotFound:
                if counted == Amounts():
                    return counted
                if storage.create_bytes(uri, _json(day, counted), content_type="application/json"):
                    return counted
                continue
            sums = _sums(content, day)
            if counted == Amounts():
                return sums
            if storage.replace_bytes(uri, _json(day, sums + counted), etag=etag) is not None:
                return sums + counted
        return None


def _json(day: int, sums: Amounts) -> bytes:
    return json.dumps({"day": day, **asdict(sums)}).encode()


def _sums(content: bytes, day: int) -> Amounts:
    """The sums of a document for that day; none where it is of another day or damaged."""
    try:
        found = json.loads(content)
        if found.pop("day") == day:
            return Amounts(**found)
    except (ValueError, TypeError, KeyError, AttributeError):
        log.warning("a document of use is damaged and begins anew")
    return Amounts()
