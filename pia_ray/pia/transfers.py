"""Copies from host memory to a GPU that the host does not wait for."""

from __future__ import annotations

import torch


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on that device; nothing waits for a GPU.

    A plain copy from host memory waits until all work that is queued on the GPU is done. From pinned memory the GPU
    copies it when it comes to it, and torch keeps the pinned memory until then.
    """
    if tensor.device.type != "cpu" or device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
