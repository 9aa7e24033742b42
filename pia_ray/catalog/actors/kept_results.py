"""`KeptResults`: the results of rows that a block which comes again must give again, because no video tells them."""

from __future__ import annotations

import logging
import pickle
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Final

from pia_ray.catalog.actors.key_values import KeyValues
from pia_ray.catalog.verdicts import judged
from pia_ray.result_row import FAILED, ResultRow

log = logging.getLogger(__name__)

KEPT_S: Final = 60.0
"""Seconds that results stay after the end of their block: its call may not have ended for Ray."""


class KeptResults:
    """The results that an actor has given of one run, in a store that outlives its process.

    A row that failed, or has several takes, would else be tried again: beyond its attempts, and to another end than
    the one that was counted. A row with one take is found by the record in its video, but with `all_rows`, for videos
    without such a record.
    """

    def __init__(self, store: KeyValues, *, run_id: str, all_rows: bool) -> None:
        self._store = store
        self._run_id = run_id
        self._all_rows = all_rows
        self._lock = threading.Lock()
        self._keeping: set[str] = set()
        """The blocks with results in the store."""
        self._ended: deque[tuple[float, str]] = deque()

    def of_block(self, block_id: str) -> dict[str, ResultRow]:
        """The results that the block has had before, by work key."""
        # Only this run's actors have written them.
        rows = [row for value in self._store.values(self._key(block_id)).values() for row in pickle.loads(value)]  # noqa: S301
        if rows:
            with self._lock:
                self._keeping.add(block_id)
        return {row.work_key: row for row in rows}

    def keep(self, block_id: str, results: Sequence[ResultRow]) -> None:
        """Writes those of the results that only this tells, in one request; before the driver may see them."""
        alone = [result for result in results if self._all_rows or result.status == FAILED or result.takes]
        if not (alone := judged(alone)):
            return
        with self._lock:
            self._keeping.add(block_id)
        try:
            self._store.put(self._key(block_id, alone[0].work_key), pickle.dumps(alone))
        except Exception:
            log.warning("%d rows are tried again if this worker ends now", len(alone), exc_info=True)

    def end_block(self, block_id: str) -> None:
        """Says that all results of the block have been given; removes those of blocks that ended long ago."""
        now = time.monotonic()
        with self._lock:
            if block_id in self._keeping:
                self._keeping.discard(block_id)
                self._ended.append((now, block_id))
            old = []
            while self._ended and self._ended[0][0] < now - KEPT_S:
                old.append(self._ended.popleft()[1])
        for each in old:
            try:
                self._store.remove(self._key(each))
            except Exception:
                log.debug("results of a block stay until the run ends", exc_info=True)

    def _key(self, block_id: str, work_key: str = "") -> str:
        return f"{kept_prefix(self._run_id)}{block_id}/{work_key}"


def kept_prefix(run_id: str) -> str:
    """The keys of a run's kept results begin so."""
    return f"result/{run_id}/"
