"""Linear layers on a CPU, by the faster of torch's two libraries of matrix products.

torch gives float32 products to MKL, which is made for Intel's processors; oneDNN computes them from the same weights.
On a 2-core AMD EPYC (AVX-512, torch 2.13) oneDNN did 120 to 250 GFLOP in a CPU second where MKL did 75 to 90.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import nn
from torch.nn import functional as F

from pia_ray.pia.unet.choices import DEFAULT, Choices, Way, size_class

LEAST_FLOP: Final = 2_000_000
"""Products with fewer operations run by default: what they could gain is lost in the call."""

TIMED_FLOP: Final = 1_000_000_000
"""Larger products are timed with fewer rows, at most this many operations."""

ONEDNN: Final = "oneDNN"


class ChosenLinear(nn.Linear):
    """A linear layer over the same parameters, by the faster library."""

    choices: Choices

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - torch's own name
        """[..., I] -> [..., O]."""
        flop = 2 * input.numel() * self.out_features
        if flop < LEAST_FLOP or torch.compiler.is_compiling():
            return F.linear(input, self.weight, self.bias)
        rows = input.numel() // self.in_features
        kind = ("linear", size_class(rows), self.in_features, self.out_features, input.dtype)
        if self.choices.choose(kind, lambda: self._ways(input.reshape(rows, -1), flop)) == ONEDNN:
            return _by_onednn(input, self)
        return F.linear(input, self.weight, self.bias)

    def _ways(self, states: torch.Tensor, flop: int) -> Mapping[str, Way]:
        few = states[: max(1, len(states) * TIMED_FLOP // max(flop, TIMED_FLOP))]
        return {DEFAULT: lambda: F.linear(few, self.weight, self.bias), ONEDNN: lambda: _by_onednn(few, self)}


def choose_libraries(model: nn.Module, choices: Choices) -> None:
    """Rewrites a model's linear layers to run by the faster library; where torch has no oneDNN, none."""
    if not torch.backends.mkldnn.is_available():
        return
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = ChosenLinear
            module.choices = choices  # type: ignore[assignment]


def _by_onednn(states: torch.Tensor, layer: nn.Linear) -> torch.Tensor:
    operator: Any = torch.ops.mkldnn._linear_pointwise
    return operator(states, layer.weight, layer.bias, "none", [], "")
