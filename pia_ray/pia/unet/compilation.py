"""torch.compile for a UNet: the forwards that are compiled, and the compiled code that is kept for the next process.

Compilation takes minutes and pays on a GPU with many rows of few sizes. Many odd sizes must not compile without end,
and a machine without a compiler must still animate.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from pia_ray.config.model import ModelConfig
from pia_ray.errors import ConfigError
from pia_ray.pia.components import CompileMode
from pia_ray.pia.unet.background_compilation import MOST_GRAPHS
from pia_ray.weights.cache_folders import compiled_folder

log = logging.getLogger(__name__)


MOST_FILES: Final = 24
"""Files of compiled code in a folder, the newest ones: each has what one process compiled."""

_SUFFIX: Final = ".compiled"
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
    """The mode of the model's `compile` setting; auto is none on a CPU, and torch's default on a GPU that can compile.

    An offloaded UNet is never compiled, because compiled code would not run the hooks that move its weights.
    """
    if model.compile == "off" or model.offload != "none":
        return None
    if model.compile == "auto":
        return "default" if device.type == "cuda" and can_compile(device) else None
    if not can_compile(device):
        needed = "Triton" if device.type == "cuda" else "a C++ compiler"
        log.warning("the model runs uncompiled, because this machine has no %s", needed.removeprefix("a "))
        return None
    return model.compile


def compile_cache_of(model: ModelConfig) -> Path | None:
    """The folder of compiled code: the model's `compile_cache`, else the user's for this version of torch."""
    if model.compile_cache == "off":
        return None
    if model.compile_cache is None:
        return compiled_folder(f"torch-{torch.__version__}")
    return Path(model.compile_cache).expanduser()


class CompiledForward:
    """A module's forward, compiled for the first kinds of call that occur.

    `cache` is a folder that keeps compiled code; another process with the same torch, device and model loads it and
    compiles in seconds. `backend` is torch.compile's, for tests without a compiler.

    Raises:
        ConfigError: the cache cannot be read.
    """

    def __init__(
        self, module: nn.Module, *, mode: CompileMode, cache: Path | None = None, backend: str = "inductor"
    ) -> None:
        self._module = module
        self._mode: CompileMode = mode
        self._backend = backend
        self._cache = None if cache is None else CompileCache(cache)
        self._kinds: set[tuple[object, ...]] = set()
        how: dict[str, Any] = {"mode": mode} if backend == "inductor" else {}
        self._compiled: Callable[..., Any] | None = torch.compile(
            module, fullgraph=True, dynamic=False, backend=backend, **how
        )
        if self._cache is not None:
            self._cache.load()

    def __call__(self, kind: tuple[object, ...], *args: Any, **kwargs: Any) -> Any:
        """The module's result. `kind` is equal for calls of one compiled graph. Not for several threads.

        With CUDA graphs the next call overwrites the result: copy what you keep.
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
            self._cache.save()
        return answer

    def compile_beside(self, kind: tuple[object, ...], module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The result of another module of the same structure, which compiles the kind; any thread may call it.

        Raises:
            RuntimeError: torch cannot compile it here.
        """
        other = CompiledForward(module, mode=self._mode, backend=self._backend)
        answer = other(kind, *args, **kwargs)
        if other._compiled is None:
            raise RuntimeError("torch cannot compile it here")
        self._kinds.add(kind)
        if self._cache is not None:
            self._cache.save()
        return answer


class CompileCache:
    """A folder of compiled code, a file for each set of it, that processes may share without losing any."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._written: Path | None = None

    def load(self) -> None:
        """Loads the folder's files; code in a file that is damaged, or of another torch, is compiled again.

        Raises:
            ConfigError: the folder cannot be read, or is a file.
        """
        try:
            if not self._folder.exists():
                return
            for path in sorted(self._folder.glob(f"*{_SUFFIX}")):
                try:
                    content = path.read_bytes()
                except FileNotFoundError:
                    continue  # another process has just replaced it with a larger one
                if torch.compiler.load_cache_artifacts(content) is None:
                    log.warning("%s holds no compiled code that this torch reads; it is compiled again", path)
            if not self._folder.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, "it is a file, and must be a folder", str(self._folder))
        except OSError as error:
            raise ConfigError(f"compile_cache {self._folder} cannot be read: {error.strerror or error}") from error

    def save(self) -> None:
        """Writes the code that this process has compiled or loaded so far, if no file holds it yet."""
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
