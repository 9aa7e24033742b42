"""API keys, which identify callers. Holds the sha256 of each key, never a key itself.

A file of keys is read again when it changes, so that keys are added and withdrawn without a restart.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from pia_ray.config.serve import owner_of_hash
from pia_ray.errors import ConfigError, Unauthorized

logger = logging.getLogger(__name__)

ANONYMOUS: Final = "anonymous"
"""The owner of the objects of callers without a key."""

_Stamp = tuple[int, int, int]


class KeyRing:
    """The keys that are accepted. Safe in threads."""

    def __init__(self, keys: Sequence[str] | str, *, allow_anonymous: bool) -> None:
        """`keys`: the sha256 of each in hex, or the path of a file with one on each line, `#` before remarks.

        Raises:
            ConfigError: the file cannot be read, or is not a list of keys.
        """
        self._file = Path(keys) if isinstance(keys, str) and keys else None
        self._has_keys = bool(keys)
        self._allow_anonymous = allow_anonymous or not keys
        self._lock = threading.Lock()
        self._stamp: _Stamp | None = None
        self._hashes: tuple[bytes, ...] = ()
        if self._file is not None:
            self._hashes, self._stamp = _read(self._file), _stamp(self._file)
        else:
            self._hashes = tuple(bytes.fromhex(key) for key in keys)

    @property
    def open(self) -> bool:
        """Whether callers without a key are accepted."""
        return self._allow_anonymous

    def owner_of(self, key: str | None) -> str:
        """The owner of this key's objects: `key_` and 32 hex digits, or `ANONYMOUS`.

        An endpoint without keys accepts any key as none, because the openai clients always send one.

        Raises:
            Unauthorized: no key where one is needed, or one that is not known.
        """
        if key is None or not self._has_keys:
            if self._allow_anonymous:
                return ANONYMOUS
            raise Unauthorized("An API key is needed: send it as `Authorization: Bearer <key>`.")
        digest = hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
        known = False
        for each in self._current():  # all of them, each in constant time, so that the time says nothing
            known |= hmac.compare_digest(digest, each)
        if not known:
            raise Unauthorized("This API key is not known.")
        return owner_of_hash(digest)

    def _current(self) -> tuple[bytes, ...]:
        if self._file is None:
            return self._hashes
        with self._lock:
            try:
                stamp = _stamp(self._file)
                if stamp != self._stamp:
                    self._hashes, self._stamp = _read(self._file), stamp
                    logger.info("read %d API keys again", len(self._hashes))
            except ConfigError as error:
                # Half a file, or none, is a slip of its editor: the earlier keys stay valid.
                logger.error("the earlier API keys stay valid: %s", error)
            return self._hashes


def _stamp(file: Path) -> _Stamp:
    try:
        found = file.stat()
    except OSError as error:
        raise ConfigError(f"api_keys: cannot read {file}: {error.strerror}") from None
    return found.st_mtime_ns, found.st_size, found.st_ino


def _read(file: Path) -> tuple[bytes, ...]:
    try:
        lines = file.read_text("utf-8").splitlines()
    except OSError as error:
        raise ConfigError(f"api_keys: cannot read {file}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"api_keys: {file} is not UTF-8: it has the sha256 of a key on each line") from None
    hashes = []
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        if re.fullmatch("[0-9a-f]{64}", text) is None:  # not quoted: it may be the key itself
            raise ConfigError(f"api_keys: line {number} of {file} is not a sha256: 64 hex digits in lower case")
        hashes.append(bytes.fromhex(text))
    return tuple(hashes)
