"""Checkpoint files -> tensors by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file

from pia_ray.errors import WeightsError
from pia_ray.formatting import first_line
from pia_ray.pia.loading.pickled_tensors import read_pickle


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint file by name, on the CPU. Pickled files run no code.

    Raises:
        WeightsError: the file cannot be read, or holds something else.
    """
    if path.suffix.lower() != ".safetensors":
        return read_pickle(path)
    try:
        return load_file(path)
    except (OSError, ValueError, RuntimeError, safetensors.SafetensorError) as error:
        raise WeightsError(f"cannot read {path}: {first_line(error)}") from error


def tensor_names(path: Path) -> list[str]:
    """The names of a safetensors file's tensors, read without the tensors; of other files, which have to be loaded."""
    if path.suffix.lower() != ".safetensors":
        return list(read_tensors(path))
    with safetensors.safe_open(path, framework="pt") as file:
        return list(file.keys())


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite."""
    return bool(torch.isfinite(tensor.float()).all())


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
