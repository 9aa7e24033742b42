"""The processes that train together, where there are several: see `torchrun`."""

from __future__ import annotations

import os
from typing import Any

import torch.distributed as dist


def join(device: str) -> None:
    """Joins the other processes of `torchrun`; alone, does nothing."""
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")


def leave() -> None:
    """Ends what `join` began."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """Number of this process among those that train together."""
    return dist.get_rank() if dist.is_initialized() else 0


def count() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def gathered(value: Any) -> list[Any]:
    """The value of every process, in order."""
    if count() == 1:
        return [value]
    values: list[Any] = [None] * count()
    dist.all_gather_object(values, value)
    return values
