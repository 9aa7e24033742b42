"""torch.compile for a UNet: which forwards are compiled, when it is let be, and what it keeps for the next process.

Compiled code is worth its minutes on a GPU with many rows of few sizes. Odd sizes must not compile without end, and a
machine without a compiler must still animate.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, Literal

import torch
from torch import nn

from pia_ray.config import ModelConfig

log = logging.getLogger(__name__)

Mode = Literal["default", "reduce-overhead", "max-autotune"]

MOST_GRAPHS: Final = 12
"""Kinds of forward of one model that are compiled for; further ones run uncompiled."""

_TORCH_LIMITS: Final[dict[str, Any]] = {
    "recompile_limit": 2**16,
    "accumulated_recompile_limit": 2**16,
    "fail_on_recompile_limit_hit": False,
}
"""torch counts all models of a class as one, and fails beyond its own limits: they must not be met before ours."""


def can_compile(device: torch.device) -> bool:
    """Whether torch's compiler has what it needs for the device: Triton for a GPU, a C++ compiler for a CPU."""
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        return bool(has_triton())
    return any(shutil.which(name) for name in ("g++", "clang++"))


def compile_mode_of(model: ModelConfig, device: torch.device) -> Mode | None:
    """The mode that the model asks for: by default none on a CPU, and torch's own on a GPU that can compile.

    Offloaded weights come and go by hooks, which compiled code would not see: they are never compiled.
    """
    if model.compile == "off" or model.offload != "none":
        return None
    if model.compile == "auto":
        return "default" if device.type == "cuda" and can_compile(device) else None
    if not can_compile(device):
        needed = "Triton" if device.type == "cuda" else "a C++ compiler"
        log.warning("the model runs uncompiled: %s is not here", needed)
        return None
    return model.compile


class CompiledForward:
    """A module's forward, compiled for the first kinds of call that occur.

    `cache` is a file in which what has been compiled is kept; another process with the same torch, device and model
    takes it up and compiles in seconds. `backend` is torch.compile's, for tests without a compiler.
    """

    def __init__(self, module: nn.Module, *, mode: Mode, cache: Path | None = None, backend: str = "inductor") -> None:
        self._module = module
        self._cache = cache
        self._kinds: set[tuple[object, ...]] = set()
        how: dict[str, Any] = {"mode": mode} if backend == "inductor" else {}
        self._compiled: Callable[..., Any] | None = torch.compile(
            module, fullgraph=True, dynamic=False, backend=backend, **how
        )
        if cache is not None and cache.is_file():
            torch.compiler.load_cache_artifacts(cache.read_bytes())

    def __call__(self, kind: tuple[object, ...], *args: Any, **kwargs: Any) -> Any:
        """The module's answer; `kind` is equal for calls that one compiled graph serves. Not for several threads.

        What it returns is overwritten by the next call where CUDA graphs are in play: copy what is kept.
        """
        if self._compiled is None or (kind not in self._kinds and len(self._kinds) >= MOST_GRAPHS):
            return self._module(*args, **kwargs)
        is_new = kind not in self._kinds
        try:
            with torch._dynamo.config.patch(_TORCH_LIMITS):
                answer = self._compiled(*args, **kwargs)
        except (torch._dynamo.exc.TorchDynamoException, torch._inductor.exc.InductorError) as error:
            reason = str(error).strip().splitlines()[0]
            log.warning("the model runs uncompiled, because torch cannot compile it here: %s", reason)
            self._compiled = None
            return self._module(*args, **kwargs)
        self._kinds.add(kind)
        if is_new and self._cache is not None:
            self._save(self._cache)
        return answer

    def _save(self, path: Path) -> None:
        found = torch.compiler.save_cache_artifacts()
        if found is None:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, delete=False) as file:
                file.write(found[0])
            Path(file.name).replace(path)
        except OSError as error:
            log.warning("the compiled model is not kept: %s", error)
