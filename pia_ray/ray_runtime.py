"""Ray's start and end for this process, and its errors in one line.

The catalogue graph and the endpoint both start Ray here.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import ray.data

from pia_ray.config.catalog import CatalogConfig
from pia_ray.errors import ConfigError, PiaRayError

log = logging.getLogger(__name__)

OBJECT_STORE_BYTES: Final = 200 * 2**20
"""Shared memory of a cluster of this run's own; blocks of one thin row need little."""


def first_cause(error: BaseException) -> str:
    """What a worker had to say, without Ray's wrapping, colours and remote tracebacks."""
    chain = [error]
    while (cause := chain[-1].__cause__) is not None:
        chain.append(cause)
    for link in reversed(chain):
        if isinstance(link, ray.exceptions.RayTaskError) and isinstance(link.cause, Exception):
            innermost = link.cause
            while isinstance(innermost.__cause__, Exception):
                innermost = innermost.__cause__
            return _described(innermost)
        if isinstance(link, ray.exceptions.RayActorError):
            # An actor that dies while it is made leaves text only: a traceback, then the error.
            last = _FRAMES.split(_COLOURS.sub("", str(link)))[-1].strip()
            return _OUR_ERROR.sub("", last)
    return _described(error)


def _described(error: BaseException) -> str:
    text = _COLOURS.sub("", str(error)).strip()
    return text if isinstance(error, PiaRayError) else f"{type(error).__name__}: {text}"


_COLOURS: Final = re.compile(r"\x1b\[[0-9;]*m")

_FRAMES: Final = re.compile(r'^  File "[^\n]*\n(?:    [^\n]*\n)*', re.MULTILINE)

_OUR_ERROR: Final = re.compile(r"^pia_ray\.errors\.\w+: ")


@contextmanager
def connected(config: CatalogConfig) -> Iterator[bool]:
    """A Ray to run on; True if it is a cluster of this run's own, which ends with it."""
    if ray.is_initialized():
        yield False
        return
    own = config.address is None
    main = threading.current_thread() is threading.main_thread()
    on_term = signal.getsignal(signal.SIGTERM) if main else None
    level = logging.getLogger("ray").getEffectiveLevel()
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": level}
    if own:
        # CPUs are counted, not bound: one more than there are, so that reading never waits for an actor's core.
        cpus = int((os.cpu_count() or 1) + (config.actors or (1, 1))[1] * config.cpus_per_actor + 1)
        options |= {"num_cpus": cpus, "include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
    try:
        with _native_lines_hidden(level >= logging.ERROR):
            ray.init(address="local" if own else config.address, **options)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ConfigError(f"cannot use Ray at {config.address or 'this machine'}: {error}") from error
    if main:
        signal.signal(signal.SIGTERM, on_term)  # ray.init puts its own handler there
    for handler in logging.getLogger("ray.data").handlers:
        if not isinstance(handler, logging.FileHandler):
            # Its console handler is set apart from the others'. What ends a run is raised, and said once; the file in
            # Ray's session folder keeps the tracebacks.
            handler.setLevel(logging.CRITICAL if level >= logging.ERROR else level)
    try:
        yield own
    finally:
        ray.shutdown()


@contextmanager
def _native_lines_hidden(hidden: bool) -> Iterator[None]:
    """Keeps Ray's native code from writing to standard error while it starts: it tells its log level there.

    What goes wrong in the meantime comes as an exception. There is no setting for it (ray 2.60).
    """
    if not hidden:
        yield
        return
    sys.stderr.flush()
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(nowhere)
        os.close(kept)


def end_process() -> None:
    """Ends this actor's process the way that makes Ray start a new one and send its rows again.

    Raising would count as an answer of the row, and exiting the actor by Ray's own call would not be retried.
    """
    log.exception("this worker process is spoiled: ending it, its rows go to a new one")
    os._exit(1)
