"""Counts of this process's storage calls, for metrics."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

_lock = threading.Lock()
_requests: Counter[str] = Counter()
_retries: Counter[str] = Counter()
_bytes: Counter[str] = Counter()


@dataclass(frozen=True)
class Usage:
    """The counts of this process since its start."""

    requests: Mapping[str, int]
    """Requests to S3 by operation (read, write, list, delete, ...), those that were tried again counted each time."""
    retries: Mapping[str, int]
    """Those of them that were tries after a failed one."""
    read_bytes: int
    """Bytes of objects and files, and of https:// inputs."""
    written_bytes: int


def usage() -> Usage:
    """The counts as they are now."""
    with _lock:
        return Usage(dict(_requests), dict(_retries), _bytes["read"], _bytes["written"])


def count_request(operation: str, *, again: bool) -> None:
    """Counts one request, which may be a try after a failed one."""
    with _lock:
        _requests[operation] += 1
        _retries[operation] += again


def count_read(num_bytes: int) -> None:
    """Counts what was read."""
    with _lock:
        _bytes["read"] += num_bytes


def count_written(num_bytes: int) -> None:
    """Counts what was written."""
    with _lock:
        _bytes["written"] += num_bytes
