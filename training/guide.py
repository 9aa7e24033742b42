"""Shows the UNet where each pixel of a frame comes from: extra losses on its upward self-attention.

A pixel of a frame is one of the picture, and training knows which. Left alone, so small a UNet moves pictures by its
convolutions and never learns positions, so that its self-attention stays unused and far motions blur. Here some
heads of every upward self-attention are asked to point at the pixel's source, and what goes in to know, by a linear
map, its own place and its source's. Nothing of this is in the exported model but the weights.

A source lies between four cells, and their average is blurred. So the four heads of the finest level's first attention
each fetch one of them: that of their own parity of column and row. A head's cell changes where its share is nothing.
"""

from __future__ import annotations

from typing import Any, Final

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from torch import nn

from training.motions import Videos, fields
from training.worlds import mesh

HEADS: Final = 2
"""Heads of each attention that point at sources; any others are free."""


class Pointing:
    """An attention processor that keeps what went in, and the log probabilities of the guided heads."""

    def __init__(self) -> None:
        self.seen = torch.empty(0)  # [N, S, C]
        self.logs = torch.empty(0)  # [N, heads, S, S]

    def __call__(self, attention: Attention, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """Self-attention [N, S, C] -> the same shape."""
        query, key, value = (
            linear(hidden_states).unflatten(-1, (attention.heads, -1)).transpose(1, 2)
            for linear in (attention.to_q, attention.to_k, attention.to_v)
        )
        logs = (query @ key.mT * attention.scale).log_softmax(-1)
        self.seen, self.logs = hidden_states, logs
        return torch.as_tensor(attention.to_out[0]((logs.exp() @ value).transpose(1, 2).flatten(2)))


class Guide:
    """The extra losses of one UNet in training."""

    def __init__(self, unet: Any) -> None:
        self.pointing: list[Pointing] = []
        widths = []
        for block in unet.up_blocks:
            for transformer in getattr(block, "attentions", ()):
                for layer in transformer.transformer_blocks:
                    self.pointing.append(Pointing())
                    layer.attn1.set_processor(self.pointing[-1])
                    widths.append(layer.attn1.query_dim)
        self.places = nn.ModuleList(nn.Linear(width, 4) for width in widths)
        """Own place and source by linear maps of what goes into each attention; trained with the UNet."""
        self.four = len(self.pointing) - 2
        """The attention whose heads fetch the four cells about the source; each level has two."""

    def loss(self, videos: Videos, frames: torch.Tensor, num_frames: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the last forward, on the given frames [k] of the videos: cross-entropy of the guided heads against the
        sources, in nats above perfect; and the squared error of places, in half edges. Means over the attentions, those
        of the finest level counted twice.
        """
        crosses, errors = [], []
        height, width = videos.frames.shape[-2:]
        for place, (pointing, linear) in enumerate(zip(self.pointing, self.places, strict=True)):
            shrink = round((height * width / pointing.seen.shape[1]) ** 0.5)
            h, w = height // shrink, width // shrink
            source = sources(videos, frames, num_frames, h, w).flatten(0, 1)
            own = torch.stack(mesh(h, w, source.device)[::-1], -1).flatten(0, 1)
            both = torch.cat([own.expand_as(source), source], -1)
            errors.append((linear(pointing.seen) - both).square().mean())
            inside = ((source[..., 0].abs() < 1 - 1 / w) & (source[..., 1].abs() < 1 - 1 / h)).float()
            if place == self.four:
                crossed = -pointing.logs.gather(-1, cells_about(source, h, w)[..., None])[..., 0].mean(1)
                perfect = torch.zeros_like(crossed)
            else:
                wanted = shares(source, h, w)
                crossed = -(wanted[:, None] * pointing.logs[:, :HEADS]).sum(-1).mean(1)
                perfect = torch.special.entr(wanted).sum(-1)
            crosses.append(((crossed - perfect) * inside).sum() / inside.sum().clamp_min(1))
        weights = crosses[0].new_tensor([2.0 if place >= self.four else 1.0 for place in range(len(crosses))])
        weights = weights / len(crosses)
        return (torch.stack(crosses) * weights).sum(), (torch.stack(errors) * weights).sum()


def cells_about(source: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Of the four cells about each source, that of each parity of row and column: indices [N, 4, S] from [N, S, 2]."""
    columns, rows = (
        [_nearest_of_parity((source[..., axis] + 1) / 2 * size - 0.5, parity, size) for parity in (0, 1)]
        for axis, size in ((0, width), (1, height))
    )
    return torch.stack([row * width + column for row in rows for column in columns], 1)


def _nearest_of_parity(at: torch.Tensor, parity: int, size: int) -> torch.Tensor:
    nearest = 2 * torch.round((at - parity) / 2) + parity
    most = size - 1 - (size - 1 - parity) % 2
    return nearest.clamp(parity, most).long()


def sources(videos: Videos, frames: torch.Tensor, num_frames: int, height: int, width: int) -> torch.Tensor:
    """Where in the picture each cell of each frame comes from, [n, k, S, 2] in -1..1 of the picture, x first."""
    where, _ = fields(videos.motions, videos.amounts, videos.loops, frames, num_frames, height, width)
    edges = torch.tensor([width, height], device=where.device) / max(height, width)
    return (where / edges).flatten(2, 3)


def shares(source: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """How much each cell of the picture is the source of each cell, bilinearly: [N, S, S] from [N, S, 2]."""
    x, y = ((source[..., axis] + 1) / 2 * size - 0.5 for axis, size in ((0, width), (1, height)))
    columns = torch.arange(width, device=source.device, dtype=source.dtype)
    rows = torch.arange(height, device=source.device, dtype=source.dtype)
    across = F.relu(1 - (x[..., None] - columns).abs())
    down = F.relu(1 - (y[..., None] - rows).abs())
    return (down[..., :, None] * across[..., None, :]).flatten(2)
