"""The endpoint's engine, in this process: a cancelled row frees it, and a new size joins in the middle of a row."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Final

from benchmarks.gpu.budget import Budget
from benchmarks.gpu.compiling import num_graphs
from benchmarks.gpu.part import Part, PartCard
from benchmarks.gpu.random_model import Cost, RandomModel
from pia_ray.animation import Animation
from pia_ray.pia.animator import Animator

BEFORE: Final = 4
"""Steps of the long row before something happens."""

LONG: Final = 200
"""Steps of the long row, which is cancelled long before."""


class Clocked:
    """A row's progress: the host's time at its start and after each step."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.under_way = threading.Event()

    def start(self) -> None:
        """Called when the row begins."""
        self.times.append(time.perf_counter())

    def step(self, done: int, steps: int) -> None:
        """Called after each step."""
        self.times.append(time.perf_counter())
        if done >= BEFORE:
            self.under_way.set()

    @property
    def gaps(self) -> list[float]:
        """Seconds between the calls."""
        return [after - before for before, after in zip(self.times, self.times[1:], strict=False)]


def measure(model: RandomModel, card: PartCard, budget: Budget) -> None:
    """The model is compiled here as an engine does it by itself, on a GPU."""
    _ = model.folder
    config = model.config.model_copy(update={"compile": "auto" if model.compiles else "off"})
    with Animator(config, batch_size=max(2, model.size.batches[-1] // 2)) as animator:
        animator.animate([model.request(num_inference_steps=2)])
        cancelled(model, card, animator)
        new_size(model, card, animator)


def cancelled(model: RandomModel, card: PartCard, animator: Animator) -> None:
    """Seconds from the cancel of a row to the start of one that wants the engine for itself."""
    with long_row(model, animator) as (running, long):
        following = Clocked()
        after = animator.submit(model.request(2, num_inference_steps=1), alone=True, on_start=following.start)
        asked = time.perf_counter()
        running.cancel()
        after.result()
    free_s, step_s = following.times[0] - asked, statistics.median(long.gaps)
    card.numbers["cancel"] = {"free_s": free_s, "step_s": step_s, "steps_run": len(long.gaps), "steps": LONG}
    card.lines.append(f"cancel: the engine is free after {1000 * free_s:.1f} ms; a step takes {1000 * step_s:.1f} ms")
    if not running.cancelled() or len(long.gaps) > LONG // 2:
        card.problems.append(f"cancel: the row went on for {len(long.gaps)} steps")


def new_size(model: RandomModel, card: PartCard, animator: Animator) -> None:
    """The longest gap between two steps of a row while one of another size joins, runs and leaves."""
    graphs = num_graphs()
    with long_row(model, animator) as (_, long):
        before = len(long.gaps)
        joining = model.request(4, side=model.size.other_side, num_inference_steps=2)
        asked = time.perf_counter()
        animator.submit(joining).result()
        other_s = time.perf_counter() - asked
    usual_s, longest_s = statistics.median(long.gaps[:before]), max(long.gaps[before:], default=0.0)
    compiled = num_graphs() - graphs
    card.numbers["new_size"] = {
        "usual_step_s": usual_s,
        "longest_step_s": longest_s,
        "seconds_of_the_new_row": other_s,
        "graphs": compiled,
    }
    card.lines.append(
        f"a new size in mid-stream: the longest step takes {1000 * longest_s:.1f} ms, usually {1000 * usual_s:.1f}; "
        f"the new row {other_s:.2f} s; {compiled} graphs compiled"
    )


@contextmanager
def long_row(model: RandomModel, animator: Animator) -> Iterator[tuple[Future[Animation], Clocked]]:
    """A context in which a long row is under way; it is cancelled at the end.

    Raises:
        RowError: the row failed.
    """
    long = Clocked()
    request = model.request(1, num_inference_steps=LONG)
    running = animator.submit(request, on_step=long.step, on_start=long.start)
    running.add_done_callback(lambda future: long.under_way.set())
    long.under_way.wait()
    if running.done():
        running.result()
    yield running, long
    running.cancel()


PART: Final = Part("endpoint", "cancel, and a new size in mid-stream", Cost(steps=8 * 25, loads=2, compiles=2), measure)
