"""The threads of an endpoint's process share few arenas of the allocator."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from pia_ray.online.arenas import ARENAS

PROGRAM = """
import ctypes, sys, threading

from pia_ray.online.arenas import share_arenas

share_arenas()
together = threading.Barrier(40)


def use():
    kept = [bytes(1000) for _ in range(100)]
    together.wait()
    kept.clear()


threads = [threading.Thread(target=use) for _ in range(40)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
libc = ctypes.CDLL(None)
libc.fdopen.restype = ctypes.c_void_p
standard = ctypes.c_void_p(libc.fdopen(1, b"w"))
libc.malloc_info(0, standard)
libc.fflush(standard)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no arenas")
def test_forty_threads_at_once_share_the_arenas() -> None:
    found = subprocess.run([sys.executable, "-c", PROGRAM], check=True, capture_output=True, text=True)
    assert found.stdout.count("<heap nr=") == ARENAS
