"""Nearest-neighbour doubling and its 3x3 convolution as one transposed convolution: 4/9 of the multiplications.

Each output pixel of the pair reads a 3x3 window of doubled pixels, of which only 2x2 are distinct.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch
from diffusers.models.upsampling import Upsample2D
from torch.nn import functional as F

from pia_ray.pia.unet.choices import DEFAULT, Choices, Way, sample_of, size_class, timed_share
from pia_ray.pia.unet.convolutions import PACKED, Copies, PackedWeight

LEAST_FLOP: Final = 100_000_000
"""Up-samplings with fewer operations are transposed convolutions always."""

PLAIN: Final = "doubling and convolution"

_SUMS: Final = ((2,), (1, 2), (0, 1), (0,))
"""The taps of three whose sum is each tap of four, in one direction."""


def subpixel_weight(weight: torch.Tensor) -> torch.Tensor:
    """Weight of the transposed convolution (kernel 4, stride 2, padding 1) that equals doubling, then a 3x3 one.

    [O, I, 3, 3] -> [I, O, 4, 4] in the same precision; its taps are sums, made in float32.
    """
    # Doubled pixel 2i + parity + offset comes from input pixel i + (parity + offset) // 2, where offset is the tap's,
    # -1 to 1. A transposed convolution writes input j, tap k, to output 2j - 1 + k.
    outputs, inputs = weight.shape[:2]
    # Each tap is transposed by itself, which takes half the time of all at once.
    taps = [[weight[:, :, row, column].t().float().contiguous() for column in range(3)] for row in range(3)]
    made = taps[0][0].new_empty(inputs, 4, 4, outputs)
    for row, rows in enumerate(_SUMS):
        of_row = [_total([taps[each][column] for each in rows]) for column in range(3)]
        for column, columns in enumerate(_SUMS):
            _total([of_row[each] for each in columns], out=made[:, row, column])
    return made.permute(0, 3, 1, 2).to(weight.dtype)


def _total(taps: list[torch.Tensor], *, out: torch.Tensor | None = None) -> torch.Tensor:
    """The sum of one or two. A GPU may round the factors of a product to TF32."""
    if len(taps) == 2:
        return torch.add(*taps, out=out)
    return taps[0] if out is None else out.copy_(taps[0])


def make_transposed_weights(model: torch.nn.Module) -> None:
    """Makes the weights of a model's transposed convolutions, which are else made when they are first used."""
    for module in model.modules():
        if isinstance(module, SubpixelUpsample):
            module.transposed_weight()


class SubpixelUpsample(Upsample2D):
    """diffusers' Upsample2D over the same parameters, by one transposed convolution where it doubles exactly."""

    subpixel: torch.Tensor
    """The transposed convolution's weight, once it has been made."""
    choices: Choices | None = None
    """None: always the transposed convolution; else the form that is faster on the device."""
    copies: Copies | None = None
    """None: its weight is not copied."""
    packed: PackedWeight | None = None

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

    def transposed_weight(self) -> torch.Tensor:
        """The transposed convolution's weight, made where the convolution's is another than at the last call.

        Code that is compiled has the weight of that call.
        """
        if torch.compiler.is_dynamo_compiling():
            return self.subpixel
        weight = self.conv.weight.detach()
        if (weight.data_ptr(), weight.dtype) != getattr(self, "made_of", None):
            with torch.inference_mode(False), torch.no_grad():
                made = subpixel_weight(weight).to(memory_format=torch.channels_last)
            self.register_buffer("subpixel", made, persistent=False)
            self.made_of = (weight.data_ptr(), weight.dtype)
        return self.subpixel

    def forward(
        self, hidden_states: torch.Tensor, output_size: Any | None = None, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """[N, C, h, w] -> [N, C', 2h, 2w]; an `output_size` that is no doubling is made as diffusers does."""
        height, width = hidden_states.shape[-2:]
        if output_size is not None and tuple(output_size) != (2 * height, 2 * width):
            return super().forward(hidden_states, output_size, *args, **kwargs)
        way = DEFAULT
        flop = 2 * hidden_states.numel() * self.conv.out_channels * 16
        if self.choices is not None and flop >= LEAST_FLOP:
            sizes = size_class(len(hidden_states)), *hidden_states.shape[1:], self.conv.out_channels
            kind = ("up-sampling", *sizes, hidden_states.dtype)
            way = self.choices.choose(kind, lambda: self._ways(hidden_states, flop))
        if way == PLAIN:
            return super().forward(hidden_states, output_size, *args, **kwargs)
        if way == PACKED and self.copies is not None and not torch.compiler.is_dynamo_compiling():
            weight = self.transposed_weight()
            if self.packed is None or not self.packed.is_of(weight):
                if not self.copies.has_room_for(weight):
                    return self._transposed(hidden_states)
                self.packed = self.copies.make(weight, lambda weight: _pack(weight, hidden_states))
            return self._by_packed(hidden_states, self.packed.tensor)
        return self._transposed(hidden_states)

    def _ways(self, pictures: torch.Tensor, flop: int) -> Mapping[str, Way]:
        few = sample_of(pictures, timed_share(flop, num_weights=self.transposed_weight().numel()))
        ways: dict[str, Way] = {DEFAULT: lambda: self._transposed(few), PLAIN: lambda: Upsample2D.forward(self, few)}
        made: list[torch.Tensor] = []

        def packed() -> object:
            if not made:
                made.append(_pack(self.transposed_weight(), pictures))
            return self._by_packed(few, made[0])

        if self.copies is not None and self.copies.has_room_for(self.transposed_weight()):
            ways[PACKED] = packed
        return ways

    def _transposed(self, pictures: torch.Tensor) -> torch.Tensor:
        return F.conv_transpose2d(pictures, self.transposed_weight(), self.conv.bias, stride=2, padding=1)

    def _by_packed(self, pictures: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        operator: Any = torch.ops.mkldnn._convolution_transpose_pointwise
        near = pictures.contiguous(memory_format=torch.channels_last)
        sizes = [1, 1], [0, 0], [2, 2], [1, 1]
        return operator(near, weight, self.conv.bias, *sizes, 1, "none", [], "")


def _pack(weight: torch.Tensor, pictures: torch.Tensor) -> torch.Tensor:
    reorder: Any = torch.ops.mkldnn._reorder_convolution_transpose_weight
    return reorder(weight.contiguous(), [1, 1], [0, 0], [2, 2], [1, 1], 1, list(pictures.shape))
