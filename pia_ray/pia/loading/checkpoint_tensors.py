"""Checkpoint files -> tensors by name; copies of modules that share every tensor with the original."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import safetensors
import torch
from safetensors.torch import load_file

from pia_ray.errors import WeightsError

_Module = TypeVar("_Module", bound=torch.nn.Module)


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint file by name, on the CPU. Pickled files are loaded with torch's weights_only.

    Raises:
        WeightsError: the file cannot be read, or holds something else.
    """
    try:
        if path.suffix.lower() == ".safetensors":
            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, ValueError, RuntimeError, EOFError, pickle.UnpicklingError, safetensors.SafetensorError) as error:
        raise WeightsError(f"cannot read {path}: {str(error).strip().splitlines()[0]}") from error
    found = found.get("state_dict", found) if isinstance(found, Mapping) else found
    if not isinstance(found, Mapping):
        raise WeightsError(f"{path} holds no tensors by name: it is a {type(found).__name__}")
    return _flat(found)


def tensor_names(path: Path) -> list[str]:
    """The names of a safetensors file's tensors, read without the tensors; of other files, which have to be loaded."""
    if path.suffix.lower() != ".safetensors":
        return list(read_tensors(path))
    with safetensors.safe_open(path, framework="pt") as file:
        return list(file.keys())


def read_header(path: Path) -> dict[str, Any]:
    """The metadata of a safetensors file, with JSON texts parsed; empty for other files."""
    if path.suffix.lower() != ".safetensors":
        return {}
    with safetensors.safe_open(path, framework="pt") as file:
        texts = file.metadata() or {}
    values: dict[str, Any] = {}
    for name, text in texts.items():
        try:
            values[name] = json.loads(text)
        except ValueError:
            values[name] = text
    return values


def sharing_copy(module: _Module) -> _Module:
    """A copy of a module with the original's tensors; replacing some of them does not affect the original."""
    shared: dict[int, Any] = {id(tensor): tensor for tensor in chain(module.parameters(), module.buffers())}
    return copy.deepcopy(module, shared)


def _flat(values: Mapping[Any, Any], prefix: str = "") -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for name, value in values.items():
        if isinstance(value, torch.Tensor):
            tensors[f"{prefix}{name}"] = value.detach()
        elif isinstance(value, Mapping):
            tensors |= _flat(value, f"{prefix}{name}.")
    return tensors
