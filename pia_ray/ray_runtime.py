"""Ray's start and end for this process, and its errors in one line.

The catalogue graph and the endpoint both start Ray here.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final, NoReturn

import ray
import ray.exceptions
from ray._private.node import Node

from pia_ray import logs
from pia_ray.errors import ConfigError, JobError, PiaRayError
from pia_ray.temporary_folders import PREFIX, temporary_folder

log = logging.getLogger(__name__)

OBJECT_STORE_BYTES: Final = 200 * 2**20
"""Shared memory of a cluster of our own: blocks of one thin row need little, pictures and videos pass one by one."""


def first_cause(error: BaseException) -> str:
    """The worker's own error in words, without Ray's wrapping, colours and remote tracebacks."""
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
def ray_errors(doing: str) -> Iterator[None]:
    """Has any error of Ray in the block end it as a `JobError` in one line, which begins with `doing`; ours pass.

    Ray's errors have no class in common: some are bare Exceptions (ray 2.60).

    Raises:
        JobError: Ray failed.
    """
    try:
        yield
    except PiaRayError:
        raise
    except Exception as error:
        cause = " ".join(first_cause(error).split())
        raise JobError(f"{doing}: {cause}") from error


@contextmanager
def connected(address: str | None, *, worker_cpus: float) -> Iterator[bool]:
    """A Ray for the block; True if it is a cluster of the block's own.

    The Ray that this process is connected to already, else the cluster at `address`, else `own_cluster(worker_cpus)`.

    Raises:
        ConfigError: the cluster at `address` cannot be joined.
        JobError: a cluster of the block's own does not start.
    """
    if ray.is_initialized():
        yield False
    elif address is None:
        with own_cluster(worker_cpus):
            yield True
    else:
        require_cluster(address)
        try:
            try:
                _init(address=address)
            except Exception as error:
                raise ConfigError(f"cannot use Ray at {address}: {_in_one_line(error)}") from error
            yield False
        finally:
            ray.shutdown()


@contextmanager
def own_cluster(worker_cpus: float) -> Iterator[None]:
    """A cluster on this machine that ends with the block; its workers may reserve `worker_cpus` CPUs in all.

    Ray's temporary files lie in a folder of their own, which goes with the cluster. Where the block fails the folder
    stays, with Ray's logs, until the next cluster starts.

    Raises:
        JobError: Ray does not start, or this process uses a Ray already.
    """
    if ray.is_initialized():
        raise JobError("this process is connected to Ray already: ray.shutdown() comes before a cluster of its own")
    with _session_folder() as folder:
        try:
            _init_own(folder, worker_cpus)
            yield
        finally:
            ray.shutdown()


def _init_own(folder: Path, worker_cpus: float) -> None:
    """Starts Ray, at the second try where the first one fails.

    Raises:
        JobError: both tries failed.
    """
    options = {
        "address": "local",
        # CPUs are counted, not bound: one more than there are, so that reading never waits for a worker's core.
        "num_cpus": int((os.cpu_count() or 1) + worker_cpus + 1),
        "include_dashboard": False,
        "object_store_memory": OBJECT_STORE_BYTES,
        "_temp_dir": str(folder),
        # Where the raylet is sooner than its object store it tries again after 1 s (ray 2.60). Here after 20 ms, in all
        # for as long.
        "_system_config": {"raylet_client_connect_timeout_milliseconds": 20, "raylet_client_num_connect_attempts": 500},
    }
    # Ray raises a bare Exception where its node is not there after 30 s, which no setting changes (ray 2.60). On a busy
    # machine a second try may succeed.
    try:
        _init(**options)
    except Exception as error:  # noqa: BLE001 - Ray's own errors have no class in common
        log.warning("Ray did not start, trying once more: %s", _in_one_line(error))
        ray.shutdown()
    else:
        return
    try:
        _init(**options)
    except Exception as error:
        logs = folder / "session_latest" / "logs"
        hint = f" (its logs are in {logs})" if logs.exists() else ""
        raise JobError(f"Ray does not start on this machine: {_in_one_line(error)}{hint}") from error


def _init(**options: Any) -> None:
    """Connects this process to Ray. Signal handlers and log levels stay as they are."""
    main = threading.current_thread() is threading.main_thread()
    on_term = signal.getsignal(signal.SIGTERM) if main else None
    level = logging.getLogger("ray").getEffectiveLevel()
    try:
        with _native_lines_hidden(level >= logging.ERROR), _without_helper_processes():
            ray.init(log_to_driver=False, logging_level=level, **options)
    except SystemExit:
        # Ray's handler of SIGTERM, which stands while ray.init runs, exits with 1; here that means failed rows.
        raise KeyboardInterrupt from None
    finally:
        if main:
            signal.signal(signal.SIGTERM, on_term)
    # Ray's listener prints what its nodes report to standard output, also on an orderly stop; no setting keeps it from
    # that (ray 2.60). Standard output is for the results of a command.
    ray._private.worker.print_to_stdstream = _log_ray_message


def set_up_ray_data_logs() -> None:
    """Gives Ray Data's console handler, which its import makes, the level of Ray's, and JSON where lines are JSON.

    What ends a run is raised, and said once; the file in Ray's session folder keeps the tracebacks. A program's own
    handlers are left alone.
    """
    level = logging.getLogger("ray").getEffectiveLevel()
    for handler in logging.getLogger("ray.data").handlers:
        if type(handler).__module__.startswith("ray.") and not isinstance(handler, logging.FileHandler):
            handler.setLevel(logging.CRITICAL if level >= logging.ERROR else level)
    if logs.is_json():
        logs.take_over("ray.data")


def _log_ray_message(data: Any, ignore_prefix: bool = False) -> None:
    for line in data["lines"]:
        log.info("Ray: %s", _COLOURS.sub("", str(line)).strip())


def require_cluster(address: str) -> None:
    """Connects to HOST:PORT once, because Ray itself tries for two minutes and cannot be interrupted.

    Raises:
        ConfigError: nothing listens there.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():
        return  # "auto", or what Ray alone understands
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise ConfigError(f"--address {address}: no Ray cluster answers there ({error})") from None


