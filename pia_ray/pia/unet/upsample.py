"""Nearest-neighbour doubling and its 3x3 convolution as one transposed convolution: 4/9 of the multiplications.

Each output pixel of the pair reads a 3x3 window of doubled pixels, of which only 2x2 are distinct.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.upsampling import Upsample2D
from torch.nn import functional as F


def subpixel_weight(weight: torch.Tensor) -> torch.Tensor:
    """Weight of the transposed convolution (kernel 4, stride 2, padding 1) that equals doubling, then a 3x3 one.

    [O, I, 3, 3] -> [I, O, 4, 4] in the same precision; its taps are sums, made in float32.
    """
    source = weight.float()
    taps = source.new_zeros(source.shape[1], source.shape[0], 4, 4)
    for row, column in ((row, column) for row in range(3) for column in range(3)):
        # Doubled pixel 2i + parity + offset comes from input pixel i + (parity + offset) // 2, where offset is the
        # tap's, -1 to 1. A transposed convolution writes input j, tap k, to output 2j - 1 + k.
        for parity_y, parity_x in ((0, 0), (0, 1), (1, 0), (1, 1)):
            tap_y = parity_y + 1 - 2 * ((parity_y + row - 1) // 2)
            tap_x = parity_x + 1 - 2 * ((parity_x + column - 1) // 2)
            taps[:, :, tap_y, tap_x] += source[:, :, row, column].t()
    return taps.to(weight.dtype)


class SubpixelUpsample(Upsample2D):
    """diffusers' Upsample2D over the same parameters, by one transposed convolution where it doubles exactly."""

    subpixel: torch.Tensor

    @staticmethod
    def suits(module: torch.nn.Module) -> bool:
        """Whether the module is a doubling with a 3x3 convolution and nothing else."""
        return bool(
            type(module) is Upsample2D
            and module.use_conv
            and not module.use_conv_transpose
            and module.interpolate
            and module.norm is None
            and module.name == "conv"
            and module.conv.kernel_size == (3, 3)
            and module.conv.padding == (1, 1)
        )

    def refresh(self) -> None:
        """Computes the weight from the convolution's, if that is another tensor than at the last call."""
        weight = self.conv.weight.detach()
        if (weight.data_ptr(), weight.dtype) != getattr(self, "made_of", None):
            made = subpixel_weight(weight).to(memory_format=torch.channels_last)
            self.register_buffer("subpixel", made, persistent=False)
            self.made_of = (weight.data_ptr(), weight.dtype)

    def forward(
        self, hidden_states: torch.Tensor, output_size: Any | None = None, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """[N, C, h, w] -> [N, C', 2h, 2w]; an `output_size` that is no doubling is made as diffusers does."""
        height, width = hidden_states.shape[-2:]
        if output_size is not None and tuple(output_size) != (2 * height, 2 * width):
            return super().forward(hidden_states, output_size, *args, **kwargs)
        return F.conv_transpose2d(hidden_states, self.subpixel, self.conv.bias, stride=2, padding=1)
