"""Files shown by the system's own program for their kind."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path


def open_file(path: str) -> bool:
    """Whether the system has a program that opens files; it has been started on this one, and is not waited for."""
    program = shutil.which("open" if sys.platform == "darwin" else "xdg-open")
    if program is None:
        return False
    # In the background of a shell it is nobody's child, and outlives this command and its Ctrl-C.
    script = '"$0" "$1" </dev/null >/dev/null 2>&1 &'
    words = ["/bin/sh", "-c", script, program, str(Path(path).resolve())]
    subprocess.run(words, start_new_session=True, check=False)  # noqa: S603 - the file is our own
    return True
