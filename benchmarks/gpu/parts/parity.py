"""One row by diffusers' PIAPipeline and by ours, over the same weights, in each precision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import numpy as np
import torch

from benchmarks.gpu.budget import Budget
from benchmarks.gpu.part import Part, PartCard
from benchmarks.gpu.random_model import Cost, RandomModel, animate, name_of
from pia_ray.bench.reference import run_pipeline
from pia_ray.bench.similarity import Frames, psnr
from pia_ray.pia.engine import Engine

LEAST_PSNR_DB: Final = 40.0
"""Of the two videos in float32, where both round in an order of their own."""

MOST_WORSE_DB: Final = 3.0
"""In half precision ours may be so much farther from diffusers' float32 video than diffusers' own."""

LEAST_SPREAD: Final = 5.0
"""Standard deviation of a video's pixels, in levels of 255: below it, the weights draw nothing to compare."""

MOST_DB: Final = 100.0
"""Stands for equal videos."""


def measure(model: RandomModel, card: PartCard, budget: Budget) -> None:
    """Float32 comes first, because the others are compared with it; convolutions do without TF32."""
    true: Frames | None = None
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        name = name_of(dtype)
        with plain_float32():
            theirs, ours = both(model, dtype)
        true = theirs if true is None else true
        own, other, between = (decibels(*pair) for pair in ((ours, true), (theirs, true), (ours, theirs)))
        card.numbers[name] = {
            "ours_to_diffusers_db": between,
            "ours_to_float32_db": own,
            "diffusers_to_float32_db": other,
            "largest_difference": int(np.abs(ours.astype(np.int16) - theirs).max()),
            "spread": round(float(ours.std()), 1),
            "movement": round(float(np.abs(np.diff(ours.astype(np.int16), axis=0)).mean()), 1),
        }
        card.lines.append(
            f"{name:9} to diffusers {between:5.1f} dB; to its float32: ours {own:5.1f}, diffusers {other:5.1f} dB"
        )
        if ours.std() < LEAST_SPREAD:
            card.problems.append(f"{name}: the video is flat, so that its equality means nothing")
        if between < LEAST_PSNR_DB if dtype == torch.float32 else own < other - MOST_WORSE_DB:
            card.problems.append(f"{name}: the video is not diffusers'")
        model.free()


def both(model: RandomModel, dtype: torch.dtype) -> tuple[Frames, Frames]:
    """diffusers' frames and ours of one row; ours come second, because they rewrite the weights' modules."""
    request = model.request(num_inference_steps=model.size.few_steps)
    pipeline = model.pipeline(dtype)
    components = model.components_of(pipeline)
    theirs = np.stack([np.asarray(frame) for frame in run_pipeline(pipeline, request, components)])
    (ours,) = animate(Engine(components, batch_size=1), request)
    return theirs, ours.frames


def decibels(one: Frames, other: Frames) -> float:
    """PSNR, bounded, so that it is a number in JSON."""
    return round(min(MOST_DB, psnr(one, other)), 2)


@contextmanager
def plain_float32() -> Iterator[None]:
    """Convolutions in float32 without TF32, which has the digits of float16."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


# A step in float32 without TF32 takes about eight times as long as in half precision.
PART: Final = Part(
    "parity", "one row by diffusers and by us, in three precisions", Cost(steps=8 * 2 * 10, loads=1), measure
)