@contextmanager
def _session_folder() -> Iterator[Path]:
    """A new folder for the temporary files of one cluster; it stays where the block raises an Exception.

    Raises:
        JobError: it cannot be made.
    """
    parent = _session_parent()
    with ExitStack() as stack:
        try:
            folder = stack.enter_context(temporary_folder(parent, kept_on_error=True))
        except OSError as error:
            raise JobError(f"cannot make a folder for Ray's files in {parent}: {error.strerror or error}") from None
        yield folder


def _session_parent() -> Path:
    """The folder that Ray itself would choose, or /tmp where the paths of its sockets would be too long."""
    parent = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    return Path(parent if len(os.fsencode(parent)) <= _PARENT_LENGTH else "/tmp")  # noqa: S108


_PARENT_LENGTH: Final = (107 if sys.platform == "linux" else 103) - 64 - len(f"/{PREFIX}12345678")
"""Bytes: so many may the path of a socket have, and Ray adds 64 to the folder that it is given."""


def _in_one_line(error: BaseException) -> str:
    text = " ".join(_COLOURS.sub("", str(error)).split()) or type(error).__name__
    return text if len(text) <= 400 else text[:397] + "..."


@contextmanager
def _without_helper_processes() -> Iterator[None]:
    """Has clusters that this process starts in the block neither Ray's dashboard, nor its monitor, nor its log monitor.

    They serve the state of the cluster, add nodes and send logs to drivers, which nobody here asks for. A start waits a
    second for the first, `include_dashboard` or not, and there is no setting for any of them (ray 2.60).
    """
    names = ("start_api_server", "start_monitor", "start_log_monitor")
    before = {name: getattr(Node, name) for name in names}
    for name in names:
        setattr(Node, name, lambda node, **options: None)
    try:
        yield
    finally:
        for name, method in before.items():
            setattr(Node, name, method)


@contextmanager
def _native_lines_hidden(hidden: bool) -> Iterator[None]:
    """Keeps Ray's native code from writing its log level to standard error while it starts.

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


def end_process(error: JobError) -> NoReturn:
    """Ends this worker's process, which the error has spoiled, so that Ray starts a new one for what it had.

    Raising would count as an answer, and Ray does not retry the calls of an actor that ends by Ray's own function.
    """
    log.critical("this process is spoiled and ends, a new one takes over: %s", error.message, exc_info=error)
    logging.shutdown()
    os._exit(1)
