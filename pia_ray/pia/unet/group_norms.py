"""GroupNorm on a GPU that leaves channels-last pictures channels-last, by the way that is fastest there.

torch 2.13 has no such kernel on CUDA: it copies the picture to contiguous memory and answers in it, and the next
convolution copies it back. tests/pia/unet/test_copies.py counts the copies.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import torch
from torch import nn
from torch.nn import functional as F

from pia_ray.pia.unet.choices import DEFAULT, Choices, Way, size_class

SUMS: Final = "sums"
"""Sums of each channel, then one operator that scales and shifts: 8 bytes of memory a float16 value; DEFAULT has 14."""

TRITON: Final = "Triton"

TIMED_VALUES: Final = 2**26
"""Larger calls are timed with fewer pictures, so that a decode that fills the memory has room for its timing."""


class ChosenGroupNorm(nn.GroupNorm):
    """A GroupNorm over the same parameters, by the fastest way; torch's where it is traced or differentiated."""

    choices: Choices | None = None
    """None: torch's way always."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - torch's own name
        """[N, C, h, w] -> the same shape."""
        if (
            self.choices is None
            or torch.compiler.is_dynamo_compiling()
            or torch.is_grad_enabled()
            or not is_channels_last(input)
        ):
            return super().forward(input)
        kind = ("group norm", size_class(len(input)), *input.shape[1:], self.num_groups, input.dtype)
        way = self.choices.choose(kind, lambda: self._ways(input))
        if way == DEFAULT:
            return super().forward(input)
        return by_sums(input, self) if way == SUMS else by_triton(input, self)

    def _ways(self, pictures: torch.Tensor) -> Mapping[str, Way]:
        few = pictures[: max(1, TIMED_VALUES // pictures[0].numel())]

        def as_torch() -> object:
            normal = F.group_norm(few, self.num_groups, self.weight, self.bias, self.eps)
            return normal.contiguous(memory_format=torch.channels_last)  # as the next convolution does

        return {
            DEFAULT: as_torch,
            SUMS: lambda: by_sums(few, self),
            TRITON: lambda: by_triton(few, self),
        }


def choose_group_norms(model: nn.Module, choices: Choices) -> None:
    """Rewrites a model's GroupNorms to run by the fastest way."""
    for module in model.modules():
        if type(module) is nn.GroupNorm and module.affine:
            module.__class__ = ChosenGroupNorm
        if isinstance(module, ChosenGroupNorm):
            module.choices = choices


def by_sums(pictures: torch.Tensor, norm: nn.GroupNorm) -> torch.Tensor:
    """The norm of channels-last pictures [N, C, h, w], by torch's operators; statistics are float32."""
    num, channels, height, width = pictures.shape
    groups, positions = norm.num_groups, height * width
    near = pictures.permute(0, 2, 3, 1).view(num, positions, channels)
    if pictures.dtype == torch.float32:
        spread, mean = torch.var_mean(near, 1, correction=0)  # [N, C]
    else:  # torch.var_mean would round both to the precision of the pictures
        mean = near.sum(1, dtype=torch.float32) / positions
        squares = torch.linalg.vector_norm(near, 2, 1, dtype=torch.float32).square() / positions
        spread = torch.addcmul(squares, mean, mean, value=-1)
    mean, spread = mean.view(num, groups, -1), spread.view(num, groups, -1)
    total, middle = torch.var_mean(mean, 2, correction=0, keepdim=True)  # [N, G, 1]
    scale = torch.rsqrt(total + spread.mean(2, keepdim=True) + norm.eps)
    factor = scale * norm.weight.view(groups, -1)  # [N, G, C/G], float32
    shift = torch.addcmul(norm.bias.view(groups, -1).float(), middle, factor, value=-1)
    normal = torch.empty_like(near)
    torch.addcmul(shift.view(num, 1, channels), near, factor.view(num, 1, channels), out=normal)
    return normal.view(num, height, width, channels).permute(0, 3, 1, 2)


def by_triton(pictures: torch.Tensor, norm: nn.GroupNorm) -> torch.Tensor:
    """The norm of channels-last pictures [N, C, h, w], by kernels of ours; statistics are float32.

    Raises:
        RuntimeError: they cannot run here.
    """
    try:
        from pia_ray.pia.unet.group_norm_kernel import group_norm

        return group_norm(pictures, groups=norm.num_groups, weight=norm.weight, bias=norm.bias, eps=norm.eps)
    except RuntimeError:
        raise
    except Exception as error:  # Triton's own errors and those of the compiler that it starts have no other base
        raise RuntimeError(f"Triton cannot run here: {error}") from error


def is_channels_last(pictures: torch.Tensor) -> bool:
    """Whether these are pictures [N, C, h, w] in that layout."""
    return pictures.dim() == 4 and pictures.is_contiguous(memory_format=torch.channels_last)
