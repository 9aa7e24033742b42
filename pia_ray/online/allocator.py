"""The allocator of a process of the endpoint, so that its memory stays as small as what its threads use.

glibc gives threads arenas of their own, up to eight for each CPU, and what was freed in one serves no other. An
endpoint has some 80 threads. Python's table of interned names, which pathlib fills with the names of objects, is
replaced by a new one of 3.8 MB every few minutes, in the arena of the thread that happens to need it. Each arena in
turn kept a hole of that size: an endpoint grew from 118 MB to 134 MB in 30 minutes on 2 CPUs.
"""

from __future__ import annotations

import ctypes
import logging
from typing import Final

ARENAS: Final = 2
LARGE_BYTES: Final = 2**20

_M_MMAP_THRESHOLD: Final = -3
_M_ARENA_MAX: Final = -8
"""Numbers of parameters in glibc's malloc.h."""

_log = logging.getLogger(__name__)


def share_arenas() -> None:
    """Has all threads of this process share `ARENAS` arenas, where its C library is glibc; else does nothing.

    Arenas that are there stay: it is called before threads begin.
    """
    _set(_M_ARENA_MAX, ARENAS)


def return_large_blocks() -> None:
    """Has each block of `LARGE_BYTES` or more go back to the system when it is freed, as glibc does at first.

    It raises that size to the largest block that was freed, up to 32 MiB. A process that makes many tensors on the CPU
    leaves that so, because each page of a new block costs a fault.
    """
    _set(_M_MMAP_THRESHOLD, LARGE_BYTES)


def _set(parameter: int, value: int) -> None:
    try:
        accepted = ctypes.CDLL(None).mallopt(parameter, value)
    except (AttributeError, OSError, TypeError):  # another C library has no mallopt
        accepted = 0
    if not accepted:
        _log.debug("the allocator of this system has no parameter %d", parameter)
