"""A GPU's memory that this process may still take: what is free there, what torch can use again, and its share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

import torch

CONTEXT_BYTES: Final = 3 * 2**28
"""Memory of a GPU that each process takes beside its tensors, for CUDA's context and the code of its kernels."""


def share_gpu(share: float) -> None:
    """Bounds this process to a share of the GPU, because others use the rest; a wider bound than now changes nothing.

    torch enforces it. Does nothing for a whole GPU, or without one.
    """
    if share < 1 and torch.cuda.is_available():
        total = torch.cuda.get_device_properties(torch.device("cuda")).total_memory
        bound_process(share_bytes(total, share) / total)


def bound_process(fraction: float) -> None:
    """Bounds this process's tensors to a fraction of the current GPU; a later, wider bound does not replace it."""
    torch.cuda.set_per_process_memory_fraction(min(fraction, torch.cuda.get_per_process_memory_fraction()))


def share_bytes(total: int, share: float) -> int:
    """The bytes of tensors of a process that has this share of a GPU; all shares with their contexts fit in it."""
    return max(0, int(total * share) - CONTEXT_BYTES)


def free_gpu_bytes(device: torch.device) -> int:
    """The bytes that work on the current stream of a GPU may take now."""
    free, total = torch.cuda.mem_get_info(device)
    allowed = int(total * torch.cuda.get_per_process_memory_fraction(device))
    segments = [each for each in torch.cuda.memory_snapshot() if each["device"] == (device.index or 0)]
    stream = torch.cuda.current_stream(device).cuda_stream
    return available_bytes(free=free, allowed=allowed, segments=segments, stream=stream)


def available_bytes(*, free: int, allowed: int, segments: Iterable[Mapping[str, Any]], stream: int) -> int:
    """The bytes that work on a stream may take, where `free` are free on the GPU and `allowed` is the process's bound.

    `segments` are what torch has taken of the GPU, as `torch.cuda.memory_snapshot` tells. Of their unused memory that
    of the stream counts, and whole segments of others, which torch gives back before it runs out of memory. The rest
    does not: gaps between tensors of other streams, tensors that another stream may still read, and CUDA graphs' pools.
    """
    taken = reusable = 0
    for segment in segments:
        taken += segment["total_size"]
        unused = segment["total_size"] - segment["active_size"]
        is_graphs = tuple(segment.get("segment_pool_id", (0, 0))) != (0, 0)
        if not is_graphs and (segment["stream"] == stream or not segment["active_size"]):
            reusable += unused
    return max(0, min(free, allowed - taken) + reusable)
