"""`Stages`: calls that may hang, each on a thread of its own, so that their caller goes on after a time limit."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import CancelledError, Future, InvalidStateError
from contextlib import suppress
from typing import Any, TypeVar

from pia_ray import logs

T = TypeVar("T")


class Stages:
    """The running stages of a process's rows. A stage that hangs keeps its thread, which ends with the process.

    Nothing ends a thread that waits for a mount, a FIFO or a codec, so its caller stops waiting for it.
    """

    def __init__(self) -> None:
        self._running: dict[Future[Any], bool] = {}
        """The stages that callers wait for, and whether `cancel` spares them."""
        self._hung: set[threading.Thread] = set()
        self._to_undo: set[threading.Thread] = set()
        """The threads of stages that are undone as they end, because their caller has gone."""

    def call(
        self,
        name: str,
        function: Callable[[], T],
        *,
        limit_s: float,
        spared: bool = False,
        may_wait: Callable[[], bool] = lambda: False,
        undo: Callable[[T], None] | None = None,
    ) -> T:
        """The value of the function. `cancel` with `spared` false lets it go on where it is `spared`.

        While `may_wait` is true at the end of the limit, it has the same time again. `undo` is called with a value that
        comes after its caller has gone on without it.

        Raises:
            TimeoutError: it has not returned within `limit_s`.
            CancelledError: `cancel` was called.
        """
        future: Future[T] = Future()
        thread = threading.Thread(target=_settle, args=(future, function, undo, logs.fields()), name=name, daemon=True)
        self._running[future] = spared
        thread.start()
        try:
            while True:
                try:
                    return future.result(limit_s)
                except TimeoutError:
                    if future.done():
                        raise  # the function's own
                    if not may_wait() and future.cancel():
                        break
        except CancelledError:
            self._leave(thread, undo)
            raise
        finally:
            del self._running[future]
        self._hung.add(thread)
        self._leave(thread, undo)
        raise TimeoutError(f"{name} has not ended within {limit_s:g} s")

    def _leave(self, thread: threading.Thread, undo: Callable[[T], None] | None) -> None:
        if undo is not None:
            self._to_undo = {each for each in (*self._to_undo, thread) if each.is_alive()}

    def wait_until_undone(self, *, timeout_s: float) -> None:
        """Waits until stages that their callers left are undone, or the time is over."""
        ends_at = time.monotonic() + timeout_s
        for thread in tuple(self._to_undo):
            thread.join(max(0.0, ends_at - time.monotonic()))

    def cancel(self, *, spared: bool = False) -> None:
        """Lets the callers of running stages go on with `CancelledError`; those of spared ones too where it says so."""
        for future, is_spared in tuple(self._running.items()):
            if spared or not is_spared:
                future.cancel()

    @property
    def num_hung(self) -> int:
        """The number of stages over their time limit whose threads have not ended."""
        self._hung = {thread for thread in tuple(self._hung) if thread.is_alive()}
        return len(self._hung)


def _settle(
    future: Future[T],
    function: Callable[[], T],
    undo: Callable[[T], None] | None,
    fields: Mapping[str, logs.Field],
) -> None:
    with logs.block_fields(**fields):
        try:
            value = function()
        except BaseException as error:  # noqa: BLE001 - carried to the caller
            with suppress(InvalidStateError):  # it has gone
                future.set_exception(error)
            return
        try:
            future.set_result(value)
        except InvalidStateError:
            if undo is not None:
                undo(value)
