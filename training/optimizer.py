"""Muon for matrices and convolutions, AdamW for the rest, as one optimizer with one learning rate.

Source: Muon, Jordan et al. 2024; its Newton-Schulz coefficients are public figures.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any, Final

import torch

ADAM_ONLY: Final = ("embed", "conv_in", "conv_out", "position")
"""Parts of names whose parameters are no maps between hidden features: tables, first and last convolutions."""

NEWTON_SCHULZ: Final = (3.4445, -4.7750, 2.0315)


class Optimizer:
    """Steps all named parameters; updates of both kinds have about the same size at the same learning rate."""

    def __init__(self, named: Iterable[tuple[str, torch.nn.Parameter]], *, momentum: float = 0.95) -> None:
        self.momentum = momentum
        groups: dict[tuple[int, int], list[torch.nn.Parameter]] = defaultdict(list)
        rest = []
        for name, parameter in named:
            rows, columns = parameter.shape[0], parameter[0].numel()
            if parameter.ndim >= 2 and min(rows, columns) >= 8 and not any(part in name for part in ADAM_ONLY):
                groups[rows, columns].append(parameter)
            else:
                rest.append(parameter)
        # One stack per shape: a hundred small matrix products become a dozen batched ones.
        self.groups = list(groups.items())
        self.buffers = [torch.zeros(len(group), *shape, device=group[0].device) for shape, group in self.groups]
        self.adam = torch.optim.AdamW(rest, betas=(0.9, 0.98), weight_decay=0.0)

    def zero_grad(self) -> None:
        """Drops all gradients."""
        self.adam.zero_grad(set_to_none=True)
        for _, group in self.groups:
            for parameter in group:
                parameter.grad = None

    @torch.no_grad()
    def step(self, rate: float, *, decay: float = 0.01) -> None:
        """One update at the learning rate `rate`. Parameters without a gradient count as having one of zero."""
        for settings in self.adam.param_groups:
            settings["lr"] = rate
        self.adam.step()
        for (shape, group), buffer in zip(self.groups, self.buffers, strict=True):
            gradient = torch.stack([_gradient(parameter).reshape(shape) for parameter in group])
            buffer.lerp_(gradient, 1 - self.momentum)
            update = orthogonal(gradient.lerp(buffer, self.momentum))
            scale = rate * 0.2 * math.sqrt(max(shape))  # the size of an Adam update
            for parameter, change in zip(group, update, strict=True):
                parameter.mul_(1 - rate * decay).add_(change.reshape(parameter.shape), alpha=-scale)

    def state(self) -> dict[str, Any]:
        """What `restore` needs to go on from here."""
        return {"buffers": self.buffers, "adam": self.adam.state_dict()}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on where `state` was taken."""
        for buffer, saved in zip(self.buffers, state["buffers"], strict=True):
            buffer.copy_(saved)
        self.adam.load_state_dict(state["adam"])


def orthogonal(matrices: torch.Tensor) -> torch.Tensor:
    """Matrices [n, r, c] with their singular values pushed towards 1, by five Newton-Schulz steps."""
    first, third, fifth = NEWTON_SCHULZ
    x = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    for _ in range(5):
        square = x @ x.mT
        x = first * x + torch.baddbmm(third * square, square, square, alpha=fifth) @ x
    return x.mT if tall else x


def _gradient(parameter: torch.nn.Parameter) -> torch.Tensor:
    return parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
