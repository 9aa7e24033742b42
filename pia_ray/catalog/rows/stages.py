"""`Stages`: calls that may hang, each on a thread of its own, so that their caller goes on after a time limit."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, InvalidStateError
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

    def call(
        self,
        name: str,
        function: Callable[[], T],
        *,
        limit_s: float,
        spared: bool = False,
        may_wait: Callable[[], bool] = lambda: False,
    ) -> T:
        """The value of the function. `cancel` with `spared` false lets it go on where it is `spared`.

        While `may_wait` is true at the end of the limit, it has the same time again.

        Raises:
            TimeoutError: it has not returned within `limit_s`.
            CancelledError: `cancel` was called.
        """
        future: Future[T] = Future()
        thread = threading.Thread(target=_settle, args=(future, function, logs.fields()), name=name, daemon=True)
        self._running[future] = spared
        thread.start()
        try:
            while True:
                try:
                    return future.result(limit_s)
                except TimeoutError:
                    if future.done():
                        raise  # the function's own
                    if not may_wait():
                        break
        finally:
            del self._running[future]
        self._hung.add(thread)
        raise TimeoutError(f"{name} has not ended within {limit_s:g} s")

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


def _settle(future: Future[T], function: Callable[[], T], fields: Mapping[str, logs.Field]) -> None:
    with logs.block_fields(**fields), suppress(InvalidStateError):  # its caller was cancelled
        try:
            value = function()
        except BaseException as error:  # noqa: BLE001 - carried to the caller
            future.set_exception(error)
        else:
            future.set_result(value)
