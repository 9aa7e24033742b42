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

from pia_ray.pia.unet.choices import DEFAULT, Choices, Way, size_class, timed_share

LEAST_FLOP: Final = 2_000_000
"""Products with fewer operations run by default: what they could gain is lost in the call."""

ONEDNN: Final = "oneDNN"


class ChosenLinear(nn.Linear):
    """A linear layer over the same parameters, by the faster library."""

    choices: Choices

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - torch's own name
        """[..., I] -> [..., O]."""
        return product(input, self)


def product(states: torch.Tensor, layer: nn.Linear | nn.Conv2d) -> torch.Tensor:
    """The output of a linear layer, or of a 1x1 convolution, for each row: [..., I] -> [..., O].

    By the faster library, where the layer has choices.
    """
    weight, bias = layer.weight.flatten(1), layer.bias
    outputs, inputs = weight.shape
    flop = 2 * states.numel() * outputs
    choices: Choices | None = getattr(layer, "choices", None)
    if choices is None or flop < LEAST_FLOP or torch.compiler.is_dynamo_compiling():
        return F.linear(states, weight, bias)
    rows = states.numel() // inputs

    def ways() -> Mapping[str, Way]:
        share = timed_share(flop, num_weights=weight.numel())
        few = states.reshape(rows, -1)[: max(1, int(rows * share))]
        return {DEFAULT: lambda: F.linear(few, weight, bias), ONEDNN: lambda: _by_onednn(few, weight, bias)}

    if choices.choose(("linear", size_class(rows), inputs, outputs, states.dtype), ways) == ONEDNN:
        return _by_onednn(states, weight, bias)
    return F.linear(states, weight, bias)


def choose_libraries(model: nn.Module, choices: Choices) -> None:
    """Rewrites a model's linear layers to run by the faster library; where torch has no oneDNN, none."""
    if not torch.backends.mkldnn.is_available():
        return
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = ChosenLinear
            module.choices = choices  # type: ignore[assignment]


def _by_onednn(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    operator: Any = torch.ops.mkldnn._linear_pointwise
    return operator(states, weight, bias, "none", [], "")
