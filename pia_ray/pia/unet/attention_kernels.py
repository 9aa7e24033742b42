"""The fastest of torch's attention kernels for the self-attention of each shape, found by timing them.

Stable Diffusion 1.5 has heads of 40 channels, for which no kernel is made; attention over 16 frames fills a small part
of a flash kernel's tile; and torch's own order of preference ignores sizes. All kernels compute the same to float
tolerance.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, Protocol

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from pia_ray.pia.device.errors import device_is_lost

log = logging.getLogger(__name__)

LEAST_GAIN: Final = 0.05
"""A kernel replaces torch's own choice only if it takes this share less time."""

SAMPLES: Final = 5

KERNELS: Final = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)

FEW_POSITIONS: Final = 32
"""Sequences up to this length are tried as plain batched products too; longer ones would need much memory for that."""

Shape = tuple[int, ...]
"""[N*T, heads, S, d] of the queries."""

Time = Callable[[torch.Tensor, SDPBackend | None], float]
"""The seconds of self-attention over such a tensor by a kernel (None: torch's choice).

Raises RuntimeError where the kernel cannot run it.
"""


class AttentionWays(Protocol):
    """Attention by one of several ways that compute the same."""

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Attention of queries [N, heads, S, d] to keys and values [N, heads, L, d]: [N, heads, S, d]."""


class Kernels:
    """The kernel for each shape, for all self-attentions of a UNet and of its copies.

    Shapes are timed only within `choosing`; shapes that have not been timed run with torch's own choice.
    """

    def __init__(self, time: Time | None = None) -> None:
        self._time = time or seconds_on_gpu
        self._chosen: dict[tuple[Shape, torch.dtype], str] = {}
        self._choosing = False

    def __deepcopy__(self, memo: object) -> Kernels:
        return self  # the timings are the device's, not the model's

    @contextmanager
    def choosing(self) -> Iterator[None]:
        """A context that times the kernels for each shape that occurs in it, once; it waits for the device."""
        self._choosing = True
        try:
            yield
        finally:
            self._choosing = False

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Attention by the kernel for its shape."""
        if not torch.compiler.is_dynamo_compiling() and self._choosing and not self.name_of(query.shape, query.dtype):
            fastest = self._fastest(query)
            self._chosen[tuple(query.shape), query.dtype] = "default" if fastest is None else fastest.name
        name = self.name_of(tuple(query.shape), query.dtype)
        if name in ("", "default"):
            return F.scaled_dot_product_attention(query, key, value)
        with sdpa_kernel(SDPBackend.__members__[name]):
            return F.scaled_dot_product_attention(query, key, value)

    # Without this decorator, code would be compiled again whenever another shape has been timed.
    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
    def name_of(self, shape: Shape, dtype: torch.dtype) -> str:
        """The name of the kernel, "default" for torch's own choice, or "" where the shape has not been timed."""
        return self._chosen.get((tuple(shape), dtype), "")

    def _fastest(self, query: torch.Tensor) -> SDPBackend | None:
        best, best_s = None, self._time(query, None) * (1 - LEAST_GAIN)
        plain = (SDPBackend.MATH,) if query.shape[2] <= FEW_POSITIONS else ()
        for kernel in (*KERNELS, *plain):
            try:
                seconds = self._time(query, kernel)
            except RuntimeError as error:
                if device_is_lost(error):
                    raise
                continue  # this kernel cannot run it here
            if seconds < best_s:
                best, best_s = kernel, seconds
        log.info("self-attention of %s: %s", list(query.shape), "as torch chooses" if best is None else best.name)
        return best


class SelfAttention(torch.nn.Module):
    """The processor of one spatial self-attention: as diffusers' own, with the kernel for the shape."""

    def __init__(self, kernels: AttentionWays) -> None:
        super().__init__()
        self.kernels = kernels

    def forward(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[N*T, S, C] -> the same shape."""
        rows, positions, _ = hidden_states.shape
        query, key, value = (
            project(hidden_states).view(rows, positions, attn.heads, -1).transpose(1, 2)
            for project in (attn.to_q, attn.to_k, attn.to_v)
        )
        mixed = self.kernels.attend(query, key, value).transpose(1, 2).reshape(rows, positions, -1)
        return attn.to_out[0](mixed)


def choose_kernels(unet: torch.nn.Module, time: Time | None = None) -> Kernels:
    """Rewrites the UNet's spatial self-attentions of Stable Diffusion's kind to run by the kernels that it returns."""
    for module in unet.modules():
        if isinstance(module, SelfAttention) and isinstance(module.kernels, Kernels):
            return module.kernels
    kernels = Kernels(time)
    attend_by(unet, kernels)
    return kernels


def attend_by(unet: torch.nn.Module, ways: AttentionWays) -> None:
    """Rewrites the UNet's spatial self-attentions of Stable Diffusion's kind to run by these ways."""
    for name, module in unet.named_modules():
        spatial = name.endswith("attn1") and "motion_modules" not in name
        if spatial and isinstance(module, Attention) and _is_plain(module):
            module.set_processor(SelfAttention(ways))


def chosen_kernels(unet: torch.nn.Module) -> dict[str, str]:
    """The kernels that were found, by shape of the queries and precision; empty where none was timed."""
    for module in unet.modules():
        if isinstance(module, SelfAttention) and isinstance(module.kernels, Kernels):
            chosen = module.kernels._chosen.items()
            return {
                f"{' x '.join(map(str, shape))} {str(dtype).removeprefix('torch.')}": name
                for (shape, dtype), name in chosen
            }
    return {}


def seconds_on_gpu(query: torch.Tensor, kernel: SDPBackend | None) -> float:
    """Median seconds of self-attention over a tensor of this shape on its GPU.

    Raises:
        RuntimeError: the kernel cannot run it.
    """
    values = torch.randn_like(query)
    seconds = []
    for sample in range(SAMPLES + 1):
        started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        started.record()
        if kernel is None:
            F.scaled_dot_product_attention(values, values, values)
        else:
            with sdpa_kernel(kernel):
                F.scaled_dot_product_attention(values, values, values)
        ended.record()
        ended.synchronize()
        if sample:  # the first one loads the kernel
            seconds.append(started.elapsed_time(ended) / 1000)
    return statistics.median(seconds)


def _is_plain(attention: Attention) -> bool:
    return (
        isinstance(attention.processor, AttnProcessor2_0)
        and not attention.is_cross_attention
        and attention.spatial_norm is None
        and attention.group_norm is None
        and attention.norm_q is None
        and attention.norm_k is None
        and not attention.residual_connection
        and attention.rescale_output_factor == 1
        and attention.scale_qk
    )
