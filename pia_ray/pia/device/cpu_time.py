"""The time that a full-size model takes on a CPU, from a measured speed. Numbers only: loads without torch."""

from __future__ import annotations

from typing import Final

FULL_ROW_TFLOP: Final = 870.0
"""25 steps with guidance, 16 frames of 512 x 512 px, and the decoding of the frames (docs/sizing.md)."""

TFLOP_PER_S_A_CORE: Final = 0.044
"""Useful work of one core in float32: 0.087 TFLOP/s on 2 cores (benchmarks/cards/2-cpus-x86-64-demo.json)."""


def full_row_s(cores: int) -> float:
    """Seconds that a row with the default knobs takes on so many cores with a full-size model."""
    return FULL_ROW_TFLOP / (TFLOP_PER_S_A_CORE * max(1, cores))


def slow_on_cpu(cores: int) -> str:
    """A sentence for people who run a full-size model without a GPU."""
    hours = full_row_s(cores) / 3600
    on = "one core" if cores <= 1 else f"{cores} cores"
    return (
        f"no GPU is used: a row with the default knobs, 25 steps of 16 frames of 512 x 512 px, takes some {hours:.1f} "
        f"hours with a full-size model on {on}"
    )
