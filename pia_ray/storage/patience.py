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
"""Pauses between two tries double from the first to the longest; short patience has shorter ones."""

AWAY: Final = (StorageThrottled, StorageUnavailable, HubUnavailable)
"""Errors that pass by themselves."""

Notice = Callable[[PiaRayError | None], None]
"""Is called with the error of each wait as it begins or goes on, and with None when it is over."""

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

    @property
    def first_pause_s(self) -> float:
        """The pause after the first failure."""
        return min(FIRST_PAUSE_S, self.seconds / 60)

    @property
    def longest_pause_s(self) -> float:
        """The pause that no other one is longer than."""
        return min(LONGEST_PAUSE_S, self.seconds / 10)


_patience: ContextVar[Patience | None] = ContextVar("patience", default=None)
_hurried: ContextVar[bool] = ContextVar("hurried", default=False)


@contextlib.contextmanager
def patience(
    seconds: float,
    *,
    stopped: threading.Event | None = None,
    notice: Notice = lambda error: None,
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


@contextlib.contextmanager
def _without_patience() -> Iterator[None]:
    token = _patience.set(None)
    try:
        yield
    finally:
        _patience.reset(token)


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
    waits = current.from_start or has_answered()
    try:
        # A call inside the call does not wait a second time, and its own tries are few: the pauses here go on.
        with hurry() if waits else _without_patience():
            return call()
    except AWAY as error:
        if not waits and not has_answered():
            raise
        failure = error
    try:
        return _repeated(call, current, failure, begin=begin)
    finally:
        current.notice(None)


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
    pause_s, noticed = current.first_pause_s, False
    while True:
        left_s = begin + current.seconds - time.monotonic()
        if left_s <= 0:
            raise failure
        if noticed:
            current.notice(failure)
        noticed = True  # a single pause is no outage: under throttling many calls need one
        _log.debug("%s; waiting %.0f s more at most", failure.message, left_s)
        if current.stopped.wait(min(left_s, random.uniform(0.5, 1) * pause_s)):  # noqa: S311
            raise failure
        pause_s = min(current.longest_pause_s, 2 * pause_s)
        try:
            with hurry():
                return call()
        except AWAY as error:
            failure = error
