"""Compiled code that is kept for the next process, in a folder that processes share."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import tempfile
import threading
from pathlib import Path
from typing import Final
from weakref import WeakValueDictionary

import torch

from pia_ray.config.model import ModelConfig
from pia_ray.errors import ConfigError
from pia_ray.weights.cache_folders import compiled_folder

log = logging.getLogger(__name__)

MOST_FILES: Final = 24
"""Files of compiled code in a folder, the newest ones: each has what one process compiled."""

_SUFFIX: Final = ".compiled"


def compile_cache_of(model: ModelConfig) -> Path | None:
    """The folder of compiled code: the model's `compile_cache`, else the user's for this version of torch."""
    if model.compile_cache == "off":
        return None
    if model.compile_cache is None:
        return compiled_folder(f"torch-{torch.__version__}")
    return Path(os.path.expanduser(model.compile_cache))  # noqa: PTH111 - Path's own raises where there is no home folder


def open_cache(folder: Path) -> CompileCache:
    """The process's cache in a folder, one for all who compile: torch keeps what they compile in one place, too.

    Raises:
        ConfigError: as `CompileCache`.
    """
    with _opening:
        if (found := _caches.get(folder)) is None:
            found = _caches[folder] = CompileCache(folder)
        return found


class CompileCache:
    """A folder of compiled code, a file for each set of it, that processes may share without losing any.

    Raises:
        ConfigError: the folder cannot be read, or is a file.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._written: Path | None = None
        self._is_loaded = False
        try:
            if folder.exists():
                next(folder.iterdir(), None)
        except OSError as error:
            raise ConfigError(f"compile_cache {folder} cannot be read: {_reason(error)}") from error

    def load(self) -> None:
        """Loads the folder's files, once; code in a file that is damaged, or of another torch, is compiled again.

        It imports torch's compiler, which takes seconds.
        """
        with self._lock:
            if not self._is_loaded:
                self._is_loaded = True
                self._load()

    def save(self) -> None:
        """Writes the code that this process has compiled or loaded so far, if no file holds it yet."""
        with self._lock:
            self._save()

    def _load(self) -> None:
        try:
            for path in sorted(self._folder.glob(f"*{_SUFFIX}")):
                try:
                    content = path.read_bytes()
                except FileNotFoundError:
                    continue  # another process has just replaced it with a larger one
                if torch.compiler.load_cache_artifacts(content) is None:
                    log.warning("%s holds no compiled code that this torch reads; it is compiled again", path)
        except OSError as error:
            log.warning("compiled code of other processes is not used: %s", error)

    def _save(self) -> None:
        found = torch.compiler.save_cache_artifacts()
        if found is None:
            return
        content, about = found
        keys = sorted(f"{kind} {key}" for kind, keys in about.artifacts.items() for key in keys)
        path = self._folder / (hashlib.sha256("\n".join(keys).encode()).hexdigest()[:32] + _SUFFIX)
        try:
            if not path.exists():
                self._write(path, content)
            if self._written not in (None, path):  # all of it is in the new one
                self._written.unlink(missing_ok=True)
            self._written = path
            files = sorted(self._folder.glob(f"*{_SUFFIX}"), key=lambda file: file.stat().st_mtime, reverse=True)
            for old in files[MOST_FILES:]:
                old.unlink(missing_ok=True)
        except OSError as error:
            log.warning("compiled code is not kept for the next process: %s", error)

    def _write(self, path: Path, content: bytes) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=self._folder, prefix=".", delete=False) as file:
            temporary = Path(file.name)
            try:
                file.write(content)
                file.close()
                temporary.chmod(0o644)  # workers of other users read it, too
                temporary.replace(path)
            except OSError:
                temporary.unlink(missing_ok=True)
                raise


_opening = threading.Lock()

_caches: WeakValueDictionary[Path, CompileCache] = WeakValueDictionary()


def _reason(error: OSError) -> str:
    if error.errno == errno.ENOTDIR:
        return "it is a file, and must be a folder"
    return error.strerror or str(error)
