"""What an exception says of the device: that memory ran out, or that the process cannot go on with it."""

from __future__ import annotations

import torch


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the host ran out; CPU allocator and cuBLAS say so by a plain RuntimeError."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return any(text in str(error) for text in ("DefaultCPUAllocator", "CUDA error: out of memory", "_ALLOC_FAILED"))


def device_is_lost(error: BaseException) -> bool:
    """CUDA errors after which every later call fails too."""
    if is_out_of_memory(error):
        return False
    text = str(error)
    return "CUDA error" in text or "device-side assert" in text or "CUBLAS_STATUS_EXECUTION_FAILED" in text
