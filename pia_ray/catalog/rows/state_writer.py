"""Writes the state of a worker to the output now and then, so that `pia-ray report` shows it on any machine."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Final, Self

from pia_ray import ledger, storage
from pia_ray.errors import StorageError

log = logging.getLogger(__name__)

FIRST_S: Final = 1.0
"""Seconds to the first record: a worker that is done before writes none."""

EVERY_S: Final = 10.0
"""Seconds between two records: 360 small puts an hour, which cost 0.002 dollars on S3."""

END_S: Final = 2.0
"""Seconds that the end of a worker waits for the removal of its record. The driver removes what is left."""


class StateWriter:
    """Writes on a thread of its own while it is entered, and then removes the record."""

    def __init__(self, output: str, state: Callable[[], ledger.WorkerState]) -> None:
        self._output = output
        self._state = state
        self._ended = threading.Event()
        # A daemon, because the store may hang.
        self._thread = threading.Thread(target=self._run, name="worker-state", daemon=True)

    def start(self) -> None:
        """Begins to write."""
        self._thread.start()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join(END_S)

    def _run(self) -> None:
        wait_s, wrote = FIRST_S, False
        with storage.hurry():
            while not self._ended.wait(wait_s):
                wait_s = EVERY_S
                try:
                    ledger.write_worker(self._output, self._state())
                    wrote = True
                except StorageError as error:
                    log.debug("the state of this worker is not written: %s", error.message)
            if wrote:
                with suppress(StorageError):
                    ledger.remove_worker(self._output, self._state())
