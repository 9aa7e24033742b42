"""torch.compile for a UNet: whether it may run, and the compiled code of each kind of forward.

Compilation takes minutes and pays where many forwards of few kinds follow. A machine without a compiler must still
animate.
"""

from __future__ import annotations

import builtins
import logging
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from types import FunctionType
from typing import Any, Final
from weakref import WeakValueDictionary, finalize

import torch
from torch import nn

from pia_ray.config.model import ModelConfig
from pia_ray.formatting import first_line
from pia_ray.pia.components import CompileMode
from pia_ray.pia.unet.compile_cache import open_cache

log = logging.getLogger(__name__)

Kind = tuple[object, ...]
"""Equal for forwards of one compiled graph."""

_TORCH_LIMITS: Final[dict[str, Any]] = {
    "recompile_limit": 2**16,
    "accumulated_recompile_limit": 2**16,
    "fail_on_recompile_limit_hit": False,
}
"""torch counts all models of a class as one and fails beyond its own limits, so these are higher than ours."""


def can_compile(device: torch.device) -> bool:
    """Whether torch can compile for the device: Triton is there for a GPU, or a C++ compiler for a CPU."""
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        return bool(has_triton())
    return any(shutil.which(name) for name in ("g++", "clang++"))


def compile_mode_of(model: ModelConfig, device: torch.device) -> CompileMode | None:
    """The mode of the model's `compile` setting; auto is torch's default mode on a device that it can compile for.

    An offloaded UNet is never compiled, because compiled code would not run the hooks that move its weights.
    """
    if model.compile == "off" or model.offload != "none":
        return None
    if model.compile == "auto":
        return "default" if can_compile(device) else None
    if not can_compile(device):
        needed = "Triton" if device.type == "cuda" else "a C++ compiler"
        log.warning("the model runs uncompiled, because this machine has no %s", needed.removeprefix("a "))
        return None
    return model.compile


class CompiledCode:
    """The compiled code of one model's UNet and of its variants' UNets, by kind of forward. Threads share it.

    `cache` is a folder that keeps compiled code; another process with the same torch, device and model loads it and
    compiles in seconds. `backend` is torch.compile's, for tests without a compiler.

    Raises:
        ConfigError: the cache cannot be read.
    """

    def __init__(self, *, mode: CompileMode, cache: Path | None = None, backend: str = "inductor") -> None:
        self.mode: CompileMode = mode
        self._backend = backend
        self._cache = None if cache is None else open_cache(cache)
        self._functions: dict[Kind, Callable[..., Any]] = {}
        self._lock = threading.Lock()
        self._is_broken = False

    @property
    def kinds(self) -> frozenset[Kind]:
        """The kinds that have compiled code."""
        return frozenset(self._functions)

    def __call__(self, kind: Kind, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The module's result, by code that is compiled at the first call of the kind.

        Where torch cannot compile it, the module runs as it is, now and from now on. With CUDA graphs the next call
        overwrites the result: copy what you keep.
        """
        if self._is_broken:
            return module(*args, **kwargs)
        try:
            return self.compile(kind, module, *args, **kwargs)
        except (torch._dynamo.exc.TorchDynamoException, torch._inductor.exc.InductorError) as error:
            log.warning("the model runs uncompiled, because torch cannot compile it here: %s", first_line(error))
            self._is_broken = True
            return module(*args, **kwargs)

    def compile(self, kind: Kind, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The same, but raises torch's error where torch cannot compile it.

        Raises:
            TorchDynamoException: torch cannot make a graph of the module.
            InductorError: torch cannot make code of its graph.
        """
        function = self._functions.get(kind)
        is_new = function is None
        if function is None:
            function = self._new_function(kind)
        with torch._dynamo.config.patch(_TORCH_LIMITS):
            answer = function(module, *args, **kwargs)
        if is_new:
            self._functions[kind] = function
            if self._cache is not None:
                self._cache.save()
        return answer

    def drop(self, kind: Kind) -> None:
        """Drops the code of a kind; its memory is free once no other model of the process has it."""
        self._functions.pop(kind, None)

    def _new_function(self, kind: Kind) -> Callable[..., Any]:
        how: dict[str, Any] = {"mode": self.mode} if self._backend == "inductor" else {}
        with self._lock:
            if self._cache is not None:
                self._cache.load()
            key = (self.mode, kind)
            call = _calls.get(key)
            if call is None:
                call = _calls[key] = _call_of_its_own()
        compiled: Callable[..., Any] = torch.compile(call, fullgraph=True, dynamic=False, backend=self._backend, **how)
        return compiled


_calls: WeakValueDictionary[tuple[CompileMode, Kind], FunctionType] = WeakValueDictionary()
"""The functions whose compiled code exists. Models of the process share them, so that equal code is compiled once."""


def _call_of_its_own() -> FunctionType:
    """A function that calls a module, with a code object and global names of its own.

    torch keeps compiled code with the two. Its guards outlive the function (torch 2.13) and refer to the global names;
    these are cleared then, so that the code goes.
    """

    def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return module(*args, **kwargs)

    names: dict[str, Any] = {"__name__": __name__, "__builtins__": builtins}

    def clear() -> None:  # torch deletes its names itself, later
        names.update(dict.fromkeys(names))

    function = FunctionType(call.__code__.replace(), names, "call")
    finalize(function, clear).atexit = False
    return function
