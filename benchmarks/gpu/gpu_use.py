"""The busy share of a GPU by its own count, through NVML's Python package or nvidia-smi, whichever is here."""

from __future__ import annotations

import importlib
import shutil
import statistics
import subprocess
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Final

import torch

EVERY_S: Final = 0.25

Read = Callable[[], float]
"""The share, 0 to 1, of the latest moments in which a kernel ran."""


class GpuUse:
    """Samples a reader on a thread of its own while the context is open."""

    def __init__(self, read: Read, *, every_s: float = EVERY_S) -> None:
        self._read, self._every_s = read, every_s
        self._samples: list[tuple[float, float]] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="gpu-use", daemon=True)

    def __enter__(self) -> GpuUse:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()

    def between(self, begin: float, end: float) -> float | None:
        """The mean share between two times of `time.monotonic`; None without a sample."""
        shares = [share for at, share in self._samples if begin <= at <= end]
        return statistics.fmean(shares) if shares else None

    def _sample(self) -> None:
        while not self._over.is_set():
            try:
                self._samples.append((time.monotonic(), self._read()))
            except (OSError, ValueError, RuntimeError):
                return  # the counter is gone: what was found until now counts
            self._over.wait(self._every_s)


def reader_of(device: torch.device) -> tuple[Read, str] | None:
    """A reader of the device's busy share and the name of its source; None where nothing counts it."""
    if device.type != "cuda":
        return None
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    return by_nvml(uuid) or by_nvidia_smi(uuid)


def by_nvml(uuid: str) -> tuple[Read, str] | None:
    """The reader of the package pynvml; None where it is not installed or its library does not answer."""
    try:
        nvml: Any = importlib.import_module("pynvml")
        nvml.nvmlInit()
        handle = nvml.nvmlDeviceGetHandleByUUID(uuid)
        nvml.nvmlDeviceGetUtilizationRates(handle)
    except Exception:  # noqa: BLE001 - without the package, and each of its own errors, nvidia-smi is asked
        return None
    return lambda: _nvml_share(nvml, handle), "NVML"


def by_nvidia_smi(uuid: str) -> tuple[Read, str] | None:
    """The reader of the program nvidia-smi; None where it is not here or counts nothing, as on a part of a GPU."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", f"--id={uuid}", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits"]

    def read() -> float:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
        return float(done.stdout.strip()) / 100

    try:
        read()
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None
    return read, "nvidia-smi"


def _nvml_share(nvml: Any, handle: Any) -> float:
    try:
        return float(nvml.nvmlDeviceGetUtilizationRates(handle).gpu) / 100
    except Exception as error:
        raise RuntimeError(str(error)) from error
