"""Pickled checkpoints -> their tensors, with torch's restricted unpickler; nothing of a pickle is ever run.

Old files also hold objects of their trainers, such as callbacks. Stand-ins without code take their places.
"""

from __future__ import annotations

import logging
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch

from pia_ray.errors import WeightsError

log = logging.getLogger(__name__)

_FOREIGN: Final = re.compile(r"GLOBAL ([\w.]+)")
_COLOURS: Final = re.compile(r"\x1b\[[0-9;]*m")
_MOST_FOREIGN: Final = 64

_PROGRAMS: Final = frozenset(
    {"builtins", "os", "posix", "nt", "subprocess", "sys", "shutil", "socket", "runpy", "importlib"}
)
"""Modules that no checkpoint needs and that pickles made to do harm use. A stand-in would do no harm either."""


class _StandIn:
    """An object of a class that is not loaded; keeps the state that the file gives it."""

    def __init__(self, *_: object, **__: object) -> None:
        self.state: object = None

    def __setstate__(self, state: object) -> None:
        self.state = state


def read_pickle(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a pickled checkpoint by name, on the CPU.

    Raises:
        WeightsError: the file is damaged, holds something else, or code.
    """
    found, foreign = _load(path)
    if foreign:
        log.info("%s also holds objects that are left out: %s", path, ", ".join(foreign))
    found = found.get("state_dict", found) if isinstance(found, Mapping) else found
    if not isinstance(found, Mapping):
        raise WeightsError(f"{path} holds no tensors by name: it is a {_kind(found, foreign)}")
    return _flat(found)


def _load(path: Path) -> tuple[Any, list[str]]:
    """The content of the file, and the foreign classes and functions in it."""
    foreign: list[str] = []
    while True:
        try:
            with torch.serialization.safe_globals([(_StandIn, name) for name in foreign]):
                return torch.load(path, map_location="cpu", weights_only=True), foreign
        except (OSError, ValueError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            text = _COLOURS.sub("", str(error)).strip()
            name = found[1].rstrip(".") if (found := _FOREIGN.search(text)) is not None else None
            if name is None or name in foreign or len(foreign) == _MOST_FOREIGN:
                raise WeightsError(f"cannot read {path}: {_plain(text)}") from error
            if name.partition(".")[0] in _PROGRAMS:
                raise WeightsError(
                    f"{path} holds {name}, which a checkpoint does not need: it may have been made to run code"
                ) from error
            foreign.append(name)


def _plain(text: str) -> str:
    """The reason in torch's message, without its advice to run the file's code."""
    if "persistent_load" in text:
        return "it holds whole modules in the format of torch before 1.6: save it again with a newer torch"
    reason = text.partition("WeightsUnpickler error:")[2] or text
    return (reason.strip().splitlines() or ["it is empty or damaged"])[0]


def _kind(found: object, foreign: list[str]) -> str:
    return " or ".join(foreign) if isinstance(found, _StandIn) else type(found).__name__


def _flat(values: Mapping[Any, Any], prefix: str = "") -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for name, value in values.items():
        if isinstance(value, _StandIn) and isinstance(value.state, Mapping):  # a ParameterDict
            value = value.state.get("_parameters")
        if isinstance(value, torch.Tensor):
            tensors[f"{prefix}{name}"] = value.detach()
        elif isinstance(value, Mapping):
            tensors |= _flat(value, f"{prefix}{name}.")
    return tensors
