"""The seconds of a row by preset, by turns."""

from __future__ import annotations

import statistics
from functools import partial
from typing import Final, get_args

from benchmarks.gpu.budget import Budget
from benchmarks.gpu.part import Part, PartCard
from benchmarks.gpu.random_model import Cost, RandomModel, animate
from pia_ray.config.knob_types import Preset
from pia_ray.pia.denoising.full_steps import full_steps
from pia_ray.pia.engine import Engine


def measure(model: RandomModel, card: PartCard, budget: Budget) -> None:
    """Whole rows alone, nothing compiled; the ratio is of seconds within a round."""
    engine = Engine(model.components, batch_size=1)
    names = get_args(Preset)
    animate(engine, model.request(num_inference_steps=1))
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(model.size.rounds):
        for name in names[:: -1 if turn % 2 else 1]:
            request = model.request(turn, preset=name)
            times[name].append(model.seconds(partial(animate, engine, request)))
    for name in names:
        params = model.request(preset=name).params
        steps = params.num_inference_steps
        faster = statistics.median(exact / seconds for exact, seconds in zip(times["exact"], times[name], strict=True))
        evaluated = len(full_steps(params, steps=steps, count=steps))
        card.numbers[name] = {
            "median_s": statistics.median(times[name]),
            "least_s": min(times[name]),
            "most_s": max(times[name]),
            "faster": faster,
            "evaluated_steps": evaluated,
        }
        card.lines.append(
            f"{name:9} {statistics.median(times[name]):8.3f} s  {faster:5.2f} x  {evaluated} of {steps} steps"
        )


PART: Final = Part("presets", "the seconds of the presets", Cost(steps=3 * 25 * 2, loads=1), measure)
