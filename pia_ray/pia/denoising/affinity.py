"""PIA's motion tables as affinity coefficients per frame: 1 keeps a frame equal to the picture, less lets it differ.

Pure functions on numbers. Source of the tables: PIA, arXiv 2312.13964, and its published code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from pia_ray.config.knobs import LOOPS

TABLES: Final[tuple[tuple[float, ...], ...]] = (
    (1.0, 0.9, 0.85, 0.85, 0.85, 0.8),
    (1.0, 0.8, 0.8, 0.8, 0.79, 0.78, 0.75),
    (1.0, 0.8, 0.7, 0.7, 0.7, 0.7, 0.7, 0.7, 0.7, 0.7, 0.6, 0.5, 0.5),
    (1.0, 0.9, 0.85, 0.85, 0.85, 0.8, 0.8, 0.8, 0.8, 0.8, 0.8, 0.8, 0.85, 0.85, 0.9, 1.0),
    (1.0, 0.8, 0.8, 0.8, 0.79, 0.78, 0.75, 0.75, 0.75, 0.75, 0.75, 0.78, 0.79, 0.8, 0.8, 1.0),
    (1.0, 0.8, 0.7, 0.7, 0.7, 0.7, 0.6, 0.5, 0.5, 0.6, 0.7, 0.7, 0.7, 0.7, 0.8, 1.0),
    (0.5, 0.4, 0.4, 0.4, 0.35, 0.3),
    (0.5, 0.4, 0.4, 0.4, 0.35, 0.35, 0.3, 0.25, 0.2),
    (0.5, 0.2),
)
"""By motion scale; the index is the distance in frames from the condition frame, and the last value holds beyond."""


def affinity(
    motion_scale: int,
    num_frames: int,
    *,
    condition_frame: int = 0,
    coefficients: Sequence[float] | None = None,
) -> tuple[float, ...]:
    """One coefficient per frame for a video whose `condition_frame` is the picture.

    It depends on the distance in frames from that frame; `coefficients` replace the table of `motion_scale`. The
    published loop tables close at 16 frames only. For other lengths the same curve is stretched or shrunk, so that a
    loop of any length, which starts at frame 0, ends on the picture.
    """
    if coefficients is None and motion_scale in LOOPS:
        return tuple(_stretch(TABLES[motion_scale], num_frames))
    table = TABLES[motion_scale] if coefficients is None else coefficients
    return tuple(table[min(abs(frame - condition_frame), len(table) - 1)] for frame in range(num_frames))


def keyframe_affinity(
    motion_scale: int,
    num_frames: int,
    *,
    keyframes: Sequence[int],
    coefficients: Sequence[float] | None = None,
) -> tuple[float, ...]:
    """One coefficient per frame for a video with several keyframes.

    It falls linearly from the highest coefficient at each keyframe to the lowest one at the frame farthest from any
    keyframe. With keyframes at the first and the last frame this is the arithmetic of the original's
    `prepare_mask_coef_multi_cond`, with the table's range in place of its range from 0.2 to 1. Source: PIA's published
    code.
    """
    table = TABLES[motion_scale] if coefficients is None else coefficients
    distances = [min(abs(frame - keyframe) for keyframe in keyframes) for frame in range(num_frames)]
    farthest = max(1, *distances)
    return tuple(max(table) - (max(table) - min(table)) * distance / farthest for distance in distances)


def nearest_keyframe(num_frames: int, keyframes: Sequence[int]) -> tuple[int, ...]:
    """The index of each frame's keyframe: the nearest, and of two as near the earlier one. Source: as above."""
    order = sorted(range(len(keyframes)), key=lambda index: keyframes[index])
    nearest = []
    for frame in range(num_frames):
        distances = [abs(frame - keyframes[index]) for index in order]
        nearest.append(order[distances.index(min(distances))])
    return tuple(nearest)


def _stretch(table: tuple[float, ...], num_frames: int) -> list[float]:
    if num_frames == len(table):
        return list(table)
    curve = []
    for frame in range(num_frames):
        at = frame * (len(table) - 1) / max(1, num_frames - 1)
        left = min(int(at), len(table) - 2)
        curve.append(table[left] + (at - left) * (table[left + 1] - table[left]))
    return curve
