"""Stages of rows that wait out a store that is away, within the run's patience and whatever their time limits."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

from pia_ray import storage
from pia_ray.catalog.rows.outage import Outage
from pia_ray.catalog.rows.stages import Stages
from pia_ray.config.catalog import CatalogConfig
from pia_ray.errors import (
    OutputError,
    OutputUnavailable,
    PiaRayError,
    StorageDenied,
    StorageNotFound,
    StorageThrottled,
    StorageUnavailable,
)

T = TypeVar("T")


class PatientStages:
    """The stages of one worker that use stores. `stopped` ends the waits of those that use the output."""

    def __init__(self, stages: Stages, outage: Outage, config: CatalogConfig, *, stopped: threading.Event) -> None:
        self._stages = stages
        self._outage = outage
        self._config = config
        self._stopped = stopped

    def read(
        self,
        name: str,
        function: Callable[[], T],
        *,
        limit_s: float,
        stopped: threading.Event,
        may_wait: Callable[[], bool],
    ) -> T:
        """The value of a function that reads a row's files. It waits only for a store that has answered before.

        `may_wait` is as for `Stages.call`.

        Raises:
            TimeoutError, CancelledError: as `Stages.call`.
        """
        return self._call(name, function, limit_s=limit_s, stopped=stopped, from_start=False, may_wait=may_wait)

    def use_output(
        self,
        name: str,
        function: Callable[[], T],
        *,
        limit_s: float,
        num_animations: int = 0,
        spared: bool = False,
        undo: Callable[[T], None] | None = None,
    ) -> T:
        """The value of a function that uses the output, whose store it waits for while that is away.

        So many finished animations wait in memory meanwhile. `limit_s` is for the function, not for an outage.
        `undo` is as for `Stages.call`.

        Raises:
            OutputError: the store denies it, or its bucket is gone.
            OutputUnavailable: patience is spent.
            TimeoutError, CancelledError: as `Stages.call`.
        """
        output = self._config.output
        try:
            return self._call(
                name,
                function,
                limit_s=limit_s,
                stopped=self._stopped,
                from_start=True,
                num_animations=num_animations,
                spared=spared,
                undo=undo,
            )
        except (StorageThrottled, StorageUnavailable) as error:
            raise OutputUnavailable(f"the output {output} stayed away: {error.message}") from None
        except (StorageDenied, StorageNotFound) as error:
            raise OutputError(f"the output {output} cannot be used: {error.message}") from None

    def _call(
        self,
        name: str,
        function: Callable[[], T],
        *,
        limit_s: float,
        stopped: threading.Event,
        from_start: bool,
        num_animations: int = 0,
        spared: bool = False,
        may_wait: Callable[[], bool] = lambda: False,
        undo: Callable[[T], None] | None = None,
    ) -> T:
        # The threads of this stage that wait for a store: calls side by side end their waits one by one.
        waiting, lock = set[int](), threading.Lock()
        notice = self._outage.notice(num_animations=num_animations)

        def note(error: PiaRayError | None) -> None:
            with lock:
                waiting.discard(threading.get_ident()) if error is None else waiting.add(threading.get_ident())
                over = not waiting
            if error is not None or over:
                notice(error)

        def patiently() -> T:
            with storage.patience(self._config.patience_s, stopped=stopped, notice=note, from_start=from_start):
                return function()

        return self._stages.call(
            name, patiently, limit_s=limit_s, spared=spared, may_wait=lambda: may_wait() or bool(waiting), undo=undo
        )
