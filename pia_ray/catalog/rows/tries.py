"""`Tries`, which decides whether a row whose step has failed is tried again, and when. Runs and `validate` share it."""

from __future__ import annotations

import time
from typing import Final

from pia_ray.catalog.rows.outage import Sources
from pia_ray.config.catalog import CatalogConfig
from pia_ray.errors import FetchUnavailable, OutOfMemory, StorageThrottled, StorageUnavailable
from pia_ray.types import ManifestRow

STORE_AWAY: Final = (StorageThrottled, StorageUnavailable)
"""Errors of a row's inputs that the run's patience has waited for."""

SOURCE_AWAY: Final = (*STORE_AWAY, FetchUnavailable)
"""Errors of a row's inputs that may be of all pictures there."""

TRANSIENT: Final = (*SOURCE_AWAY, OutOfMemory, TimeoutError)
"""Errors after which the same worker tries the row again at once; the others wait for `--retry`.

TimeoutError: a step of it hung.
"""

BACKOFF_S: Final = 1.0
"""Pause before the second try of a row; doubles with each one."""

MOST_BACKOFF_S: Final = 30.0


class Tries:
    """The tries of one row, of which so many are `used` before the first one here."""

    def __init__(self, row: ManifestRow, config: CatalogConfig, sources: Sources, *, used: int = 0) -> None:
        self._row = row
        self._config = config
        self._sources = sources
        self._backoff_s = BACKOFF_S
        self._begin = time.monotonic()
        self._throttled_since: float | None = None
        self.used = used
        self.pause_s = 0.0
        """Seconds before the next try."""

    def has_another(self, error: Exception) -> bool:
        """Whether the row is tried again after the error of a try that counts in `used`.

        A try that a host or store was not ready for is taken back. The pause that a host asks for is no part of
        `pause_s`, because the next fetch waits for the host's turn.
        """
        if isinstance(error, FetchUnavailable) and error.retry_after_s is not None:
            now = time.monotonic()
            self._throttled_since = now if self._throttled_since is None else self._throttled_since
            self.used -= 1
            self.pause_s = 0.0
            return now + error.retry_after_s - self._throttled_since <= self._config.patience_s
        away = self._sources.are_away(self._row, error)
        spent = isinstance(error, STORE_AWAY) and time.monotonic() - self._begin > self._config.patience_s
        last = spent or self.used >= self._config.max_attempts or not isinstance(error, TRANSIENT)
        if last and not away:
            return False
        self.used -= away
        self.pause_s, self._backoff_s = self._backoff_s, min(MOST_BACKOFF_S, 2 * self._backoff_s)
        return True


class TurnWaits:
    """Whether a step waits for the turn of a host; such time is no part of the step's limit."""

    def __init__(self) -> None:
        self._waits = self._has_waited = False

    def note(self, waits: bool) -> None:
        """Takes what `Web.note` is called with."""
        self._waits = waits
        self._has_waited = self._has_waited or waits

    def since_last(self) -> bool:
        """Whether the step has waited since the last call of this."""
        found, self._has_waited = self._has_waited, self._waits
        return found
