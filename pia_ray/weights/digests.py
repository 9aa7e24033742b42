"""Digests of files. Those of large files are kept for the next process, because 5 GB take 4 CPU seconds; files of the
hub's cache have theirs in their names."""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
import threading
import time
from collections.abc import Iterable
from concurrent.futures import Future
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
    """The digests that this process knows, and a folder of those that others have computed (None: the user's).

    Threads share it.
    """

    def __init__(
        self, folder: Path | None = None, *, kept_bytes: int = KEPT_BYTES, settled_s: float = SETTLED_S
    ) -> None:
        self._folder = folder
        self._kept_bytes = kept_bytes
        self._settled_s = settled_s
        self._known: dict[Facts, Future[str]] = {}
        self._lock = threading.Lock()
        self._cores = threading.Semaphore(os.cpu_count() or 1)

    def of(self, path: Path) -> str:
        """The sha256 of a file's content, in hex."""
        return self._begun(path).result()

    def start(self, paths: Iterable[Path]) -> None:
        """Starts to compute the digests of large files, each on a thread of its own; `of` waits for them.

        sha256 leaves the interpreter to other threads. A file that is not there is left to `of`.
        """
        for path in paths:
            try:
                if path.stat().st_size >= self._kept_bytes:
                    self._begun(path, on_a_thread=True)
            except OSError:
                continue

    def _begun(self, path: Path, *, on_a_thread: bool = False) -> Future[str]:
        facts = _facts(path)
        with self._lock:
            if (found := self._known.get(facts)) is not None:
                return found
            made = self._known[facts] = Future[str]()
        if on_a_thread:
            threading.Thread(target=self._compute, args=(path, facts, made), name="digest", daemon=True).start()
        else:
            self._compute(path, facts, made)
        return made

    def _compute(self, path: Path, facts: Facts, made: Future[str]) -> None:
        try:
            with self._cores:
                made.set_result(self._read(path, facts))
        except Exception as error:  # noqa: BLE001 - whoever asks gets it, and a later call tries again
            with self._lock:
                del self._known[facts]
            made.set_exception(error)

    def _read(self, path: Path, facts: Facts) -> str:
        status = path.stat()
        if status.st_size < self._kept_bytes:
            return _computed(path)
        if (stated := _stated_by_the_hub(path)) is not None:
            return stated
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


def _stated_by_the_hub(path: Path) -> str | None:
    """The digest by which the hub's cache names a large file, models--OWNER--NAME/blobs/SHA256; None of other files.

    The hub's client writes a file there under the sha256 that the hub states, once it has the size that it states.
    """
    blob = path.resolve()
    folder = blob.parent
    is_blob = folder.name == "blobs" and folder.parent.name.startswith("models--")
    return blob.name if is_blob and _SHA256.fullmatch(blob.name) else None


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
