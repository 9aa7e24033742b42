"""Digests of files. Those of large files are kept for the next process, because 5 GB take 4 CPU seconds."""

from __future__ import annotations

import hashlib
import re
import tempfile
import time
from pathlib import Path
from typing import Final

from pia_ray.weights.cache_folders import digests_folder

KEPT_BYTES: Final = 64 * 2**20
"""Files of this size and more have their digest kept."""

SETTLED_S: Final = 5.0
"""A file that has changed since is not kept: a second change could have the same time."""

_SHA256: Final = re.compile(r"[0-9a-f]{64}")

Facts = tuple[object, ...]
"""Path, device, inode, size, and the times at which the content and the inode have changed, in ns."""


class FileDigests:
    """The digests that this process knows, and a folder of those that others have computed (None: the user's)."""

    def __init__(
        self, folder: Path | None = None, *, kept_bytes: int = KEPT_BYTES, settled_s: float = SETTLED_S
    ) -> None:
        self._folder = folder
        self._kept_bytes = kept_bytes
        self._settled_s = settled_s
        self._known: dict[Facts, str] = {}

    def of(self, path: Path) -> str:
        """The sha256 of a file's content, in hex."""
        facts = _facts(path)
        if facts not in self._known:
            self._known[facts] = self._read(path, facts)
        return self._known[facts]

    def _read(self, path: Path, facts: Facts) -> str:
        status = path.stat()
        if status.st_size < self._kept_bytes:
            return _computed(path)
        folder = self._folder or digests_folder()
        kept = folder / hashlib.sha256(repr(facts).encode()).hexdigest()
        try:
            if _SHA256.fullmatch(found := kept.read_text("ascii")):
                return found
        except (OSError, ValueError):
            pass
        made = _computed(path)
        changed = max(status.st_mtime, status.st_ctime)
        if _facts(path) == facts and changed < time.time() - self._settled_s:
            _write(kept, made)
        return made


def _facts(path: Path) -> Facts:
    status = path.stat()
    times = status.st_mtime_ns, status.st_ctime_ns
    return (str(path.resolve()), status.st_dev, status.st_ino, status.st_size, *times)


def _computed(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _write(path: Path, text: str) -> None:
    """Writes the file at once; where that is impossible, the next process computes the digest again."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=".", delete=False) as file:
            file.write(text)
        Path(file.name).replace(path)
    except OSError:
        return
