"""Shows the UNet where each pixel of a frame comes from: extra losses on its upward self-attention.

A pixel of a frame is one of the picture, and training knows which. Left alone, so small a UNet moves pictures by its
convolutions and never learns positions, so that its self-attention stays unused and far motions blur. Here some
heads of every upward self-attention are asked to point at the pixel's source, and what goes in to know, by a linear
map, its own place and its source's. Nothing of this is in the exported model but the weights.

A source lies between four cells, and their average is blurred. So the four heads of one attention each fetch one of
them: that of their own parity of column and row. A head's cell changes where its share is nothing. In the attention
over the latents themselves one head fetches, mostly the nearest, and the other is free.
"""

from __future__ import annotations

import itertools
import math
from typing import Any, Final

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from torch import nn

from training.motions import Videos, fields
from training.worlds import mesh

ASKED: Final = 160
"""About how many cells of a level are asked where they point."""

HEADS: Final = 2
"""Heads of each attention that point at sources; any others are free."""

HARMONICS: Final = (0.5, 4.0)
"""Of the codes of places: half a wave over the picture is one of a kind, four tell neighbours apart."""

CODE: Final = 4 * len(HARMONICS)
"""Numbers of a place's code."""


class Pointing:
    """An attention processor that keeps what went in, and the log probabilities of the guided heads.

    Of many cells only some are kept, for a loss over all would cost more than the rest of a step.
    """

    def __init__(self, heads: int) -> None:
        self.heads = heads
        self.seen = torch.empty(0)  # [N, S, C]
        self.asked = torch.empty(0, dtype=torch.long)  # [Q], the cells whose probabilities are kept
        self.logs = torch.empty(0)  # [N, heads, Q, S]

    def __call__(self, attention: Attention, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """Self-attention [N, S, C] -> the same shape."""
        query, key, value = (
            linear(hidden_states).unflatten(-1, (attention.heads, -1)).transpose(1, 2)
            for linear in (attention.to_q, attention.to_k, attention.to_v)
        )
        self.asked = torch.arange(0, query.shape[2], _stride(query.shape[2]), device=query.device)
        guided = query[:, : self.heads, self.asked] @ key[:, : self.heads].mT
        self.seen, self.logs = hidden_states, (guided * attention.scale).log_softmax(-1)
        attended = F.scaled_dot_product_attention(query, key, value, scale=attention.scale)
        return torch.as_tensor(attention.to_out[0](attended.transpose(1, 2).flatten(2)))


def _stride(size: int) -> int:
    """From one asked cell to the next, without a factor of the width or height, so that all columns have their turn."""
    return next(stride for stride in itertools.count(max(1, size // ASKED)) if math.gcd(stride, size) == 1)


class Guide:
    """The extra losses of one UNet in training."""

    def __init__(self, unet: Any) -> None:
        self.pointing: list[Pointing] = []
        widths = []
        for block in unet.up_blocks:
            for transformer in getattr(block, "attentions", ()):
                for layer in transformer.transformer_blocks:
                    self.pointing.append(Pointing(HEADS))
                    layer.attn1.set_processor(self.pointing[-1])
                    widths.append(layer.attn1.query_dim)
        self.last = len(self.pointing) - 1
        """The attention over the latents themselves, alone at its level; each other level has two."""
        self.four = self.last - 2
        """The attention whose heads fetch the four cells about the source."""
        self.pointing[self.four].heads, self.pointing[self.last].heads = 4, 1
        outs = [4] * self.last + [2 * CODE]
        self.places = nn.ModuleList(nn.Linear(*each) for each in zip(widths, outs, strict=True))
        """Own place and source by linear maps of what goes into each attention; trained with the UNet."""

    def loss(self, videos: Videos, frames: torch.Tensor, num_frames: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the last forward, on the given frames [k] of the videos: cross-entropy of the guided heads against the
        sources, in nats above perfect; and the squared error of places, in half edges, or of their codes. Means over
        the attentions, those of the two finest levels counted more.
        """
        crosses, errors = [], []
        height, width = videos.frames.shape[-2:]
        for place, (pointing, linear) in enumerate(zip(self.pointing, self.places, strict=True)):
            shrink = round((height * width / pointing.seen.shape[1]) ** 0.5)
            h, w = height // shrink, width // shrink
            source = sources(videos, frames, num_frames, h, w).flatten(0, 1)
            own = torch.stack(mesh(h, w, source.device)[::-1], -1).flatten(0, 1)
            known = (own.expand_as(source), source)
            both = torch.cat([codes(each) for each in known] if place == self.last else known, -1)
            errors.append((linear(pointing.seen) - both).square().mean())
            source = source[:, pointing.asked]
            inside = ((source[..., 0].abs() < 1 - 1 / w) & (source[..., 1].abs() < 1 - 1 / h)).float()
            crossed = self._crossed(place, pointing.logs, source, h, w)
            crosses.append((crossed * inside).sum() / inside.sum().clamp_min(1))
        weights = crosses[0].new_tensor([1.0] * self.four + [2.0] * 2 + [4.0]) / len(crosses)
        return (torch.stack(crosses) * weights).sum(), (torch.stack(errors) * weights.clamp_max(2 / len(errors))).sum()

    def _crossed(self, place: int, logs: torch.Tensor, source: torch.Tensor, h: int, w: int) -> torch.Tensor:
        """Cross-entropy [N, Q] of an attention's guided heads, in nats above perfect."""
        if place == self.four:
            return -logs.gather(-1, cells_about(source, h, w)[..., None])[..., 0].mean(1)
        cells, wanted = cells_between(source, h, w)
        if place == self.last:  # between an average, which blurs, and the nearest, which jumps
            wanted = wanted.square() / wanted.square().sum(-1, keepdim=True)
        pointed = logs.gather(-1, cells[:, None].expand(-1, logs.shape[1], -1, -1))
        return -(wanted[:, None] * pointed).sum(-1).mean(1) - torch.special.entr(wanted).sum(-1)


def codes(place: torch.Tensor) -> torch.Tensor:
    """Places [..., 2] in -1..1 as sines and cosines [..., CODE], whose products tell near and far places apart."""
    angles = torch.pi * torch.cat([place * harmonic for harmonic in HARMONICS], -1)
    return torch.cat([angles.sin(), angles.cos()], -1)


def cells_between(source: torch.Tensor, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The four cells between which each source lies, indices [N, S, 4], and its bilinear shares of them, [N, S, 4]."""
    halves = []
    for axis, size in ((0, width), (1, height)):
        at = ((source[..., axis] + 1) / 2 * size - 0.5).clamp(0, size - 1)
        low = at.floor().clamp(max=max(0, size - 2))
        halves.append(((low.long(), (low + 1).long().clamp(max=size - 1)), (1 - (at - low), at - low)))
    (columns, across), (rows, down) = halves
    cells = torch.stack([row * width + column for row in rows for column in columns], -1)
    return cells, torch.stack([a * b for a in down for b in across], -1)


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
