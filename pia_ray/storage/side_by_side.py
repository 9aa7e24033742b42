"""`side_by_side`: calls that wait for a store at the same time, each with the patience of the caller."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any


def side_by_side(*calls: Callable[[], Any]) -> Sequence[Any]:
    """The values of all calls, in order, which run on threads of their own but for the first.

    Returns or raises once all have ended; of several errors the first call's is raised.
    """
    futures: list[Future[Any]] = [Future() for _ in calls]
    threads = [
        threading.Thread(target=contextvars.copy_context().run, args=(_settle, future, call), daemon=True)
        for future, call in zip(futures[1:], calls[1:], strict=True)
    ]
    for thread in threads:
        thread.start()
    _settle(futures[0], calls[0])
    for thread in threads:
        thread.join()
    return [future.result() for future in futures]


def _settle(future: Future[Any], call: Callable[[], Any]) -> None:
    try:
        value = call()
    except BaseException as error:  # noqa: BLE001 - carried to the caller
        future.set_exception(error)
    else:
        future.set_result(value)
