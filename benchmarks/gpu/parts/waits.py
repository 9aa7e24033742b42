"""The points of a step at which the host waits for the GPU, for every scheduler."""

from __future__ import annotations

import collections
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import torch

from benchmarks.gpu.budget import Budget
from benchmarks.gpu.part import Part, PartCard
from benchmarks.gpu.random_model import Cost, RandomModel, animate
from pia_ray.pia.denoising.schedulers import SCHEDULERS
from pia_ray.pia.engine import Engine

STEPS: Final = 6
"""At most. Few frames of the smaller size do, because the host's work does not depend on the size."""

MESSAGE: Final = "synchronizing CUDA operation"

Waits = collections.Counter[str]
"""Number of waits by file and line."""


def measure(model: RandomModel, card: PartCard, budget: Budget) -> None:
    """Counts per row its start and its steps; the copy of the frames at the end is meant to wait."""
    engine = Engine(model.components, batch_size=1)
    small = {"side": model.size.other_side, "num_frames": 4, "num_inference_steps": min(STEPS, model.size.steps)}
    animate(engine, model.request(**small))
    on_gpu = model.device.type == "cuda"
    for seed, name in enumerate(SCHEDULERS):
        request = model.request(seed, scheduler=name, **small)
        with counted_waits(on_gpu=on_gpu) as start:
            row = engine.join(request)
        steps = 0
        with counted_waits(on_gpu=on_gpu) as waits:
            while row.latents is None and row.error is None:
                engine.advance()
                steps += 1
        if row.error is not None:
            card.problems.append(f"{name}: {row.error}")
        per_step = sum(waits.values()) / steps
        card.numbers[name] = {
            "at_start": sum(start.values()) if on_gpu else None,
            "per_step": per_step if on_gpu else None,
            "where": dict(start + waits),
            "forwards": steps,
        }
        if per_step:
            card.lines.append(f"{name:20} {per_step:5.2f} a step: {', '.join(waits)}")
            card.problems.append(f"{name}: the host waits {per_step:.2f} times a step")
    if on_gpu:
        most = max(found["at_start"] for found in card.numbers.values())
        free = sum(not found["per_step"] for found in card.numbers.values())
        card.lines.append(
            f"{free} of {len(SCHEDULERS)} schedulers never wait; a row's start waits {most} times at most"
        )
    else:
        card.lines.append(f"stepped {len(SCHEDULERS)} schedulers; a CPU has no queue, so that waits are not measured")


@contextmanager
def counted_waits(*, on_gpu: bool) -> Iterator[Waits]:
    """The waits in the context, complete when it has ended; none are found without a GPU."""
    waits: Waits = collections.Counter()
    with warnings.catch_warnings(record=True) as caught, _debug_mode(on_gpu):
        warnings.simplefilter("always")
        yield waits
    waits.update(
        f"{Path(warning.filename).name}:{warning.lineno}" for warning in caught if MESSAGE in str(warning.message)
    )


@contextmanager
def _debug_mode(on_gpu: bool) -> Iterator[None]:
    set_mode: Callable[[str], None] = torch.cuda.set_sync_debug_mode if on_gpu else lambda mode: None
    set_mode("warn")
    try:
        yield
    finally:
        set_mode("default")


PART: Final = Part("waits", "waits of the host for the GPU", Cost(steps=26 * STEPS / 16, loads=1, fixed_s=10), measure)
