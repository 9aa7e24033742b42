"""`Stages`: calls that may hang, each on a thread of its own, so that their caller goes on after a time limit."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, InvalidStateError
from contextlib import suppress
from typing import Any, Generic, TypeVar

from pia_ray import logs, spare_threads

T = TypeVar("T")


class Stages:
    """The running stages of a process's rows. A stage that hangs keeps its thread, which ends with the process.

    Nothing ends a thread that waits for a mount, a FIFO or a codec, so its caller stops waiting for it.
    """

    def __init__(self) -> None:
        self._running: dict[Future[Any], bool] = {}
        """The stages that callers wait for, and whether `cancel` spares them."""
        self._hung: set[_Stage[Any]] = set()
        self._to_undo: set[_Stage[Any]] = set()
        """The stages that are undone as they end, because their caller has gone."""

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
        stage = _Stage(function, undo)
        future = stage.future
        self._running[future] = spared
        spare_threads.start(stage.run, name=name)
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
            self._leave(stage)
            raise
        finally:
            del self._running[future]
        self._hung.add(stage)
        self._leave(stage)
        raise TimeoutError(f"{name} has not ended within {limit_s:g} s")

    def _leave(self, stage: _Stage[Any]) -> None:
        if stage.undo is not None:
            self._to_undo = {each for each in (*self._to_undo, stage) if not each.has_ended.is_set()}

    def wait_until_undone(self, *, timeout_s: float) -> None:
        """Waits until stages that their callers left are undone, or the time is over."""
        ends_at = time.monotonic() + timeout_s
        for stage in tuple(self._to_undo):
            stage.has_ended.wait(max(0.0, ends_at - time.monotonic()))

    def cancel(self, *, spared: bool = False) -> None:
        """Lets the callers of running stages go on with `CancelledError`; those of spared ones too where it says so."""
        for future, is_spared in tuple(self._running.items()):
            if spared or not is_spared:
                future.cancel()

    @property
    def num_hung(self) -> int:
        """The number of stages over their time limit whose threads have not ended."""
        self._hung = {stage for stage in tuple(self._hung) if not stage.has_ended.is_set()}
        return len(self._hung)


class _Stage(Generic[T]):
    """One call. `undo` is called with a value that comes after the caller has gone on without it."""

    def __init__(self, function: Callable[[], T], undo: Callable[[T], None] | None) -> None:
        self.future: Future[T] = Future()
        self.undo = undo
        self.has_ended = threading.Event()
        self._function = function
        self._fields = logs.fields()

    def run(self) -> None:
        try:
            with logs.block_fields(**self._fields):
                self._run()
        finally:
            self.has_ended.set()

    def _run(self) -> None:
        try:
            value = self._function()
        except BaseException as error:  # noqa: BLE001 - carried to the caller
            with suppress(InvalidStateError):  # it has gone
                self.future.set_exception(error)
            return
        try:
            self.future.set_result(value)
        except InvalidStateError:
            if self.undo is not None:
                self.undo(value)
