"""Worlds: drawn square pictures that cameras move over. Leaves, textures and landscapes, nothing from a camera.

All tensors, so that they are drawn on the GPU where there is one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
import torch.nn.functional as F

from training import checkpoints, processes
from training.draws import Draws

SIDE: Final = 256
"""Pixels of a world's side. The usual view is 0.6 of it, 154 px: enough for pictures of 128 px."""

LEAVES, TEXTURE, LANDSCAPE = range(3)
"""Kinds of worlds; prompts name a scene that fits the kind."""


@dataclass(frozen=True)
class Worlds:
    """Pictures uint8 [N, 3, side, side] and their kinds [N], on one device."""

    pictures: torch.Tensor
    kinds: torch.Tensor

    def __len__(self) -> int:
        return len(self.pictures)


def make_worlds(count: int, draws: Draws, *, side: int = SIDE, together: int = 16) -> Worlds:
    """Draws `count` worlds, `together` at a time."""
    pictures, kinds = [], []
    for start in range(0, count, together):
        number = min(together, count - start)
        kind = (LEAVES, TEXTURE, LANDSCAPE)[int(draws.words.choices((0, 1, 2), (0.55, 0.12, 0.33))[0])]
        picture = (leaves, textures, landscapes)[kind](number, side, draws)
        pictures.append(_finish(picture, lit=kind != LANDSCAPE or draws.happens(0.3), draws=draws))
        kinds.append(torch.full((number,), kind, device=draws.device))
    return Worlds(torch.cat(pictures), torch.cat(kinds))


def kept_worlds(out: Path, count: int, *, seed: int, device: str) -> Worlds:
    """A run's worlds, drawn once and kept in its folder, beside the state."""
    path = out / "worlds.pt"
    if not path.exists() and processes.rank() == 0:
        worlds = make_worlds(count, Draws(seed, device))
        checkpoints.save({"pictures": worlds.pictures.cpu(), "kinds": worlds.kinds.cpu()}, path)
    processes.gathered(None)  # the others wait for the first process's drawing
    state = checkpoints.load(path, device)
    return Worlds(state["pictures"], state["kinds"])


def views(worlds: Worlds, count: int, height: int, width: int, draws: Draws) -> torch.Tensor:
    """Still pictures cut from random worlds at random zoom, [count, 3, height, width] in -1..1."""
    index = draws.integers(len(worlds), count)
    long = max(height, width)
    half = draws.uniform(count, 1, 1, low=0.3, high=0.9)
    y, x = mesh(height, width, draws.device)
    x, y = x * width / long, y * height / long
    left = draws.uniform(count, 1, 1, low=-1.0, high=1.0) * (1 - half * width / long)
    top = draws.uniform(count, 1, 1, low=-1.0, high=1.0) * (1 - half * height / long)
    mirror = torch.where(draws.chance(0.5, count, 1, 1), -1.0, 1.0)
    where = torch.stack([left + half * x * mirror, top + half * y + torch.zeros_like(x)], -1)
    return look(worlds.pictures[index], where, pixels_per_step=0.6 * worlds.pictures.shape[-1] / long)


def look(pictures: torch.Tensor, where: torch.Tensor, *, pixels_per_step: float) -> torch.Tensor:
    """Samples uint8 pictures at `where`, [n, h, w, 2] in -1..1, as floats in -1..1; mirrors beyond the edge.

    `pixels_per_step`: world pixels between neighbouring samples. Above 1.9 the world is halved first, or it aliases.
    """
    values = pictures.float() / 127.5 - 1
    if pixels_per_step > 1.9:
        values = F.avg_pool2d(values, 2)
    return F.grid_sample(values, where, mode="bilinear", padding_mode="reflection", align_corners=False)


