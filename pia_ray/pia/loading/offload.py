"""Offloading: weights stay in host memory and are moved to the GPU when they are needed, by accelerate's hooks."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from typing import Any, Literal

import torch
from accelerate import cpu_offload
from accelerate.hooks import ModelHook, add_hook_to_module
from accelerate.utils import send_to_device
from torch import nn

log = logging.getLogger(__name__)


def offload(parts: Sequence[nn.Module], mode: Literal["none", "model", "sequential"], device: torch.device) -> None:
    """Adds hooks to a model's parts, which are in host memory, that move them to `device` for their forwards.

    none: no hooks. model: a part moves to the device as a whole when it runs, and stays until another of this thread's
    parts runs. sequential: each layer is on the device only during its own forward.
    """
    if mode != "none" and device.type == "cpu":
        log.warning("offload %s saves nothing on a CPU: the weights are in host memory anyway", mode)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())  # as accelerate compares devices
    for part in parts:
        if mode == "model":
            add_hook_to_module(part, _OneAtATime(device))
        elif mode == "sequential":
            # As in diffusers, with buffers where the part has parameters that belong to none of its layers.
            cpu_offload(part, device, offload_buffers=any(True for _ in part.parameters(recurse=False)))


class _Resident(threading.local):
    """This thread's part on the device, and its weights in host memory. An engine has one thread and its own models."""

    part: nn.Module | None = None
    host_weights: Sequence[tuple[nn.Parameter, torch.Tensor]] = ()


_resident = _Resident()


class _OneAtATime(ModelHook):  # accelerate has no annotations; its hooks are made by inheritance
    """Moves its part to the device before it runs, and the part that ran before back to host memory.

    accelerate's own `CpuOffload` offloads one fixed predecessor. Here rows join and end at any step, so any part may
    follow any other. Nothing is copied back, because weights do not change: the tensors in host memory are used again,
    and stay shared with other models.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if _resident.part is not module:
            # Forwards run in inference mode; weights made there could not be moved again outside it.
            with torch.inference_mode(False), torch.no_grad():
                for weight, on_host in _resident.host_weights:
                    weight.data = on_host
                if self._device.type == "cuda":
                    torch.cuda.empty_cache()
                _resident.host_weights = [(weight, weight.data.cpu()) for weight in module.parameters()]
                module.to(self._device)
            _resident.part = module
        return send_to_device(args, self._device), send_to_device(kwargs, self._device)
