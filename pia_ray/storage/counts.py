"""Counts of this process's storage calls, for metrics."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

_lock = threading.Lock()
_again: ContextVar[bool] = ContextVar("again", default=False)
_requests: Counter[str] = Counter()
_retries: Counter[str] = Counter()
_bytes: Counter[str] = Counter()


@dataclass(frozen=True)
class Usage:
    """The counts of this process since its start."""

    requests: Mapping[str, int]
    """Requests to S3 by operation (GetObject, PutObject, ...), those that were tried again counted each time."""
    retries: Mapping[str, int]
    """Those of them that were tries after a failed one."""
    read_bytes: int
    """Bytes of objects and files, and of https:// inputs."""
    written_bytes: int


def usage() -> Usage:
    """The counts as they are now."""
    with _lock:
        return Usage(dict(_requests), dict(_retries), _bytes["read"], _bytes["written"])


def count_request(operation_name: str, request: Any, **_: object) -> None:
    """Counts a request as botocore sends it; a handler of its event `request-created`."""
    again = _again.get() or request.context.get("retries", {}).get("attempt", 1) > 1
    with _lock:
        _requests[operation_name] += 1
        _retries[operation_name] += again


def note_try(*, again: bool) -> None:
    """Notes that the requests of this thread are from now on those of a first try, or of one after a failed one."""
    _again.set(again)


def count_read(num_bytes: int) -> None:
    """Counts what was read."""
    with _lock:
        _bytes["read"] += num_bytes


def count_written(num_bytes: int) -> None:
    """Counts what was written."""
    with _lock:
        _bytes["written"] += num_bytes


def _after_fork() -> None:
    global _lock
    _lock = threading.Lock()  # the parent may have held it at the fork


os.register_at_fork(after_in_child=_after_fork)
