"""Whether an exception means that memory ran out, or that the process cannot use its device any more."""

from __future__ import annotations

from typing import Final

import torch


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the host ran out of memory; CPU allocator, cuBLAS and Triton raise a plain RuntimeError."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return any(text in str(error) for text in _OUT_OF_MEMORY)


def device_is_lost(error: BaseException) -> bool:
    """Whether it is a CUDA error after which every later call fails too; compiled kernels raise Triton's own text."""
    return not is_out_of_memory(error) and any(text in str(error) for text in _LOST)


_OUT_OF_MEMORY: Final = ("DefaultCPUAllocator", "CUDA error: out of memory", "[CUDA]: out of memory", "_ALLOC_FAILED")
_LOST: Final = (
    *("CUDA error", "device-side assert", "illegal memory access", "unspecified launch failure"),
    *("CUBLAS_STATUS_EXECUTION_FAILED", "CUDNN_STATUS_EXECUTION_FAILED"),
)
