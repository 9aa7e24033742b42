"""`side_by_side`: calls that wait for a store at the same time, each with the patience of the caller."""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

from pia_ray import spare_threads


def side_by_side(*calls: Callable[[], Any]) -> Sequence[Any]:
    """The values of all calls, in order, which run on threads of their own but for the first.

    Returns or raises once all have ended; of several errors the first call's is raised.
    """
    futures: list[Future[Any]] = [Future() for _ in calls]
    for future, call in zip(futures[1:], calls[1:], strict=True):
        spare_threads.start(partial(contextvars.copy_context().run, _settle, future, call), name="side-by-side")
    _settle(futures[0], calls[0])
    for future in futures:
        future.exception()
    return [future.result() for future in futures]


def _settle(future: Future[Any], call: Callable[[], Any]) -> None:
    try:
        value = call()
    except BaseException as error:  # noqa: BLE001 - carried to the caller
        future.set_exception(error)
    else:
        future.set_result(value)
