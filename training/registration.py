"""How much a video moves: amounts of motion fitted by warping its first frame with the displacement fields of training.

An amount is in the unit of training: motion scales 0, 1 and 2 ask for 0.25, 0.55 and 0.9; the opposite way is negative.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import torch
import torch.nn.functional as F

from training.motions import FLICKER, LAST, PERIODS, PULSE, ZOOM_IN, fields
from training.prompts import MOTIONS

CANDIDATES: Final = torch.linspace(-1.4, 1.4, 57)
FAMILIES: Final = ("pan right", "pan down", "zoom in", "rotate right")
LONG_EDGE: Final = 64
"""Frames are fitted at this size: amounts are relative to it, and 64 px are enough."""


def fitted_amount(frames: np.ndarray[Any, Any], motion: str, frame: int) -> tuple[float, float]:
    """The amount of `motion` that best explains `frame` of uint8 [T, H, W, 3] from frame 0, and the error left.

    The error is the mean squared difference of values 0 to 1 where the warped frame is seen.
    """
    first, other = (small(frames[index]) for index in (0, frame))
    height, width = first.shape[-2:]
    count = len(CANDIDATES)
    where, _ = fields(
        torch.full((count,), MOTIONS.index(motion)),
        CANDIDATES,
        torch.zeros(count, dtype=torch.bool),
        torch.tensor([frame]),
        LAST + 1,
        height,
        width,
    )
    edges = torch.tensor([width, height]) / max(width, height)
    grid = where[:, 0] / edges  # [K, H, W, 2], in -1..1 of the frame
    warped = F.grid_sample(
        first.expand(count, -1, -1, -1), grid, mode="bilinear", padding_mode="border", align_corners=False
    )
    seen = (grid.abs() < 1).all(-1)[:, None].float()
    share = seen.mean((1, 2, 3))
    error = ((warped - other).square() * seen).sum((1, 2, 3)) / (3 * seen.sum((1, 2, 3))).clamp_min(1)
    error = torch.where(share > 0.25, error, torch.inf)
    best = int(error.argmin())
    return float(CANDIDATES[best]), float(error[best])


def camera_family(frames: np.ndarray[Any, Any], frame: int) -> str:
    """The kind of camera motion that explains the frame best: one of FAMILIES."""
    return min(FAMILIES, key=lambda family: fitted_amount(frames, family, frame)[1])


def effect_amount(frames: np.ndarray[Any, Any], motion: str) -> float:
    """The amount of a motion that swings, from two of its 16 frames half a swing apart.

    Sway and waves: the fitted amount at the first extreme less that at the second, halved. Pulse: at the largest less
    at the frame where it is back. Flicker: the swing of the frames' light about its trend, as the amount that makes it.
    """
    if motion == "flicker":
        light = frames.astype(np.float64).mean((1, 2, 3))
        at = np.arange(len(light))
        swing = np.sin(2 * np.pi * PERIODS["flicker"] * at / LAST)
        trend = np.stack([np.ones_like(swing), at, at**2, swing], 1)
        return float(np.linalg.lstsq(trend, light / light[0], rcond=None)[0][-1] / FLICKER)
    extremes = {"sway": (4, 11), "waves": (2, 6), "pulse": (4, 8)}[motion]
    first, second = (fitted_amount(frames, motion if motion != "pulse" else "zoom in", frame)[0] for frame in extremes)
    if motion == "pulse":
        return float(ZOOM_IN / PULSE * (first * extremes[0] - second * extremes[1]) / LAST)
    # Fitted with the field of their own frame, both extremes give the same amount when the motion is there.
    return (first + second) / 2


def psnr(frame: np.ndarray[Any, Any], picture: np.ndarray[Any, Any]) -> float:
    """Peak signal-to-noise ratio of two uint8 pictures, in dB."""
    difference = frame.astype(np.float64) - picture.astype(np.float64)
    return float(10 * np.log10(255**2 / max(1e-9, np.square(difference).mean())))


def sharpness(frame: np.ndarray[Any, Any]) -> float:
    """Mean size of the Laplacian of the frame's grey values: fine detail, of which blur leaves least."""
    grey = frame.astype(np.float64).mean(-1)
    inner = grey[1:-1, 1:-1]
    around = grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:]
    return float(np.abs(around - 4 * inner).mean())


def sharpness_kept(frames: np.ndarray[Any, Any]) -> float:
    """Sharpness of the last frame over that of the first."""
    return sharpness(frames[-1]) / max(1e-9, sharpness(frames[0]))


def small(frame: np.ndarray[Any, Any]) -> torch.Tensor:
    """uint8 [H, W, 3] as float [1, 3, h, w] in 0..1 with a long edge of at most LONG_EDGE."""
    values = torch.from_numpy(np.ascontiguousarray(frame)).permute(2, 0, 1)[None].float() / 255
    long = max(values.shape[-2:])
    if long <= LONG_EDGE:
        return values
    size = [round(edge * LONG_EDGE / long) for edge in values.shape[-2:]]
    return F.interpolate(values, size=size, mode="bilinear", antialias=True, align_corners=False)
