"""The motion score of a finished video, by which PIA's training chose its affinity coefficients.

It is computed on the device of the frames, without OpenCV, which the training used.
"""

from __future__ import annotations

import math
from typing import Final

import torch
from torch.nn import functional

from pia_ray.pia.transfers import to_device

CHUNK_PIXELS: Final = 16 * 512 * 512
"""Pixels of one chunk, which takes some 1 GiB in all."""

_TAN_22_5: Final = math.tan(math.pi / 8)
_STEPS_PER_CHECK: Final = 8
"""Rounds of hysteresis between two checks for its end; a check waits for a GPU."""


@torch.inference_mode()
def measure_motion(frames: torch.Tensor, condition_frame: int = 0) -> float:
    """Mean distance of the other frames from the condition frame over hue, saturation, value and edges, 0 to 1.

    `frames` is uint8 [T, H, W, 3]. The result is the training's score divided by 255. Hue counts in degrees and not as
    an angle, saturation from 0 to 1, value and edges from 0 to 255, each a quarter. Edges that vanish count as much as
    edges that appear; the training's 8-bit difference made them 1. Source: `get_score` in PIA's published code.
    """
    if len(frames) < 2:
        return 0.0
    picture = motion_channels(frames[condition_frame : condition_frame + 1])  # [1, 4, H, W]
    pixels = frames.shape[1] * frames.shape[2]
    total = 0.0
    for part in frames.split(max(1, CHUNK_PIXELS // pixels)):
        total += float((motion_channels(part) - picture).abs().mean(dim=(1, 2, 3)).sum())
    return total / (len(frames) - 1) / 255


def motion_channels(frames: torch.Tensor) -> torch.Tensor:
    """Hue (degrees), saturation (0 to 1), value and edges (0 to 255) of uint8 [T, H, W, 3]: float32 [T, 4, H, W]."""
    red, green, blue = colours = frames.permute(3, 0, 1, 2).float()  # [3, T, H, W]
    value = colours.amax(0)
    spread = value - colours.amin(0)
    sixth = 60 / spread.clamp_min(torch.finfo(torch.float32).eps)
    hue = torch.where(
        value == red,
        (green - blue) * sixth,
        torch.where(value == green, (blue - red) * sixth + 120, (red - green) * sixth + 240),
    )
    hue = torch.where(hue < 0, hue + 360, hue)
    saturation = spread / value.clamp_min(torch.finfo(torch.float32).eps)
    return torch.stack([hue, saturation, value, 255 * edges(value).float()], dim=1)


def edges(luma: torch.Tensor) -> torch.Tensor:
    """Canny's edges of 0-to-255 values [T, H, W], thickened: bool [T, H, W].

    The thresholds are a third below and above the median of each frame; the width grows with the size of the frame.
    Source: Canny, doi:10.1109/TPAMI.1986.4767851, in OpenCV's variant (3 x 3 Sobel, absolute values added).
    """
    middle = luma.flatten(1).sort(1).values  # [T, H * W]
    half = middle.shape[1] // 2
    # In double precision, because a threshold that is nearly whole must not be rounded to the next integer.
    median = (middle[:, half] + middle[:, (middle.shape[1] - 1) // 2]).double().view(-1, 1, 1) / 2
    low = ((1 - 1 / 3) * median).floor()
    high = ((1 + 1 / 3) * median).clamp_max(255).floor()
    across, down, strength = _gradients(luma)
    ridge = _ridge(across, down, strength)
    weak, strong = ridge & (strength > low), ridge & (strength > high)
    found = _connected(strong, weak)
    width = 4 + round(math.sqrt(luma.shape[1] * luma.shape[2]) / 192)
    return _grown(found, width + 1 - width % 2)


def _gradients(luma: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    padded = functional.pad(luma[:, None], (1, 1, 1, 1), mode="replicate")
    sobel = torch.tensor([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]], dtype=luma.dtype)
    kernel = to_device(sobel, luma.device)
    both = functional.conv2d(padded, torch.stack([kernel, kernel.T])[:, None])  # [T, 2, H, W]
    across, down = both[:, 0], both[:, 1]
    return across, down, across.abs() + down.abs()


def _ridge(across: torch.Tensor, down: torch.Tensor, strength: torch.Tensor) -> torch.Tensor:
    """The local maxima of the gradient along its direction; of two equal pixels the first, as in OpenCV."""
    height, width = strength.shape[1:]
    padded = functional.pad(strength, (1, 1, 1, 1))

    def neighbour(rows: int, columns: int) -> torch.Tensor:
        return padded[:, 1 + rows : 1 + rows + height, 1 + columns : 1 + columns + width]

    level = down.abs() < across.abs() * _TAN_22_5
    upright = down.abs() > across.abs() / _TAN_22_5
    rising = (across < 0) != (down < 0)
    sideways = (strength > neighbour(0, -1)) & (strength >= neighbour(0, 1))
    upwards = (strength > neighbour(-1, 0)) & (strength >= neighbour(1, 0))
    one = (strength > neighbour(-1, -1)) & (strength > neighbour(1, 1))
    other = (strength > neighbour(-1, 1)) & (strength > neighbour(1, -1))
    return torch.where(level, sideways, torch.where(upright, upwards, torch.where(rising, other, one)))


def _connected(strong: torch.Tensor, weak: torch.Tensor) -> torch.Tensor:
    """The strong pixels, and the weak ones that are connected with a strong one."""
    found = strong
    while True:
        before = found
        for _ in range(_STEPS_PER_CHECK):
            found = _grown(found, 3) & weak
        if torch.equal(found, before):
            return found


def _grown(mask: torch.Tensor, width: int) -> torch.Tensor:
    """The pixels with one of the mask, bool [T, H, W], in the square of that odd width around them."""
    # By bytes and one direction after the other: a tenth of the time of a pooling over floats.
    height, columns = mask.shape[1:]
    reach = width // 2
    padded = functional.pad(mask, (reach, reach, reach, reach))
    rows = padded[:, :height]
    for shift in range(1, width):
        rows = rows | padded[:, shift : shift + height]  # [T, H, W + 2 * reach]
    grown = rows[..., :columns]
    for shift in range(1, width):
        grown = grown | rows[..., shift : shift + columns]
    return grown
