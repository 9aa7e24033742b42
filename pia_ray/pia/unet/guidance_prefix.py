"""The layers before the first cross-attention, run once for all branches of guidance.

Both branches of classifier-free guidance have the same noisy latents, mask and picture. They differ from the first
cross-attention on; conv_in, the first ResNet block and the first self-attention come before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.unets.unet_motion_model import CrossAttnDownBlockMotion, UNetMotionModel
from torch import nn

from pia_ray.pia.unet.resnets import PlainResnet


class Beginning(NamedTuple):
    """The outputs of the layers of a forward's beginning, of all entries, in layouts that depend on its size alone."""

    conv: torch.Tensor
    """[N*T, C, h, w]"""
    resnet: torch.Tensor
    attention: torch.Tensor
    """[N*T, S, C]"""


class Prefix:
    """The entries of a forward that are equal up to the first cross-attention.

    The first `num` entries are distinct; `inverse` is for every entry the index of its equal among them, as in
    torch.unique. Nothing is shared while `inverse` is None, which it is outside of `shared`.
    """

    def __init__(self) -> None:
        self.num = 0
        self.num_frames = 1
        self.inverse: torch.Tensor | None = None
        self.beginning: Beginning | None = None
        """The layers give it in place of computing it."""
        self._recorded: list[torch.Tensor] | None = None

    @contextmanager
    def shared(self, *, num: int, num_frames: int, inverse: torch.Tensor) -> Iterator[None]:
        """Shares the prefix in the forwards of the context. `inverse` is int64 [N] on the model's device."""
        self.num, self.num_frames, self.inverse = num, num_frames, inverse
        try:
            yield
        finally:
            self.inverse = None

    def begin(self, run: Callable[[], object]) -> Beginning:
        """The beginning of the forward that `run` runs, which ends before the first cross-attention."""
        made: list[torch.Tensor] = []
        self._recorded = made
        try:
            run()
        except _Begun:
            return Beginning(*made)
        finally:
            self._recorded = None
        raise AssertionError("the forward has passed its first self-attention")

    @contextmanager
    def begun(self, beginning: Beginning) -> Iterator[None]:
        """Forwards of the context begin with it, whatever `shared` says."""
        self.beginning = beginning
        try:
            yield
        finally:
            self.beginning = None

    def record(self, output: torch.Tensor) -> torch.Tensor:
        """Keeps the output of one layer of the beginning while `begin` runs; returns it."""
        if self._recorded is not None:
            layout = torch.channels_last if output.dim() == 4 else torch.contiguous_format
            output = output.contiguous(memory_format=layout)
            self._recorded.append(output)
        return output

    def end(self) -> None:
        """Ends the forward that `begin` runs, and no other."""
        if self._recorded is not None:
            raise _Begun

    def distinct(self, values: torch.Tensor) -> torch.Tensor:
        """The distinct entries, [num*T, ...]: a view of values [N*T, ...]."""
        return values if self.inverse is None else values[: self.num * self.num_frames]

    def expand(self, values: torch.Tensor) -> torch.Tensor:
        """All entries from the distinct ones: [num*T, ...] -> [N*T, ...]."""
        if self.inverse is None:
            return values
        videos = values.unflatten(0, (self.num, self.num_frames))
        return videos.index_select(0, self.inverse).flatten(0, 1)


class _Begun(Exception):
    """The beginning of a forward has been computed."""


class SharedConv(nn.Conv2d):
    """conv_in, over the same parameters."""

    prefix: Prefix

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - torch's own name
        """[N*T, 9, h, w] -> [N*T, C, h, w]."""
        if self.prefix.beginning is not None:
            return self.prefix.beginning.conv
        return self.prefix.record(self.prefix.expand(super().forward(self.prefix.distinct(input))))


class SharedResnet(PlainResnet):
    """The first ResNet block, over the same parameters."""

    prefix: Prefix

    def forward(self, input_tensor: torch.Tensor, temb: torch.Tensor | None, *_: Any, **__: Any) -> torch.Tensor:
        """[N*T, C, h, w] -> the same shape; `temb` is [N*T, D]."""
        if self.prefix.beginning is not None:
            return self.prefix.beginning.resnet
        assert temb is not None
        distinct = self.prefix.distinct
        return self.prefix.record(self.prefix.expand(super().forward(distinct(input_tensor), distinct(temb))))


class SharedAttention(Attention):
    """The first self-attention, over the same parameters."""

    prefix: Prefix

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """[N*T, S, C] -> the same shape."""
        if self.prefix.beginning is not None:
            # Later layers write over it. In compiled code the copy is a part of their sum.
            return self.prefix.beginning.attention.clone()
        made = self.prefix.expand(super().forward(self.prefix.distinct(hidden_states), *args, **kwargs))
        self.prefix.record(made)
        self.prefix.end()
        return made


def prefix_of(unet: nn.Module) -> Prefix | None:
    """The `Prefix` of a UNet that has been rewritten; None where none is shared."""
    return getattr(unet.conv_in, "prefix", None)


def share_prefix(unet: UNetMotionModel) -> Prefix | None:
    """Rewrites the UNet's first layers to share what the returned `Prefix` says; None where they have another
    structure.

    A UNet that has been rewritten keeps its `Prefix`, because other callers hold it; a deep copy has a copy of its own.
    """
    if isinstance(unet.conv_in, SharedConv):
        return unet.conv_in.prefix
    first = unet.down_blocks[0]
    if not isinstance(first, CrossAttnDownBlockMotion):
        return None
    block = first.attentions[0].transformer_blocks[0]
    layers = (
        (unet.conv_in, nn.Conv2d, SharedConv),
        (first.resnets[0], PlainResnet, SharedResnet),
        (block.attn1, Attention, SharedAttention),
    )
    if block.only_cross_attention or any(type(module) is not kind for module, kind, _ in layers):
        return None
    prefix = Prefix()
    for module, _, kind in layers:
        module.__class__ = kind
        module.prefix = prefix
    return prefix
