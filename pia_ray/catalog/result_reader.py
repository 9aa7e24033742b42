"""`ResultReader`: results that workers give one after the other, read while the run does other things."""

from __future__ import annotations

import contextvars
import queue
import threading
from collections.abc import Iterator, Sequence

from pia_ray.errors import JobError, PiaRayError
from pia_ray.result_row import ResultRow


class ResultReader:
    """Reads a blocking iterator on a thread, so that the run can check its deadline and be interrupted meanwhile."""

    def __init__(self, results: Iterator[Sequence[ResultRow]]) -> None:
        self._results = results
        self._queue: queue.SimpleQueue[Sequence[ResultRow] | BaseException | None] = queue.SimpleQueue()
        self._ended = False
        self._error: BaseException | None = None
        # A daemon: it may be blocked inside the executor, which is closed while this thread still reads.
        context = contextvars.copy_context()
        threading.Thread(target=context.run, args=(self._read,), name="results", daemon=True).start()

    def take(self, *, timeout_s: float) -> Sequence[ResultRow] | None:
        """All results that are there; nothing within the time gives an empty list, the end gives None.

        So the results that come while a part of the ledger is written are the next part, however slow the store is.

        Raises:
            JobError: the workers failed, after their last results.
        """
        rows: list[ResultRow] = []
        while not self._ended:
            try:
                came = self._queue.get(timeout=0 if rows else timeout_s)
            except queue.Empty:
                return rows
            if came is None or isinstance(came, BaseException):
                self._ended, self._error = True, came
            else:
                rows += came
        if rows or self._error is None:
            return rows or None
        if isinstance(self._error, PiaRayError):
            raise self._error
        raise JobError(f"the workers stopped: {type(self._error).__name__}: {self._error}") from self._error

    def _read(self) -> None:
        try:
            for rows in self._results:
                self._queue.put(rows)
            self._queue.put(None)
        except BaseException as error:  # noqa: BLE001 - carried to the thread that asks
            self._queue.put(error)
