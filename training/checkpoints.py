"""What a training run leaves on disk: its state, replaced atomically, and a log of JSON lines."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from typing import Any

import torch

log = logging.getLogger("training")


def save(state: dict[str, Any], path: Path) -> None:
    """Writes the state; whoever reads the path sees the old or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".tmp")
    torch.save(state, fresh)
    fresh.replace(path)


def load(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """The state that `save` wrote."""
    state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    return state


def write_line(path: Path, line: dict[str, Any]) -> None:
    """Appends one JSON line to the log, and logs it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(
        {name: float(f"{value:.5g}") if isinstance(value, float) else value for name, value in line.items()}
    )
    with path.open("a", encoding="utf-8") as file:
        file.write(text + "\n")
    log.info("%s", text)


class Average:
    """The exponential moving average of a module's parameters; its buffers are the module's at the start."""

    def __init__(self, module: torch.nn.Module, *, memory: float) -> None:
        self.module: Any = copy.deepcopy(module).eval().requires_grad_(False)
        self.memory = memory

    @torch.no_grad()
    def follow(self, module: torch.nn.Module, step: int) -> None:
        """Takes in the parameters after step number `step`, from 1; the first steps are forgotten faster."""
        keep = min(self.memory, step / (step + 10))
        torch._foreach_lerp_(list(self.module.parameters()), list(module.parameters()), 1 - keep)
