"""Which exceptions say that memory ran out, and which that the process cannot go on with its GPU."""

from __future__ import annotations

import pytest
import torch

from pia_ray.pia.device.errors import device_is_lost, is_out_of_memory


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
    ],
)
def test_running_out_of_memory_costs_no_device(error: BaseException) -> None:
    assert is_out_of_memory(error)
    assert not device_is_lost(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
        RuntimeError("Triton Error [CUDA]: unspecified launch failure"),
        RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
    ],
)
def test_a_device_is_lost_after_errors_that_stay(error: BaseException) -> None:
    assert device_is_lost(error)
    assert not is_out_of_memory(error)


def test_other_errors_say_nothing_of_the_device() -> None:
    error = RuntimeError("The size of tensor a (4) must match the size of tensor b (5)")
    assert not is_out_of_memory(error)
    assert not device_is_lost(error)
