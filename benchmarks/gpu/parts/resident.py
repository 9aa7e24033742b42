"""Whole videos by turns: diffusers' pipeline kept on the device, ours as it is, ours compiled."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Final

from benchmarks.gpu.budget import Budget
from benchmarks.gpu.compiling import compile_for, compiled_engine
from benchmarks.gpu.part import Part, PartCard
from benchmarks.gpu.random_model import Cost, RandomModel, animate
from pia_ray.bench.reference import run_pipeline
from pia_ray.pia.engine import Engine
from pia_ray.types import PreparedRequest

DIFFUSERS: Final = "diffusers, resident"
EAGER: Final = "pia-ray, eager"
COMPILED: Final = "pia-ray, compiled"

SHORTER: Final = 5
"""A step's time is the difference of a video and of one with so many times fewer steps: without text, VAE, copies."""

Ways = Mapping[str, Callable[[PreparedRequest], object]]


def measure(model: RandomModel, card: PartCard, budget: Budget) -> None:
    """The eager two come first, so that a time too short for compiling still compares them."""
    pipeline = model.pipeline(model.dtype)
    engine = Engine(model.components, batch_size=1)
    ways: dict[str, Callable[[PreparedRequest], object]] = {
        DIFFUSERS: lambda request: run_pipeline(pipeline, request, model.components),
        EAGER: lambda request: animate(engine, request),
    }
    show(model, card, by_turns(model, ways))
    if not model.compiles:
        card.lines.append("nothing is compiled on this device")
        return
    compiled = compiled_engine(model.components, "default")
    found = compile_for(compiled, model, model.request(num_inference_steps=2))
    card.numbers |= {"compile_s": found.seconds, "graphs": found.graphs, "rows_while_compiling": found.rows}
    if found.graphs:
        ways[COMPILED] = lambda request: animate(compiled, request)
        show(model, card, by_turns(model, ways))
    else:
        card.problems.append("torch compiled nothing")
    card.lines.append(f"compiled in {found.seconds:.0f} s, {found.graphs} graphs, {found.rows} rows meanwhile")


def by_turns(model: RandomModel, ways: Ways) -> dict[str, dict[str, list[float]]]:
    """The seconds of whole and of shorter videos by way, by turns; a first short round warms up."""
    times: dict[str, dict[str, list[float]]] = {name: {"video": [], "shorter": []} for name in ways}
    steps = model.size.steps
    for run in ways.values():
        run(model.request(num_inference_steps=1))
    for turn in range(model.size.rounds):
        for name in list(ways)[:: -1 if turn % 2 else 1]:
            for kind, num in (("video", steps), ("shorter", max(1, steps // SHORTER))):
                request = model.request(turn, num_inference_steps=num)
                times[name][kind].append(model.seconds(partial(ways[name], request)))
    return times


def show(model: RandomModel, card: PartCard, times: Mapping[str, Mapping[str, list[float]]]) -> None:
    """Replaces the card's ways by these."""
    steps = model.size.steps - max(1, model.size.steps // SHORTER)
    floor_s = model.size.step_tflop * 1e12 / model.flops_per_s
    ways: dict[str, Any] = {}
    card.lines.clear()
    for name, seconds in times.items():
        step_s = statistics.median(
            (video - shorter) / steps for video, shorter in zip(seconds["video"], seconds["shorter"], strict=True)
        )
        pairs = zip(times[DIFFUSERS]["video"], seconds["video"], strict=True)
        ways[name] = {
            "median_s": statistics.median(seconds["video"]),
            "least_s": min(seconds["video"]),
            "most_s": max(seconds["video"]),
            "step_s": step_s,
            "against_diffusers": statistics.median(theirs / ours for theirs, ours in pairs),
            "tflop_per_s": model.size.step_tflop / step_s,
            "share_of_floor": floor_s / step_s,
        }
        way = ways[name]
        card.lines.append(
            f"{name:20}{way['median_s']:8.3f} s a video ({way['least_s']:.3f} to {way['most_s']:.3f}), "
            f"{way['against_diffusers']:.2f} x; {1000 * step_s:8.1f} ms a step, {way['share_of_floor']:.0%} of floor"
        )
    card.numbers |= {"ways": ways, "matmul_tflop_per_s": model.flops_per_s / 1e12, "step_tflop": model.size.step_tflop}
    card.lines.append(
        f"the floor is {1000 * floor_s:.1f} ms a step: {model.size.step_tflop:.4g} TFLOP at the "
        f"{model.flops_per_s / 1e12:.4g} TFLOP/s of a large matrix product"
    )


PART: Final = Part(
    "resident", "diffusers resident, ours, ours compiled", Cost(steps=6 * 30 * 2.5, loads=1, compiles=1), measure
)
