"""Videos of moving worlds, rendered by one grid_sample per batch from displacement fields.

All displacements are relative to the picture's own size, so that 128 px move as far as 64. A motion's frames do not
depend on the number of frames, but for loops, which close at the last frame.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import torch

from training.draws import Draws
from training.masks import AMOUNTS, masks
from training.prompts import MOTIONS, prompt
from training.worlds import Worlds, look, mesh

LAST: Final = 15
"""Frame at which a camera has moved all its amount: the last of 16."""

VIEW: Final = 0.6
"""Half of the picture's long edge in half worlds."""

PAN, TURN, ZOOM_IN, ZOOM_OUT = 0.62, 0.62, math.log(1.75), math.log(1.6)
SWAY, WAVES, FLICKER, PULSE = 0.38, 0.18, 0.55, 0.42
PERIODS: Final = {"sway": 1.0, "waves": 2.0, "flicker": 2.0, "pulse": 2.0}
"""Full swings in 16 frames."""


@dataclass(frozen=True)
class Videos:
    """A batch: frame 0 and the chosen frames, float [n, 1 + k, 3, H, W] in -1..1, and what asks for them."""

    frames: torch.Tensor
    masks: torch.Tensor  # [n, k], of the chosen frames
    prompts: list[str]
    motions: torch.Tensor  # [n], indices of MOTIONS
    amounts: torch.Tensor  # [n]
    loops: torch.Tensor  # [n], true where the last frame is the picture again


def render(
    worlds: Worlds,
    draws: Draws,
    *,
    motions: torch.Tensor,
    frames: torch.Tensor,
    num_frames: int,
    height: int,
    width: int,
) -> Videos:
    """Videos of the given motions [n] at the given frame indices [k] of `num_frames`."""
    count, device = len(motions), draws.device
    amount = draws.uniform(count, low=0.05, high=1.0)
    exact = torch.tensor(AMOUNTS, device=device)[draws.integers(len(AMOUNTS), count)]
    amount = torch.where(draws.chance(0.4, count), exact, amount)
    still = motions == MOTIONS.index("still")
    shown = torch.where(still & draws.chance(0.4, count), 0.0, amount)
    amount = torch.where(still, 0.0, amount)
    loop = draws.chance(0.22, count)
    style = draws.chance(0.08, count) & ~loop
    amount, shown = (torch.where(style, each.clamp_min(AMOUNTS[0]), each) for each in (amount, shown))
    every = masks(shown, loop, style, num_frames)  # also of motion where the prompt asks for stillness, which wins
    at = torch.cat([torch.zeros(1, dtype=torch.long, device=device), frames])
    index = draws.integers(len(worlds), count)
    where, light = fields(motions, amount, loop, at, num_frames, height, width)
    where = _placed(where, draws)
    pixels = VIEW * worlds.pictures.shape[-1] / max(height, width)
    flat = where.reshape(count, len(at) * height, width, 2)
    picture = look(worlds.pictures[index], flat, pixels_per_step=pixels)
    picture = picture.reshape(count, 3, len(at), height, width).transpose(1, 2)
    picture = ((picture + 1) * light[:, :, None, None, None] - 1).clamp(-1, 1)
    texts = [prompt(MOTIONS[m], k, draws) for m, k in zip(motions.tolist(), worlds.kinds[index].tolist(), strict=True)]
    return Videos(picture, every[:, frames], texts, motions, amount, loop)


def fields(
    motions: torch.Tensor,
    amount: torch.Tensor,
    loop: torch.Tensor,
    at: torch.Tensor,
    num_frames: int,
    height: int,
    width: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where each pixel of each frame looks, [n, k, H, W, 2], in half long edges around the picture's centre; and the
    light of each frame, [n, k]. Frame 0 looks straight ahead."""

    def share(name: str) -> torch.Tensor:
        return (motions == MOTIONS.index(name)).float()[:, None] * amount[:, None]

    def phase(name: str) -> torch.Tensor:
        free = 2 * math.pi * PERIODS[name] * at / LAST
        swings = max(1, round(PERIODS[name] * (num_frames - 1) / LAST))
        closed = 2 * math.pi * swings * at / max(1, num_frames - 1)
        return torch.where(loop[:, None], closed[None], free[None])

    ahead = (at / LAST)[None].expand(len(motions), -1)
    around = torch.sin(math.pi * at / max(1, num_frames - 1))[None]
    progress = torch.where(loop[:, None], around, ahead)
    grid_y, grid_x = mesh(height, width, motions.device)
    tall, wide = height / max(height, width), width / max(height, width)
    y, x = grid_y * tall, grid_x * wide
    turn = TURN * (share("rotate right") - share("rotate left")) * progress
    zoom = torch.exp(
        progress * (ZOOM_OUT * share("zoom out") - ZOOM_IN * share("zoom in"))
        - PULSE * share("pulse") * (1 - torch.cos(phase("pulse"))) / 2
    )
    cos, sin = _over(torch.cos(turn) * zoom), _over(torch.sin(turn) * zoom)
    to_x = cos * x + sin * y + _over(PAN * wide * (share("pan right") - share("pan left")) * progress)
    to_y = cos * y - sin * x + _over(PAN * tall * (share("pan down") - share("pan up")) * progress)
    # Tops move, feet stay.
    to_x = to_x + _over(SWAY * wide * share("sway") * torch.sin(phase("sway"))) * ((1 - grid_y) / 2) ** 1.3
    ripple = 2.5 * math.pi * grid_x
    to_y = to_y + _over(WAVES * tall * share("waves")) * (torch.sin(ripple + _over(phase("waves"))) - torch.sin(ripple))
    light = 1 + FLICKER * share("flicker") * torch.sin(phase("flicker"))
    return torch.stack([to_x, to_y], -1), light


def _over(values: torch.Tensor) -> torch.Tensor:
    """[n, k] over height and width."""
    return values[..., None, None]


def _placed(where: torch.Tensor, draws: Draws) -> torch.Tensor:
    """Moves each video to a random place of its world that holds the whole of its path, as far as there is one."""
    count = len(where)
    size = VIEW * draws.uniform(count, 1, low=0.85, high=1.0)
    least, most = where.amin((1, 2, 3)) * size, where.amax((1, 2, 3)) * size  # [n, 2]
    low, high = -1 - least, 1 - most
    place = torch.where(high > low, low + draws.uniform(count, 2) * (high - low), (low + high) / 2)
    placed = where * size[:, None, None, None] + place[:, None, None, None]
    mirror = torch.where(draws.chance(0.5, count, 1, 1, 1), -1.0, 1.0)
    return torch.stack([placed[..., 0] * mirror, placed[..., 1]], -1)
