"""The record that an export leaves in its target: what was copied there, so that the next one copies only changes.

It is written now and then while files are copied. A file that a crash has left out of it is copied once more.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any, Final

from pia_ray import storage
from pia_ray.errors import StorageNotFound

NAME: Final = ".pia-ray-export.json"

_EVERY_S: Final = 30.0
_VERSION: Final = 1


class ExportRecord:
    """The files of a target by their path in it. Its methods may be called from any thread."""

    def __init__(self, target: str, files: Mapping[str, tuple[str, int]]) -> None:
        self._uri = storage.join(target, NAME)
        self._files = dict(files)
        self._lock = threading.Lock()
        self._written_at = time.monotonic()

    @classmethod
    def read(cls, target: str) -> ExportRecord:
        """The record of a target; empty where there is none, or it is damaged."""
        try:
            values = json.loads(storage.read_bytes(storage.join(target, NAME)))
            files = {str(path): (str(source), int(size)) for path, (source, size) in values["files"].items()}
        except StorageNotFound:
            files = {}
        except (ValueError, KeyError, TypeError, AttributeError):
            files = {}
        return cls(target, files)

    def size_of(self, path: str, *, source: str) -> int | None:
        """Bytes of the file that was copied there from that source; None where another or none was."""
        found = self._files.get(path)
        return found[1] if found is not None and found[0] == source else None

    def note(self, path: str, *, source: str, size_bytes: int) -> None:
        """Notes a file that is there now, and writes the record if it has waited."""
        with self._lock:
            self._files[path] = (source, size_bytes)
            if time.monotonic() - self._written_at < _EVERY_S:
                return
            self._write()

    def forget(self, path: str) -> None:
        """Drops a file that is no longer there."""
        with self._lock:
            self._files.pop(path, None)

    def others(self, paths: set[str]) -> Iterator[str]:
        """The files of earlier exports that are not among `paths`."""
        return (path for path in sorted(self._files) if path not in paths)

    def write(self) -> None:
        """Writes the record, now."""
        with self._lock:
            self._write()

    def _write(self) -> None:
        content: dict[str, Any] = {"version": _VERSION, "files": self._files}
        storage.write_bytes(self._uri, json.dumps(content).encode(), content_type="application/json")
        self._written_at = time.monotonic()
