"""The threads of an endpoint's process share few arenas of the allocator, and large blocks are in none."""

from __future__ import annotations

import platform
import re
import subprocess
import sys

import pytest

from pia_ray.online.allocator import ARENAS, LARGE_BYTES

PROGRAM = """
import ctypes, threading

from pia_ray.online.allocator import LARGE_BYTES, return_large_blocks, share_arenas

share_arenas()
return_large_blocks()
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
freed = bytes(16 * LARGE_BYTES)
del freed
kept = bytes(8 * LARGE_BYTES)
libc = ctypes.CDLL(None)
libc.fdopen.restype = ctypes.c_void_p
standard = ctypes.c_void_p(libc.fdopen(1, b"w"))
libc.malloc_info(0, standard)
libc.fflush(standard)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no arenas")
def test_forty_threads_share_the_arenas_and_a_large_block_is_in_none() -> None:
    found = subprocess.run([sys.executable, "-c", PROGRAM], check=True, capture_output=True, text=True).stdout
    assert found.count("<heap nr=") == ARENAS
    mapped = re.search(r'<total type="mmap" count="\d+" size="(\d+)"/>', found)
    assert mapped is not None
    assert int(mapped[1]) > 8 * LARGE_BYTES
