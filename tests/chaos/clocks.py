"""Wrong clocks: a library, loaded before others, that shifts the time of day which Python's own code reads.

Ray's native code keeps the right time. It waits until times of day, and would wait for the hours of the difference.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

SOURCE = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static int is_python(void *caller) {
    Dl_info found;
    if (!dladdr(caller, &found) || !found.dli_fname) return 0;
    const char *slash = strrchr(found.dli_fname, '/');
    const char *name = slash ? slash + 1 : found.dli_fname;
    return !strncmp(name, "python", 6) || !strncmp(name, "libpython", 9) || !strncmp(name, "_datetime", 9);
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    int done = (int) syscall(SYS_clock_gettime, clock, now);
    const char *shift = getenv("CHAOS_CLOCK_S");
    if (!done && clock == CLOCK_REALTIME && shift && is_python(__builtin_return_address(0))) now->tv_sec += atol(shift);
    return done;
}
"""


def environment(folder: Path, *, hours: int) -> dict[str, str]:
    """Environment variables for a process whose clock is so many hours off; none where there is no C compiler."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if not hours or compiler is None:
        return {}
    library = folder / "clock.so"
    if not library.exists():
        (folder / "clock.c").write_text(SOURCE)
        subprocess.run(
            [compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(folder / "clock.c"), "-ldl"], check=True
        )
    return {"LD_PRELOAD": str(library), "CHAOS_CLOCK_S": str(hours * 3600)}
