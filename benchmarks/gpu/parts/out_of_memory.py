"""Memory that ends in the middle of rows: forwards are halved, all rows go on, and larger forwards come back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

import torch

from benchmarks.gpu.budget import Budget
from benchmarks.gpu.forwards import WatchedForward, watched
from benchmarks.gpu.part import Part, PartCard
from benchmarks.gpu.random_model import Cost, RandomModel
from pia_ray.animation import Animation
from pia_ray.pia.engine import Engine

STEPS: Final = 16
FREE_SHARE: Final = 0.6
"""Share of a full forward's activations that is left free: half of the forward fits, all of it does not."""


def measure(model: RandomModel, card: PartCard, budget: Budget) -> None:
    """On a CPU, whose memory cannot be bounded, the forward itself refuses the larger sizes."""
    rows = model.size.batches[-1]
    own, forward = watched(model.components)
    engine = Engine(batch_size=rows)
    errors: list[str] = []
    for seed in range(rows):
        engine.join(model.request(seed, num_inference_steps=STEPS), own)

    def largest_of(steps: int) -> int:
        """The largest forward that ran in the next steps."""
        forward.sizes.clear()
        for _ in range(steps):
            errors.extend(str(outcome) for _, outcome in engine.step() if not isinstance(outcome, Animation))
        return max(forward.sizes, default=0)

    before = largest_of(1)
    with scarce_memory(model, forward, lambda: largest_of(1)):
        scarce = largest_of(2)
    after = largest_of(STEPS - 4)
    simulated = model.device.type != "cuda"
    card.numbers |= {
        "rows": rows,
        "simulated": simulated,
        "forward_before": before,
        "forward_while_scarce": scarce,
        "forward_after": after,
        "forwards_without_memory": forward.failed,
        "recovered": after == before,
        "rows_failed": len(errors),
    }
    how = "refused by the forward itself" if simulated else "by a bound on torch's memory"
    end = "recovered" if after == before else "not recovered within these rows"
    card.lines.append(f"forwards of {before}, of {scarce} while memory is scarce ({how}), of {after} afterwards: {end}")
    if not forward.failed or scarce >= before:
        card.problems.append("no forward ran out of memory and was halved")
    if errors:
        card.problems.append(f"{len(errors)} of {rows} rows failed: {errors[0]}")


@contextmanager
def scarce_memory(model: RandomModel, forward: WatchedForward, full_step: Callable[[], object]) -> Iterator[None]:
    """A context in which a forward as large as those of `full_step` does not fit, and half of it does."""
    if model.device.type != "cuda":
        full_step()
        forward.most = max(forward.sizes) // 2
        yield
        forward.most = None
        return
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    taken = torch.cuda.memory_allocated()
    full_step()
    torch.cuda.synchronize()
    activations = torch.cuda.max_memory_allocated() - taken
    torch.cuda.empty_cache()
    _, total = torch.cuda.mem_get_info()
    usual = torch.cuda.get_per_process_memory_fraction()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + FREE_SHARE * activations) / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(usual)


PART: Final = Part(
    "out-of-memory", "memory ends between two steps, and comes back", Cost(steps=8 * STEPS, loads=1), measure
)