def mesh(height: int, width: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Coordinates y, x of pixel centres, each [height, width] in -1..1."""
    y = (torch.arange(height, device=device) + 0.5) / height * 2 - 1
    x = (torch.arange(width, device=device) + 0.5) / width * 2 - 1
    rows, columns = torch.meshgrid(y, x, indexing="ij")
    return rows, columns


def noise(count: int, side: int, draws: Draws, *, slopes: tuple[float, float]) -> torch.Tensor:
    """Noise whose amplitude falls with frequency to a power between `slopes`, [count, 1, side, side], deviation 1."""
    device = draws.device
    rows, columns = torch.fft.fftfreq(side, device=device), torch.fft.rfftfreq(side, device=device)
    frequency = torch.sqrt(rows[:, None] ** 2 + columns[None] ** 2).clamp_min(1 / side)
    slope = draws.uniform(count, 1, 1, 1, low=slopes[0], high=slopes[1])
    field = torch.fft.irfft2(torch.fft.rfft2(draws.normal(count, 1, side, side)) * frequency**-slope, s=(side, side))
    field = field - field.mean((-1, -2), keepdim=True)
    return field / field.std((-1, -2), keepdim=True).clamp_min(1e-6)


def rgb(hue: torch.Tensor, saturation: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """HSV to RGB, channels last: [..., 3]."""
    sector = torch.stack([(hue % 1.0) * 6 + shift for shift in (5, 3, 1)], -1) % 6
    fall = torch.minimum(sector, 4 - sector).clamp(0, 1)
    return value[..., None] * (1 - saturation[..., None] * fall)


def palette(count: int, colors: int, draws: Draws) -> torch.Tensor:
    """Colours that go together, [count, colors, 3]: related hues, and now and then a loud one."""
    spread = 0.5 * draws.uniform(count, 1) ** 2
    hue = draws.uniform(count, 1) + spread * draws.normal(count, colors)
    saturation = 0.05 + 0.8 * draws.uniform(count, 1) * draws.uniform(count, colors) ** 0.7
    value = draws.uniform(count, colors) ** 0.9
    loud = draws.chance(0.08, count, colors)
    hue = torch.where(loud, draws.uniform(count, colors), hue)
    saturation = torch.where(loud, 0.6 + 0.4 * draws.uniform(count, colors), saturation)
    return rgb(hue, saturation.clamp(0, 1), value)


def ramp(count: int, side: int, draws: Draws) -> torch.Tensor:
    """A straight transition between two colours, [count, 3, side, side]."""
    y, x = mesh(side, side, draws.device)
    angle = draws.uniform(count, 1, 1, high=2 * math.pi)
    at = (0.5 + (torch.cos(angle) * x + torch.sin(angle) * y) / 2.4).clamp(0, 1)[:, None]
    colors = palette(count, 2, draws)[..., None, None]
    return torch.lerp(colors[:, 0], colors[:, 1], at)


def leaves(count: int, side: int, draws: Draws) -> torch.Tensor:
    """Shapes of power-law size that cover each other: the "dead leaves" model of natural pictures."""
    number = draws.one_of((8, 15, 30, 60, 90))
    least = draws.one_of((0.02, 0.03, 0.05, 0.08))
    y, x = mesh(side, side, draws.device)
    picture = ramp(count, side, draws)
    colors = palette(count, number, draws)
    grain = noise(count, side, draws, slopes=(0.9, 1.6))[:, 0]
    # Large shapes first, so that the small ones stay visible.
    radii = (least * (0.7 / least) ** (draws.uniform(count, number) ** 1.3)).sort(1, descending=True).values
    for shape in range(number):
        angle = draws.uniform(count, 1, 1, high=2 * math.pi)
        stretch = torch.exp(draws.uniform(count, 1, 1, low=-0.9, high=0.9))
        radius = radii[:, shape, None, None]
        right, down = (axis - draws.uniform(count, 1, 1, low=-1.05, high=1.05) for axis in (x, y))
        u = (torch.cos(angle) * right + torch.sin(angle) * down) / (radius * stretch)
        v = (torch.cos(angle) * down - torch.sin(angle) * right) * stretch / radius
        form = draws.integers(4, count, 1, 1)
        outside = torch.where(form < 2, torch.hypot(u, v), torch.where(form == 2, torch.maximum(u.abs(), v.abs()), 0.0))
        outside = torch.where(form == 3, u.abs() + v.abs(), outside) - 1
        blur = torch.where(draws.chance(0.15, count, 1, 1), draws.uniform(count, 1, 1, low=4.0, high=20.0), 1.0)
        cover = (0.5 - outside * radius * side / 2 / blur).clamp(0, 1)[:, None]
        slope_u, slope_v = (draws.uniform(count, 1, 1, low=-0.25, high=0.25) for _ in "uv")
        shade = (u * slope_u + v * slope_v).clamp(-0.6, 0.6)
        grained = draws.uniform(count, 1, 1, high=0.14) * draws.chance(0.6, count, 1, 1)
        color = colors[:, shape, :, None, None] + (shade + grain * grained)[:, None]
        picture = picture + (color - picture) * cover
    return picture.clamp(0, 1)


def textures(count: int, side: int, draws: Draws) -> torch.Tensor:
    """Stripes, checks and clouds between four colours; a third of them a bare ramp with grain."""
    grain = noise(count, side, draws, slopes=(1.1, 2.0))[:, 0]
    if draws.happens(1 / 3):
        return (ramp(count, side, draws) + 0.1 * draws.uniform(count, 1, 1, 1) * grain[:, None]).clamp(0, 1)
    y, x = mesh(side, side, draws.device)
    angle = draws.uniform(count, 1, 1, high=math.pi)
    pitch = 4 * 2 ** (3 * draws.uniform(count, 1, 1))
    stripes = torch.sin(pitch * (torch.cos(angle) * x + torch.sin(angle) * y) + 2 * grain * draws.uniform(count, 1, 1))
    checks = torch.sign(torch.sin(pitch * x) * torch.sin(pitch * y)) * 0.6 + 0.2 * grain
    which = draws.uniform(count, 1, 1)
    field = torch.where(which < 0.5, grain * 0.5, torch.where(which < 0.8, stripes, checks))
    level = (0.5 + 0.5 * field).clamp(0, 1) * 2.999
    below = level.floor().long()
    colors = palette(count, 4, draws)
    rows = torch.arange(count, device=draws.device)[:, None, None]
    mixed = torch.lerp(colors[rows, below], colors[rows, below + 1], (level - below)[..., None])
    return mixed.permute(0, 3, 1, 2).clamp(0, 1)


def landscapes(count: int, side: int, draws: Draws) -> torch.Tensor:
    """Sky, clouds, a sun or moon, rows of hills, and water that mirrors them in a third."""
    y, x = mesh(side, side, draws.device)
    light = 1 - 0.7 * draws.chance(0.2, count).float()  # a fifth is night
    horizon = draws.uniform(count, 1, 1, low=-0.3, high=0.5)
    high = draws.uniform(count, low=0.52, high=0.68)
    warm, cold = draws.uniform(count, high=0.12), draws.uniform(count, low=0.5, high=0.65)
    low = torch.where(draws.chance(0.5, count), warm, cold)
    top = rgb(high, draws.uniform(count, low=0.3, high=0.9), draws.uniform(count, low=0.5) * light)
    bottom = rgb(low, draws.uniform(count, low=0.05, high=0.7), draws.uniform(count, low=0.5) * light)[..., None, None]
    picture = torch.lerp(top[..., None, None], bottom, ((y + 1) / (horizon + 1)).clamp(0, 1)[:, None])
    clouds = (noise(count, side, draws, slopes=(1.2, 1.7)) * 0.5).clamp(0, 1) * draws.chance(0.6, count, 1, 1, 1)
    picture = picture + (0.95 - picture) * clouds * 0.8 * light[:, None, None, None]
    red = torch.ones(count, device=draws.device)
    disc = torch.stack([red, draws.uniform(count, low=0.7), draws.uniform(count, low=0.3)], 1)
    away = torch.hypot(
        x - draws.uniform(count, 1, 1, low=-0.8, high=0.8), y - draws.uniform(count, 1, 1, low=-0.9, high=0.1)
    )
    radius = draws.uniform(count, 1, 1, low=0.06, high=0.2)
    glow = ((0.5 - (away - radius) * side / 2).clamp(0, 1) + 0.3 * torch.exp(-away / 0.3)).clamp(0, 1)[:, None]
    picture = picture + (disc[..., None, None] - picture) * glow * draws.chance(0.6, count, 1, 1, 1)
    grain = noise(count, side, draws, slopes=(0.9, 1.5))[:, 0]
    waves = torch.tensor([1.5, 3.1, 6.3, 11.0, 19.0, 31.0], device=draws.device)[None, :, None]
    heights = torch.tensor([0.2, 0.12, 0.08, 0.05, 0.03, 0.02], device=draws.device)[None, :, None]
    for row in range(4):
        base = horizon + (row - 1) * draws.uniform(count, 1, 1, low=0.1, high=0.3)
        size = heights * draws.uniform(count, 6, 1) * (1 - 0.2 * row)
        ridge = (size * torch.sin(waves * x[0] + draws.uniform(count, 6, 1, high=2 * math.pi))).sum(1)[:, None]
        cover = (0.5 + (y - base - ridge) * side / 2).clamp(0, 1)[:, None]
        green = draws.uniform(count, low=0.22, high=0.42)
        hue = torch.where(draws.chance(0.6, count), green, draws.uniform(count))
        hill = rgb(hue, draws.uniform(count, high=0.6), (0.75 - 0.15 * row) * draws.uniform(count, low=0.4) * light)
        depth = grain * draws.uniform(count, 1, 1, high=0.15) - (y - base) * draws.uniform(count, 1, 1, high=0.3)
        picture = picture + (hill[..., None, None] + depth[:, None] - picture) * cover
    mirrored = picture.flip(2) * 0.6 + 0.25 * bottom
    glitter = 0.06 * torch.sin(y * draws.uniform(count, 1, 1, low=30.0, high=80.0) + 2 * grain)
    shore = (0.5 + (y - draws.uniform(count, 1, 1, low=0.1, high=0.7)) * side / 2).clamp(0, 1)[:, None]
    picture = picture + (mirrored + glitter[:, None] - picture) * shore * draws.chance(0.35, count, 1, 1, 1)
    return picture.clamp(0, 1)


def _finish(picture: torch.Tensor, *, lit: bool, draws: Draws) -> torch.Tensor:
    """Uneven light, fine grain and a tone curve; uint8."""
    count, side = len(picture), picture.shape[-1]
    if lit:
        light = 1 + 0.25 * draws.uniform(count, 1, 1, 1) * noise(count, side, draws, slopes=(1.2, 1.8))
        picture = picture * light.clamp(0.3, 1.6)
    picture = picture + 0.06 * draws.uniform(count, 1, 1, 1) ** 2 * noise(count, side, draws, slopes=(0.2, 1.0))
    tone = torch.exp(draws.uniform(count, 1, 1, 1, low=-0.5, high=0.5))
    return (picture.clamp(0, 1) ** tone * 255).round().to(torch.uint8)
