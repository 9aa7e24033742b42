"""The sizes of the measurement: the real one for a GPU, two small ones for a CPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

SizeName = Literal["full", "reduced", "tiny"]


@dataclass(frozen=True)
class Size:
    """The model's architecture, the videos, and how often each thing is measured."""

    name: SizeName
    widths: tuple[int, ...]
    """Channels of the UNet by resolution."""
    groups: int
    """Of its GroupNorms."""
    heads: int
    num_frames: int
    side: int
    """Of the square frames, in px; the VAE's factor is 8."""
    other_side: int
    """Of frames of another size."""
    steps: int
    few_steps: int
    """Of parts that need no whole video."""
    rounds: int
    batches: tuple[int, ...]
    """Rows that denoise together."""
    job_rows: int
    """Rows of the catalogue job."""
    step_tflop: float
    """Operations of one step with guidance in diffusers' UNet: `pia_ray.bench.reference.step_flops`."""
    load_s: float
    """About the seconds that a model takes to load."""
    compile_s: float
    """About the seconds that a kind of forward takes to compile; three times as long is waited for one."""


FULL: Final = Size(
    name="full",
    widths=(320, 640, 1280, 1280),
    groups=32,
    heads=8,
    num_frames=16,
    side=512,
    other_side=256,
    steps=25,
    few_steps=8,
    rounds=3,
    batches=(1, 2, 4, 8),
    job_rows=8,
    step_tflop=35.354,
    load_s=20.0,
    compile_s=80.0,
)
"""Stable Diffusion 1.5 with PIA's motion modules."""

REDUCED: Final = Size(
    name="reduced",
    widths=(64, 128, 256, 256),
    groups=32,
    heads=8,
    num_frames=8,
    side=128,
    other_side=64,
    steps=8,
    few_steps=4,
    rounds=3,
    batches=(1, 2, 4),
    job_rows=4,
    step_tflop=0.02703,
    load_s=2.0,
    compile_s=60.0,
)
"""The same with a fifth of the widths and half of the layers, for a CPU."""

TINY: Final = Size(
    name="tiny",
    widths=(16, 32),
    groups=8,
    heads=4,
    num_frames=4,
    side=64,
    other_side=32,
    steps=3,
    few_steps=2,
    rounds=1,
    batches=(1, 2),
    job_rows=2,
    step_tflop=0.00014,
    load_s=0.5,
    compile_s=30.0,
)
"""To try whether everything runs; its numbers mean nothing."""

SIZES: Final = {size.name: size for size in (FULL, REDUCED, TINY)}
