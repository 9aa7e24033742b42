"""The gated feed-forward layers on a CPU: both halves of the projection apart, where that is faster.

diffusers projects to twice the width, cuts the result in two, and runs GELU and the multiplication over it: four passes
over memory. oneDNN computes GELU and the multiplication while it writes the products: two passes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch
from diffusers.models.activations import GEGLU
from torch import nn

from pia_ray.pia.unet.choices import DEFAULT, Choices, Way, size_class, timed_share

LEAST_FLOP: Final = 2_000_000
"""Layers with fewer operations run by default."""

FUSED: Final = "fused"


class ChosenGEGLU(GEGLU):
    """diffusers' gated projection over the same parameters, by the faster way."""

    choices: Choices

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """[..., I] -> [..., O]."""
        inputs, outputs = self.proj.in_features, self.proj.out_features
        flop = 2 * hidden_states.numel() * outputs
        elsewhere = hidden_states.device.type != "cpu" or torch.is_grad_enabled()
        if flop < LEAST_FLOP or elsewhere or torch.compiler.is_dynamo_compiling():
            return super().forward(hidden_states, *args, **kwargs)
        rows = hidden_states.numel() // inputs
        kind = ("gated linear", size_class(rows), inputs, outputs, hidden_states.dtype)
        if self.choices.choose(kind, lambda: self._ways(hidden_states.reshape(rows, -1), flop)) == FUSED:
            return _fused(hidden_states, self.proj)
        return super().forward(hidden_states, *args, **kwargs)

    def _ways(self, states: torch.Tensor, flop: int) -> Mapping[str, Way]:
        share = timed_share(flop, num_weights=self.proj.weight.numel())
        few = states[: max(1, int(len(states) * share))]
        return {DEFAULT: lambda: GEGLU.forward(self, few), FUSED: lambda: _fused(few, self.proj)}


def choose_gates(model: nn.Module, choices: Choices) -> None:
    """Rewrites a model's gated projections to run by the faster way; where torch has no oneDNN, none."""
    if not torch.backends.mkldnn.is_available():
        return
    for module in model.modules():
        if type(module) is GEGLU and isinstance(module.proj, nn.Linear) and module.proj.bias is not None:
            module.__class__ = ChosenGEGLU
            module.choices = choices  # type: ignore[assignment]


def _fused(states: torch.Tensor, layer: nn.Linear) -> torch.Tensor:
    operator: Any = torch.ops.mkldnn._linear_pointwise
    half = layer.out_features // 2
    gate = operator(states, layer.weight[half:], layer.bias[half:], "gelu", [], "none")
    return operator.binary(states, gate, layer.weight[:half], layer.bias[:half], "mul")
