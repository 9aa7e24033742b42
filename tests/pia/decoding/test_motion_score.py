"""The motion score against the training's arithmetic, written out in plain loops, and against OpenCV's own numbers."""

from __future__ import annotations

import colorsys
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch

from pia_ray.pia.decoding.motion_score import measure_motion, motion_channels


def video(height: int, width: int, num_frames: int = 3) -> np.ndarray[Any, Any]:
    """Smooth blobs and hard stripes that move."""
    t, y, x, c = np.ogrid[:num_frames, :height, :width, :3]
    waves = 127.5 + 90 * np.sin((x + 3 * t) / (5 + c)) * np.cos((y - 2 * t) / (7 - c))
    stripes = 60.0 * (((x + y + 2 * t) // 9) % 2)
    return (waves + stripes).clip(0, 255).astype(np.uint8)


def canny(luma: np.ndarray[Any, Any], low: int, high: int) -> np.ndarray[Any, Any]:
    """OpenCV's Canny in its integer arithmetic."""
    height, width = luma.shape
    p = np.pad(luma.astype(int), 1, mode="edge")
    dx = p[:-2, 2:] - p[:-2, :-2] + 2 * (p[1:-1, 2:] - p[1:-1, :-2]) + p[2:, 2:] - p[2:, :-2]
    dy = p[2:, :-2] - p[:-2, :-2] + 2 * (p[2:, 1:-1] - p[:-2, 1:-1]) + p[2:, 2:] - p[:-2, 2:]
    m = np.pad(np.abs(dx) + np.abs(dy), 1)
    kind = np.zeros((height, width), int)  # 1 weak, 2 strong
    for y, x in itertools.product(range(height), range(width)):
        here, gx, gy = m[y + 1, x + 1], abs(int(dx[y, x])), abs(int(dy[y, x])) << 15
        if gy < gx * 13573:
            ridge = here > m[y + 1, x] and here >= m[y + 1, x + 2]
        elif gy > gx * 13573 + (gx << 16):
            ridge = here > m[y, x + 1] and here >= m[y + 2, x + 1]
        else:
            s = -1 if (dx[y, x] < 0) != (dy[y, x] < 0) else 1
            ridge = here > m[y, x + 1 - s] and here > m[y + 2, x + 1 + s]
        if ridge and here > low:
            kind[y, x] = 2 if here > high else 1
    found = np.zeros((height, width), bool)
    stack = [(int(y), int(x)) for y, x in np.argwhere(kind == 2)]
    while stack:
        y, x = stack.pop()
        if 0 <= y < height and 0 <= x < width and kind[y, x] and not found[y, x]:
            found[y, x] = True
            stack += [(y + a, x + b) for a in (-1, 0, 1) for b in (-1, 0, 1)]
    return found


def channels(frame: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    height, width = frame.shape[:2]
    out = np.zeros((4, height, width))
    for y, x in itertools.product(range(height), range(width)):
        hue, saturation, value = colorsys.rgb_to_hsv(*(frame[y, x] / 255))
        out[:3, y, x] = hue * 360, saturation, value * 255
    luma = frame.max(-1)
    median = np.median(luma)
    found = canny(luma, int(max(0, (1 - 1 / 3) * median)), int(min(255, (1 + 1 / 3) * median)))
    size = 4 + round(math.sqrt(height * width) / 192)
    reach = (size + 1 - size % 2) // 2
    for y, x in np.argwhere(found):
        out[3, max(0, y - reach) : y + reach + 1, max(0, x - reach) : x + reach + 1] = 255
    return out


@pytest.mark.parametrize("condition_frame", [0, 1])
@pytest.mark.parametrize("size", [(24, 30), (17, 13)])
def test_the_score_is_the_trainings_arithmetic(size: tuple[int, int], condition_frame: int) -> None:
    frames = video(*size)
    theirs = np.stack([channels(frame) for frame in frames])
    ours = motion_channels(torch.from_numpy(frames)).numpy()
    assert np.array_equal(ours[:, 3], theirs[:, 3])
    assert np.abs(ours - theirs).max() < 1e-3
    others = [n for n in range(len(frames)) if n != condition_frame]
    expected = np.mean([np.abs(theirs[n] - theirs[condition_frame]).mean() for n in others]) / 255
    assert expected > 0.01
    assert measure_motion(torch.from_numpy(frames), condition_frame) == pytest.approx(expected, rel=1e-5)


def test_hue_value_and_edges_have_the_sums_that_opencv_gives() -> None:
    # OpenCV 5.0.0: cvtColor(float32, COLOR_RGB2HSV), Canny and dilate of the 8-bit value, on this very frame.
    ours = motion_channels(torch.from_numpy(video(96, 128, 1)))[0].double().sum(dim=(1, 2)).numpy()
    assert ours == pytest.approx([2162573.03, 4953.0, 2398930.0, 3105645.0], rel=1e-6)


def test_a_still_does_not_move_and_more_change_scores_more() -> None:
    still = torch.zeros(4, 16, 16, 3, dtype=torch.uint8) + 90
    assert measure_motion(still) == 0
    assert measure_motion(still[:1]) == 0
    scores = []
    for shift in (1, 4):
        frames = still.clone()
        for index in range(4):
            frames[index, :, : 2 + shift * index] = torch.tensor([250, 20, 20], dtype=torch.uint8)
        scores.append(measure_motion(frames))
    assert 0 < scores[0] < scores[1] < 1
