"""Convolutions on a CPU, by weights in the order that oneDNN's kernels read where that is faster.

torch gives oneDNN the plain weights, which it reorders in each call: half of the time of Stable Diffusion 1.5's
deepest layers at 128 x 128 px. A copy in its own order costs the memory of the weights once more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final
from weakref import WeakSet

import torch
from torch import nn
from torch.nn import functional as F

from pia_ray.pia.device.memory import available_bytes
from pia_ray.pia.unet.choices import DEFAULT, Choices, Way, sample_of, size_class, timed_share

LEAST_FLOP: Final = 100_000_000
"""Convolutions with fewer operations run by default."""

MOST_POSITIONS: Final = 8192
"""Output pixels of all pictures up to which a large weight may be packed: beyond, its reordering is below 5 %."""

LARGE_WEIGHT: Final = 1_000_000
"""Values; copies of smaller weights cost no memory to speak of."""

COPIES_SHARE: Final = 0.25
"""Share of the host's available memory that copies of weights may take in all."""

PACKED: Final = "packed"


class PackedWeight:
    """A copy of a weight in oneDNN's order, which modules with that weight share."""

    def __init__(self, source: torch.Tensor, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self.num_bytes = source.numel() * source.element_size()
        self._source = _identity(source)

    def __deepcopy__(self, memo: object) -> PackedWeight:
        return self  # copies of a model have its weights; one that replaces a weight finds that it is of another

    def is_of(self, source: torch.Tensor) -> bool:
        """Whether it is the copy of this tensor."""
        return self._source == _identity(source)


class Copies:
    """The packed weights of the process, and the memory that is left for more."""

    def __deepcopy__(self, memo: object) -> Copies:
        return self

    def __init__(self, available: Callable[[], int] = available_bytes) -> None:
        self._available = available
        self._alive: WeakSet[PackedWeight] = WeakSet()

    def has_room_for(self, weight: torch.Tensor) -> bool:
        """Whether one more copy keeps to `COPIES_SHARE`."""
        taken = sum(copy.num_bytes for copy in self._alive)
        new = weight.numel() * weight.element_size()
        return taken + new <= COPIES_SHARE * (self._available() + taken)

    def make(self, weight: torch.Tensor, pack: Callable[[torch.Tensor], torch.Tensor]) -> PackedWeight:
        """A copy of the weight, which counts as long as it is alive."""
        copy = PackedWeight(weight, pack(weight.detach()))
        self._alive.add(copy)
        return copy


COPIES: Final = Copies()


class ChosenConv(nn.Conv2d):
    """A convolution over the same parameters, by a packed copy of its weight where that is faster and there is room."""

    choices: Choices
    copies: Copies
    packed: PackedWeight | None = None

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - torch's own name
        """[N, I, h, w] -> [N, O, h', w']."""
        area = input.shape[-2] * input.shape[-1] // (self.stride[0] * self.stride[1])
        flop = 2 * len(input) * area * self.weight.numel()
        reorders = len(input) * area <= MOST_POSITIONS or self.weight.numel() < LARGE_WEIGHT
        if flop < LEAST_FLOP or not reorders or torch.compiler.is_dynamo_compiling():
            return super().forward(input)
        sizes = size_class(len(input)), *input.shape[1:], *self.weight.shape[:3], self.stride[0]
        kind = ("convolution", *sizes, input.dtype)
        if self.choices.choose(kind, lambda: self._ways(input, flop)) != PACKED:
            return super().forward(input)
        if self.packed is None or not self.packed.is_of(self.weight):
            if not self.copies.has_room_for(self.weight):
                return super().forward(input)
            self.packed = self.copies.make(self.weight, lambda weight: self._pack(weight, input))
        return self._run(input, self.packed.tensor)

    def _ways(self, pictures: torch.Tensor, flop: int) -> Mapping[str, Way]:
        few = sample_of(pictures, timed_share(flop, num_weights=self.weight.numel()))
        ways: dict[str, Way] = {DEFAULT: lambda: F.conv2d(few, self.weight, self.bias, self.stride, self.padding)}
        made: list[torch.Tensor] = []

        def packed() -> object:
            if not made:
                made.append(self._pack(self.weight.detach(), pictures))
            return self._run(few, made[0])

        if self.copies.has_room_for(self.weight):
            ways[PACKED] = packed
        return ways

    def _pack(self, weight: torch.Tensor, pictures: torch.Tensor) -> torch.Tensor:
        reorder: Any = torch._C._nn.mkldnn_reorder_conv2d_weight
        dense = weight.contiguous().to_mkldnn()
        return reorder(dense, self.padding, self.stride, self.dilation, 1, pictures.shape)

    def _run(self, pictures: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        operator: Any = torch.ops.mkldnn._convolution_pointwise
        near = pictures.contiguous(memory_format=torch.channels_last)
        sizes = self.padding, self.stride, self.dilation
        return operator(near, weight, self.bias, *sizes, 1, "none", [], "")


def choose_weights(model: nn.Module, choices: Choices, copies: Copies) -> None:
    """Rewrites a model's plain convolutions to run by packed weights where that pays."""
    if not torch.backends.mkldnn.is_available():
        return
    for module in model.modules():
        if (
            type(module) is nn.Conv2d
            and module.groups == 1
            and module.dilation == (1, 1)
            and module.padding_mode == "zeros"
            and isinstance(module.padding, tuple)
        ):
            module.__class__ = ChosenConv
            module.choices, module.copies = choices, copies  # type: ignore[assignment]


def _identity(tensor: torch.Tensor) -> tuple[object, ...]:
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype
