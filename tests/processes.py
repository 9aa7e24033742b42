"""Processes as /proc shows them, for tests that kill some and look for those that are left."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path


def alive(pid: int) -> bool:
    """Whether the process is there and has not ended."""
    state, _ = _state_and_parent(pid)
    return state not in ("", "Z")


def children(parent: int | None = None) -> dict[int, str]:
    """Living processes under this one or `parent`, with their command lines."""
    states = {pid: _state_and_parent(pid) for pid in _pids()}
    parents = {pid: above for pid, (state, above) in states.items() if state not in ("", "Z")}
    found, frontier = dict[int, str](), {parent or os.getpid()}
    while frontier := {pid for pid, above in parents.items() if above in frontier}:
        found |= {pid: _command(pid) for pid in frontier}
    return found


def with_variable(name: str, value: str) -> dict[int, str]:
    """Living processes, but for this one, that have inherited this environment variable, with their command lines."""
    wanted, found = f"{name}={value}".encode(), dict[int, str]()
    for pid in _pids():
        try:
            environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if wanted in environment and pid != os.getpid() and alive(pid):
            found[pid] = _command(pid)
    return found


def private_bytes(pid: int) -> int:
    """Memory that the process has written and no other process uses, also where it was swapped out.

    Clean pages of libraries are not counted. They belong to one process or to several with what else runs on the
    machine: those of an endpoint went from 17 MB to 9 MB as another process with the same libraries began, and back.
    """
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    kilobytes = [int(line.split()[1]) for line in lines if line.startswith(("Private_Dirty:", "Swap:"))]
    return 1024 * sum(kilobytes)


def num_descriptors(pid: int) -> int:
    """Open files of the process."""
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def _pids() -> Iterator[int]:
    return (int(folder.name) for folder in Path("/proc").iterdir() if folder.name.isdigit())


def _state_and_parent(pid: int) -> tuple[str, int]:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return "", 0
    return fields[0], int(fields[1])


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""
