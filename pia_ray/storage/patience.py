"""Patience with a store that is away: the calls of a block wait until it answers again, or give up after few tries.

Held in context variables, so a new thread begins without it; `contextvars.copy_context().run` hands it on.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Final, ParamSpec, TypeVar

from pia_ray.errors import HubUnavailable, PiaRayError, StorageThrottled, StorageUnavailable

FIRST_PAUSE_S: Final = 1.0
LONGEST_PAUSE_S: Final = 30.0
"""Pauses between two tries double from the first to the longest."""

AWAY: Final = (StorageThrottled, StorageUnavailable, HubUnavailable)
"""Errors that pass by themselves."""

Notice = Callable[[str], None]
"""Is called with the reason of each wait as it begins or goes on, and with an empty text when it is over."""

_P = ParamSpec("_P")
_T = TypeVar("_T")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Patience:
    """The time that calls wait for a store that does not answer, is throttled, or has no space left."""

    seconds: float
    stopped: threading.Event
    notice: Notice
    from_start: bool
    """Whether a store is waited for that has never answered this process: at the start its address may be wrong."""


_patience: ContextVar[Patience | None] = ContextVar("patience", default=None)
_hurried: ContextVar[bool] = ContextVar("hurried", default=False)


@contextlib.contextmanager
def patience(
    seconds: float,
    *,
    stopped: threading.Event | None = None,
    notice: Notice = lambda reason: None,
    from_start: bool = False,
) -> Iterator[None]:
    """Lets the block's calls wait so long for a store that is away; `stopped` ends the wait early."""
    token = _patience.set(Patience(seconds, stopped or threading.Event(), notice, from_start))
    try:
        yield
    finally:
        _patience.reset(token)


@contextlib.contextmanager
def hurry() -> Iterator[None]:
    """Lets the block's calls give up after few tries, and wait for nothing."""
    tokens = _patience.set(None), _hurried.set(True)
    try:
        yield
    finally:
        _patience.reset(tokens[0])
        _hurried.reset(tokens[1])


def hurried() -> bool:
    """Whether this block's calls give up after few tries."""
    return _hurried.get()


def patience_s() -> float:
    """Seconds that this block's calls wait for a store that is away; 0 without patience."""
    current = _patience.get()
    return 0.0 if current is None else current.seconds


def waited_out(call: Callable[[], _T], *, has_answered: Callable[[], bool]) -> _T:
    """The result of `call`, which is repeated with growing pauses while the store is away and patience lasts.

    Raises:
        StorageError: the fault is one that stays; or patience is spent, or there is none.
    """
    current = _patience.get()
    if current is None:
        return call()
    begin = time.monotonic()
    token = _patience.set(None)  # a call inside the call does not wait a second time
    try:
        return call()
    except AWAY as error:
        if not current.from_start and not has_answered():
            raise
        failure = error
    finally:
        _patience.reset(token)
    try:
        return _repeated(call, current, failure, begin=begin)
    finally:
        current.notice("")


def patient(call: Callable[_P, _T]) -> Callable[_P, _T]:
    """The same function, which waits out a store that is away where its block has patience.

    The store has answered once a call of the function has succeeded in this process.
    """
    answered = threading.Event()

    @functools.wraps(call)
    def waiting(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        value = waited_out(lambda: call(*args, **kwargs), has_answered=answered.is_set)
        answered.set()
        return value

    return waiting


def _repeated(call: Callable[[], _T], current: Patience, failure: PiaRayError, *, begin: float) -> _T:
    pause_s = FIRST_PAUSE_S
    while True:
        left_s = begin + current.seconds - time.monotonic()
        if left_s <= 0:
            raise failure
        current.notice(failure.message)
        _log.debug("%s; waiting %.0f s more at most", failure.message, left_s)
        if current.stopped.wait(min(left_s, random.uniform(0.5, 1) * pause_s)):  # noqa: S311
            raise failure
        pause_s = min(LONGEST_PAUSE_S, 2 * pause_s)
        try:
            with hurry():
                return call()
        except AWAY as error:
            failure = error
