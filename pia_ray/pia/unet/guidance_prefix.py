"""What the sides of guidance have in common is computed once: the layers before text first enters the UNet.

Both halves of classifier-free guidance see the same noisy latents, mask and picture. They part at the first
cross-attention; conv_in, the first ResNet block and the first self-attention come before it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_motion_model import CrossAttnDownBlockMotion, UNetMotionModel
from torch import nn


class Prefix:
    """Which entries of the coming forwards are equal up to the first cross-attention.

    The first `num` of a forward's entries are those that differ; `spread` tells for every entry which of them it
    equals. Nothing is shared while `spread` is None, which it is outside of `shared`.
    """

    def __init__(self) -> None:
        self.num = 0
        self.num_frames = 1
        self.spread: torch.Tensor | None = None

    @contextmanager
    def shared(self, *, num: int, num_frames: int, spread: torch.Tensor) -> Iterator[None]:
        """Says so for the forwards within. `spread` is int64 [N] on the model's device."""
        self.num, self.num_frames, self.spread = num, num_frames, spread
        try:
            yield
        finally:
            self.spread = None

    def head(self, values: torch.Tensor) -> torch.Tensor:
        """The entries that differ: a view of values [N*T, ...]."""
        return values if self.spread is None else values[: self.num * self.num_frames]

    def all(self, values: torch.Tensor) -> torch.Tensor:
        """Every entry from those that differ: [num*T, ...] -> [N*T, ...]."""
        if self.spread is None:
            return values
        videos = values.unflatten(0, (self.num, self.num_frames))
        return videos.index_select(0, self.spread).flatten(0, 1)


class SharedConv(nn.Conv2d):
    """conv_in, over the same parameters."""

    prefix: Prefix

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - torch's own name
        """[N*T, 9, h, w] -> [N*T, C, h, w]."""
        return self.prefix.all(super().forward(self.prefix.head(input)))


class SharedResnet(ResnetBlock2D):
    """The first ResNet block, over the same parameters."""

    prefix: Prefix

    def forward(self, input_tensor: torch.Tensor, temb: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """[N*T, C, h, w] -> the same shape; `temb` is [N*T, D]."""
        head = self.prefix.head
        return self.prefix.all(super().forward(head(input_tensor), head(temb), *args, **kwargs))


class SharedAttention(Attention):
    """The first self-attention, over the same parameters."""

    prefix: Prefix

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """[N*T, S, C] -> the same shape."""
        return self.prefix.all(super().forward(self.prefix.head(hidden_states), *args, **kwargs))


def share_prefix(unet: UNetMotionModel) -> Prefix | None:
    """Makes the UNet's first layers ask the returned `Prefix` what is shared; None where it has no such layers."""
    first = unet.down_blocks[0]
    if not isinstance(first, CrossAttnDownBlockMotion):
        return None
    block = first.attentions[0].transformer_blocks[0]
    places = (
        (unet.conv_in, nn.Conv2d, SharedConv),
        (first.resnets[0], ResnetBlock2D, SharedResnet),
        (block.attn1, Attention, SharedAttention),
    )
    if block.only_cross_attention or any(type(module) not in (kind, ours) for module, kind, ours in places):
        return None
    prefix = Prefix()
    for module, _, kind in places:
        module.__class__ = kind
        module.prefix = prefix
    return prefix
