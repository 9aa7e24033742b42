"""`RowThreads`: the threads that work on a worker's rows, in the order in which these come."""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, Final, TypeVar

T = TypeVar("T")


class RowThreads:
    """Calls at the same time, at most `limit`. The threads end with the process, because a row may hang.

    `tune` is called after each call with the limit and the number of calls that wait; it gives the new limit.
    """

    def __init__(self, limit: int, *, tune: Callable[[int, int], int] = lambda limit, waiting: limit) -> None:
        self._tune = tune
        self._changed = threading.Condition()
        self._waiting: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._limit = limit
        self._num_threads = 0
        self._num_running = 0
        self._closed = False

    @property
    def limit(self) -> int:
        """Calls at the same time."""
        return self._limit

    def submit(self, call: Callable[[], T]) -> Future[T]:
        """The future value of the call, which begins after those that have come before it."""
        future: Future[T] = Future()
        with self._changed:
            self._waiting.append((future, call))
            self._wake()
        return future

    def close(self) -> None:
        """Cancels the calls that wait, and waits for those that run."""
        with self._changed:
            self._closed = True
            for future, _ in self._waiting:
                future.cancel()
            self._waiting.clear()
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._num_running)

    def _wake(self) -> None:
        if self._num_threads < self._limit:
            self._num_threads += 1
            threading.Thread(target=self._run, name="row", daemon=True).start()
        self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda: self._closed or (bool(self._waiting) and self._num_running < self._limit)
                )
                if self._closed:
                    return
                future, call = self._waiting.popleft()
                self._num_running += 1
            try:
                _settle(future, call)
            finally:
                with self._changed:
                    self._num_running -= 1
                    self._limit = self._tune(self._limit, len(self._waiting))
                    for _ in range(min(len(self._waiting), self._limit - self._num_running)):
                        self._wake()
                    self._changed.notify_all()


def _settle(future: Future[Any], call: Callable[[], Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        value = call()
    except BaseException as error:  # noqa: BLE001 - carried to the caller
        future.set_exception(error)
    else:
        future.set_result(value)


LOOK_S: Final = 0.5
"""Seconds between two questions for how long a value is held back."""


def in_groups(futures: Sequence[Future[T]], *, hold_s: Callable[[], float]) -> Iterator[list[T]]:
    """The values of the futures as they come, each at most so many seconds later as `hold_s` says then.

    Raises:
        BaseException: that of a future.
    """
    ended: queue.SimpleQueue[Future[T]] = queue.SimpleQueue()
    for future in futures:
        future.add_done_callback(ended.put)
    left = len(futures)
    while left:
        group = [ended.get().result()]
        begun = time.monotonic()
        while len(group) < left and (rest_s := begun + hold_s() - time.monotonic()) > 0:
            with suppress(queue.Empty):
                group.append(ended.get(timeout=min(rest_s, LOOK_S)).result())
        left -= len(group)
        yield group
