"""The machine and the version of the code, as each card gives them."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path


def machine(*packages: str) -> dict[str, object]:
    """CPUs, architecture, commit, and the versions of Python and these packages."""
    return {
        "cpus": os.cpu_count(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
        "commit": commit(),
    }


def commit() -> str:
    """The short commit of the checkout, with + if files differ from it; "unknown" outside of one."""
    command = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def line(facts: dict[str, object]) -> str:
    """The same for people, on one line."""
    return ", ".join(f"{name} {value}" for name, value in facts.items())
