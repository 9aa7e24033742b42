"""Spatial transformers without a copy at their end, where their output convolution reads a view."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import Transformer2DModel


class FrameTransformer(Transformer2DModel):
    """diffusers' transformer over the same parameters."""

    @staticmethod
    def suits(module: Any) -> bool:
        """Whether the module is of the kind that Stable Diffusion 1.5 has."""
        plain = type(module) is Transformer2DModel
        return bool(plain and module.is_input_continuous and not module.use_linear_projection)

    def _get_output_for_continuous_inputs(
        self,
        hidden_states: torch.Tensor,
        residual: torch.Tensor,
        batch_size: int,
        height: int,
        width: int,
        inner_dim: int,
    ) -> torch.Tensor:
        pictures = hidden_states.reshape(batch_size, height, width, inner_dim).permute(0, 3, 1, 2)
        return self.proj_out(pictures) + residual
