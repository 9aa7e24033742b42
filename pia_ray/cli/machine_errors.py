"""Errors of the machine itself, in one line with what to do: disks, folders, memory, threads, open files, packages."""

from __future__ import annotations

import errno
import tempfile

from pia_ray import extras

_ADVICE = {
    errno.ENOSPC: "Free some space, or set TMPDIR to a folder with more.",
    errno.EDQUOT: "Free some space, or set TMPDIR to a folder with more.",
    errno.EACCES: "Check the owner and permissions of it and of its folder.",
    errno.EPERM: "Check the owner and permissions of it and of its folder.",
    errno.EROFS: "It is on a read-only disk: choose another folder, or set TMPDIR to one that can be written.",
    errno.EMFILE: "Raise the number of open files: `ulimit -n 65536`.",
    errno.ENFILE: "The whole machine has too many open files: close other programs.",
    errno.ENOMEM: "Free some memory, or run fewer workers (--actors) with smaller batches (--batch-size).",
    errno.EAGAIN: "Raise the number of processes and threads: `ulimit -u`.",
    errno.EIO: "The disk or mount does not work: check the system's log.",
    errno.ESTALE: "The mount was lost: mount it again.",
    errno.ENAMETOOLONG: "Choose a shorter name.",
    errno.ELOOP: "It is a link that leads to itself: remove the link.",
    errno.ENOTDIR: "A part of its path is a file: choose another path.",
}


def machine_error(error: BaseException) -> str | None:
    """The fault of the machine and its remedy in one line; None for an error that may be a bug."""
    if isinstance(error, MemoryError):
        return f"there is not enough memory. {_ADVICE[errno.ENOMEM]}"
    if isinstance(error, RuntimeError) and "can't start new thread" in str(error):
        return f"the system starts no more threads. {_ADVICE[errno.EAGAIN]}"
    if isinstance(error, ModuleNotFoundError) and (advice := extras.advice(error)):
        return f"{error.msg}.{advice}"
    if not isinstance(error, OSError):
        return None
    if isinstance(error, FileNotFoundError) and "No usable temporary directory" in str(error):
        return "there is no temporary folder that can be written. Set TMPDIR to one that exists and has space."
    if error.errno not in _ADVICE:
        return _missing_folder(error)
    at = f"{error.filename}: " if error.filename is not None else ""
    return f"{at}{error.strerror}. {_ADVICE[error.errno]}"


def _missing_folder(error: OSError) -> str | None:
    if error.errno != errno.ENOENT:
        return None
    if error.filename is None:  # getcwd names no file
        return "the working directory does not exist any more: change to another one."
    if str(error.filename).startswith(tempfile.gettempdir()):
        return f"{error.filename} is not there any more: do not clean {tempfile.gettempdir()} while pia-ray runs."
    return None
