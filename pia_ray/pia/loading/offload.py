"""Weights that wait in host memory and come to the GPU when they are needed, through accelerate's hooks."""

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
    """Lets a model's parts, which are in host memory, come to `device` for their forwards.

    none: they stay as they are. model: a part that runs moves to the device whole and stays until another of this
    thread's parts runs. sequential: each layer visits the device for its own forward.
    """
    if mode != "none" and device.type == "cpu":
        log.warning("offload %s saves nothing on a CPU: the weights are in host memory anyway", mode)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())  # as accelerate compares devices
    for part in parts:
        if mode == "model":
            add_hook_to_module(part, _OneAtATime(device))
        elif mode == "sequential":
            # As in diffusers: buffers go along where the part has parameters of its own beside those of its layers.
            cpu_offload(part, device, offload_buffers=any(True for _ in part.parameters(recurse=False)))


class _Visitor(threading.local):
    """The part that is on the device now, and its weights at home. An engine has one thread and models of its own."""

    part: nn.Module | None = None
    home: Sequence[tuple[nn.Parameter, torch.Tensor]] = ()


_visitor = _Visitor()


class _OneAtATime(ModelHook):  # accelerate has no annotations; its hooks are made by inheritance
    """Before its part runs, the part that ran before goes back to host memory.

    accelerate's own `CpuOffload` sends away one fixed predecessor. Here rows join and end at any step, so any part may
    follow any other. Nothing is copied back: weights do not change, so those at home are taken up again, and stay
    shared with the models that share them.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if _visitor.part is not module:
            # Forwards run in inference mode; weights made there could not be moved again outside it.
            with torch.inference_mode(False), torch.no_grad():
                for weight, at_home in _visitor.home:
                    weight.data = at_home
                if self._device.type == "cuda":
                    torch.cuda.empty_cache()
                _visitor.home = [(weight, weight.data.cpu()) for weight in module.parameters()]
                module.to(self._device)
            _visitor.part = module
        return send_to_device(args, self._device), send_to_device(kwargs, self._device)
