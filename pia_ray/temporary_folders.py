"""Temporary folders that go with their block, and with the next one's where the process was killed.

A folder is locked while its process lives, so those of killed processes are known. Only marked folders are removed:
somebody else's may have a name like theirs.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

PREFIX: Final = "pia-ray-"

MARK: Final = ".pia-ray-temporary"
"""Name of an empty file in each of these folders, which is written once the folder is locked and removed last."""


@contextmanager
def temporary_folder(parent: Path | None = None, *, kept_on_error: bool = False) -> Iterator[Path]:
    """A new folder for the block, in `parent` or where temporary files go; those of killed processes go first.

    With `kept_on_error` it stays where the block raises an Exception, if there is something in it, until the next one.

    Raises:
        OSError: it cannot be made.
    """
    above = parent or Path(tempfile.gettempdir())
    _remove_left(above)
    if parent is not None:
        parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=above))
    with _locked(folder):
        kept = False
        try:
            (folder / MARK).touch()
            yield folder
        except Exception:
            kept = kept_on_error and any(path.name != MARK for path in folder.iterdir())
            raise
        finally:
            if not kept:
                with suppress(OSError):
                    _remove(folder)


def _remove_left(parent: Path) -> None:
    """Removes the folders of processes that have ended, and those that were kept."""
    for folder in parent.glob(f"{PREFIX}*"):
        with suppress(OSError):
            if (folder / MARK).exists():
                with _locked(folder):
                    _remove(folder)


def _remove(folder: Path) -> None:
    """Removes the folder, its mark last: where a process still writes in it, the next one tries again."""
    for path in folder.iterdir():
        if path.name != MARK:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    (folder / MARK).unlink(missing_ok=True)
    folder.rmdir()


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds the folder's lock for the block.

    Raises:
        OSError: another process has it, or the folder is gone.
    """
    number = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(number)
