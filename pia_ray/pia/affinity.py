"""PIA's motion tables as affinity coefficients per frame: 1 says "this frame is the picture", lower leaves it freer.

Pure functions on numbers. Source of the tables: PIA, arXiv 2312.13964, and its published code.
"""

from __future__ import annotations

from typing import Final

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
"""By motion scale; the index is the distance in frames from the condition frame, the last value goes on."""

LOOPS: Final = range(3, 6)
"""Motion scales whose tables close: the last frame is the picture again."""


def affinity(motion_scale: int, num_frames: int) -> tuple[float, ...]:
    """One coefficient per frame for a video whose first frame is the picture.

    The published loop tables close at 16 frames only. Other lengths get the same curve stretched or shrunk, so that
    a loop of any length ends on the picture.
    """
    table = TABLES[motion_scale]
    if motion_scale in LOOPS:
        return tuple(_stretch(table, num_frames))
    return tuple(table[min(frame, len(table) - 1)] for frame in range(num_frames))


def _stretch(table: tuple[float, ...], num_frames: int) -> list[float]:
    if num_frames == len(table):
        return list(table)
    curve = []
    for frame in range(num_frames):
        at = frame * (len(table) - 1) / max(1, num_frames - 1)
        left = min(int(at), len(table) - 2)
        curve.append(table[left] + (at - left) * (table[left + 1] - table[left]))
    return curve
