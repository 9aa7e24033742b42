"""Rows that denoise together: seconds of a step, and the peak of memory beside the one that is planned with."""

from __future__ import annotations

import statistics
from typing import Final

import torch

from benchmarks.gpu.budget import Budget
from benchmarks.gpu.forwards import watched
from benchmarks.gpu.part import Part, PartCard
from benchmarks.gpu.random_model import Cost, RandomModel
from pia_ray.formatting import count_of
from pia_ray.pia.components import Components
from pia_ray.pia.device.memory import EVALUATION_WIDTHS, HEADROOM, evaluations_that_fit
from pia_ray.pia.engine import Engine

STEPS: Final = 4
"""Of which the first does not count."""


def measure(model: RandomModel, card: PartCard, budget: Budget) -> None:
    """Nothing is compiled. The peak is that of a step beyond what was taken before it."""
    for rows in model.size.batches:
        card.numbers[str(rows)] = found = of_rows(model, rows)
        peak, predicted = found["peak_bytes"], found["predicted_bytes"]
        memory = f"peak {peak / 2**30:.2f} GiB, planned {predicted / 2**30:.2f}" if peak else "peak not measured"
        step_ms = 1000 * found["step_s"]
        card.lines.append(
            f"{count_of(rows, 'row'):7} {step_ms:8.1f} ms a step, {step_ms / rows:8.1f} a row; "
            f"forwards of {found['forward']}; {memory}"
        )
        if peak > predicted / HEADROOM:
            card.problems.append(f"{count_of(rows, 'row')}: the peak is {peak / predicted:.2f} times the planned one")
        model.free()


def of_rows(model: RandomModel, rows: int) -> dict[str, float]:
    """The numbers of so many rows; bytes are 0 on a CPU."""
    parts = model.components
    watched_model, forward = watched(parts)
    engine = Engine(batch_size=rows)
    for seed in range(rows):
        engine.join(model.request(seed, num_inference_steps=STEPS), watched_model)
    engine.advance()
    before = _reset_peak(parts.device)
    seconds = [model.seconds(engine.advance) for _ in range(STEPS - 2)]
    peak = torch.cuda.max_memory_allocated() - before if parts.device.type == "cuda" else 0
    for row in list(engine.rows):
        engine.leave(row)
    largest = max(forward.sizes)
    side = model.size.side // parts.spatial_factor
    return {
        "step_s": statistics.median(seconds),
        "forward": largest,
        "peak_bytes": peak,
        "predicted_bytes": largest * _evaluation_bytes(parts, model.size.num_frames, side),
        "fit": evaluations_that_fit(parts, num_frames=model.size.num_frames, height=side, width=side) or 0,
    }


def _evaluation_bytes(parts: Components, num_frames: int, side: int) -> int:
    channels = parts.unet.config["block_out_channels"][0]
    return int(EVALUATION_WIDTHS * channels * num_frames * side * side * parts.dtype.itemsize)


def _reset_peak(device: torch.device) -> int:
    """Begins to watch for a new peak; the bytes that are taken already."""
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    return int(torch.cuda.memory_allocated())


PART: Final = Part("batches", "1, 2, 4 and 8 rows: time and memory", Cost(steps=15 * STEPS, loads=1), measure)
