"""The seconds that a kind of forward takes to compile and how much faster it is then, kept for the next process.

Knows no torch.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import statistics
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

log = logging.getLogger(__name__)

FILE: Final = "costs.json"

MOST_KINDS: Final = 256
"""Kinds of one model on one device that the file keeps, the latest ones."""


@dataclass(frozen=True)
class Cost:
    """The cost of compiling a kind of forward, and what it is worth."""

    compile_s: float
    """Seconds that compilation takes; fewer where an earlier process has left its code."""
    gain: float
    """Seconds of an uncompiled forward, divided by those of a compiled one."""


ASSUMED: Final[Mapping[str, Cost]] = {"cuda": Cost(80.0, 1.2), "cpu": Cost(95.0, 1.0)}
"""By type of device, until one kind has been measured. On a CPU compiled code does without the convolutions and
products that were chosen by timing, so a gain has to be measured first."""


CACHED_SHARE: Final = 1 / 3
"""Share of the seconds of compilation that is assumed where the code is there, until it has been measured."""


class CompileCosts:
    """The measured costs of one model's kinds of forward on one device. Threads share it.

    `folder` keeps them beside the compiled code, under `about`, which names the model's structure and the device.
    """

    def __init__(self, assumed: Cost, *, folder: Path | None = None, about: str = "") -> None:
        self._assumed = assumed
        self._path = None if folder is None else folder / FILE
        self._about = about
        self._lock = threading.Lock()
        self._compile_s: dict[str, float] = {}
        self._cached_s: dict[str, float] = {}
        """Seconds of compilation with the code of an earlier process."""
        self._gains: dict[str, float] = {}
        self._earlier: frozenset[str] = frozenset()
        """Kinds that an earlier process has compiled."""
        self._is_read = False

    def of(self, kind: tuple[object, ...]) -> Cost:
        """The cost of a kind: its own, else the median of the measured ones, else the assumed one."""
        with self._lock:
            self._read()
            key = _key(kind)
            if key in self._earlier:
                seconds = _known(self._cached_s, key, self._compile_s[key] * CACHED_SHARE)
            else:
                seconds = _known(self._compile_s, key, self._assumed.compile_s)
            return Cost(seconds, _known(self._gains, key, self._assumed.gain))

    def record_seconds(self, kind: tuple[object, ...], seconds: float) -> None:
        """Keeps the seconds that compiling the kind took in this process."""
        with self._lock:
            self._read()
            key = _key(kind)
            self._keep(self._cached_s if key in self._earlier else self._compile_s, key, seconds)

    def record_gain(self, kind: tuple[object, ...], gain: float) -> None:
        """Keeps how much faster the kind is compiled."""
        with self._lock:
            self._read()
            self._keep(self._gains, _key(kind), gain)

    def _keep(self, values: dict[str, float], key: str, value: float) -> None:
        values.pop(key, None)
        values[key] = round(value, 3)
        self._write()

    def _read(self) -> None:
        if self._is_read:
            return
        self._is_read = True
        content = self._file()
        for name, values in self._parts().items():
            values.update(self._kept(content, name))
        self._earlier = frozenset(self._compile_s)

    def _parts(self) -> dict[str, dict[str, float]]:
        """The file's entries of a model, by name."""
        return {"compile_s": self._compile_s, "cached_s": self._cached_s, "gain": self._gains}

    def _kept(self, content: Mapping[str, Any], name: str) -> dict[str, float]:
        """The values of that name in the file's content, without what is damaged."""
        own = content.get(self._about)
        found = own.get(name) if isinstance(own, dict) else None
        pairs = found.items() if isinstance(found, dict) else ()
        return {str(key): float(value) for key, value in pairs if isinstance(value, int | float) and value > 0}

    def _file(self) -> dict[str, Any]:
        """The file's content, of all models; empty where there is none, or it is damaged."""
        try:
            content = {} if self._path is None else json.loads(self._path.read_bytes())
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    def _write(self) -> None:
        if self._path is None:
            return
        temporary = self._path.with_name(f".{FILE}.{os.getpid()}")
        with _writing:
            content = self._file()
            own = {name: _latest({**self._kept(content, name), **values}) for name, values in self._parts().items()}
            text = json.dumps({**content, self._about: own}, indent=1)
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                temporary.write_text(text)
                temporary.replace(self._path)
            except OSError as error:
                temporary.unlink(missing_ok=True)
                log.warning("the measured seconds of compiled code are not kept: %s", error)


_writing = threading.Lock()
"""Held by one writer of this process, since a UNet, its decoder and other models write to one file."""


def _known(values: Mapping[str, float], key: str, assumed: float) -> float:
    return values[key] if key in values else statistics.median(values.values()) if values else assumed


def _latest(values: Mapping[str, float]) -> dict[str, float]:
    return dict(list(values.items())[-MOST_KINDS:])


def _key(kind: tuple[object, ...]) -> str:
    """The kind in few characters, the sizes of its batch readable."""
    return f"{kind[0] if kind else ''} {hashlib.sha256(repr(kind).encode()).hexdigest()[:16]}"
