"""Affinity masks for training: PIA's own tables and everything between them, loops of any length, style tables."""

from __future__ import annotations

from typing import Final

import torch

from pia_ray.config.knobs import LOOPS
from pia_ray.pia.denoising.affinity import TABLES, affinity

AMOUNTS: Final = (0.25, 0.55, 0.9)
"""Amount of motion that the small, moderate and large table of each kind stand for; 1 is the most a camera moves."""

STYLE: Final = range(6, len(TABLES))


def masks(amount: torch.Tensor, loop: torch.Tensor, style: torch.Tensor, num_frames: int) -> torch.Tensor:
    """One coefficient per frame, [n, num_frames], for amounts 0..1 [n] and flags [n].

    Between the amounts of two tables the mask lies between them, so that a scale not in training is none. No motion is
    the mask of ones, but in the style tables, which have none.
    """
    device = amount.device
    still = torch.ones(1, num_frames, device=device)
    plain = torch.cat([still, _tables(range(3), num_frames, device)])  # [4, T]
    closed = torch.cat([still, _tables(LOOPS, num_frames, device)])
    styled = _tables(STYLE, num_frames, device)
    styled = torch.cat([styled[:1], styled])
    knots = torch.tensor((0.0, *AMOUNTS), device=device)
    below = torch.bucketize(amount, knots[1:-1])
    part = ((amount - knots[below]) / (knots[below + 1] - knots[below]))[:, None]
    choice = torch.where(style, 2, loop.long())
    tables = torch.stack([plain, closed, styled])[choice]  # [n, 4, T]
    rows = torch.arange(len(amount), device=device)
    return torch.lerp(tables[rows, below], tables[rows, below + 1], part).clamp(0.05, 1)


def _tables(scales: range, num_frames: int, device: torch.device) -> torch.Tensor:
    return torch.tensor([affinity(scale, num_frames) for scale in scales], device=device)
