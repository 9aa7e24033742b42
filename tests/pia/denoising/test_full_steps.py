"""The steps that a preset evaluates: enough for its quality, fewer where the sampler is smooth."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from pia_ray.config.knob_types import Preset, Scheduler
from pia_ray.config.knobs import AnimationParams
from pia_ray.pia.denoising.full_steps import SMOOTH, full_steps


def steps_of(count: int = 25, *, steps: int = 25, **knobs: Any) -> tuple[int, ...]:
    return full_steps(AnimationParams(prompt="-", **knobs), steps=steps, count=count)


def test_the_default_evaluates_every_step() -> None:
    assert steps_of() == tuple(range(25))


def test_presets_evaluate_14_and_10_of_25_guided_steps() -> None:
    assert steps_of(preset="balanced") == (0, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 24)
    assert steps_of(preset="fast") == (0, 1, 4, 7, 10, 13, 16, 19, 22, 24)


def test_without_guidance_presets_evaluate_fewer_steps() -> None:
    assert steps_of(preset="balanced", guidance_scale=1) == (0, 3, 6, 9, 12, 15, 18, 21, 24)
    assert steps_of(6, steps=6, preset="balanced", guidance_scale=1) == (0, 2, 4, 5)
    assert steps_of(6, steps=6, preset="fast", guidance_scale=1) == (0, 3, 5)
    assert steps_of(8, steps=8, preset="balanced", guidance_scale=1) == (0, 2, 4, 6, 7)
    assert steps_of(8, steps=8, preset="fast", guidance_scale=1) == (0, 3, 6, 7)


@pytest.mark.parametrize("preset", ["balanced", "fast"])
@pytest.mark.parametrize(
    "knobs",
    [
        *({"scheduler": scheduler} for scheduler in get_args(Scheduler) if scheduler not in SMOOTH),
        {"eta": 0.5},
        {"steps": 8, "count": 8},
        {"steps": 5, "count": 5, "guidance_scale": 1},
    ],
    ids=str,
)
def test_every_step_is_evaluated_where_leaving_steps_out_costs_too_much(preset: Preset, knobs: dict[str, Any]) -> None:
    count = knobs.get("count", 25)
    assert steps_of(**{**knobs, "preset": preset}) == tuple(range(count))


@pytest.mark.parametrize("preset", get_args(Preset))
@pytest.mark.parametrize("guidance_scale", [1.0, 7.5])
def test_the_first_and_the_last_steps_are_evaluated_whatever_the_number(preset: Preset, guidance_scale: float) -> None:
    for steps in (1, 2, 3, 8, 12, 20, 25, 26, 50, 51):
        for count in {1, 2, steps // 2, steps} - {0}:
            full = steps_of(count, steps=steps, preset=preset, guidance_scale=guidance_scale)
            assert full == tuple(sorted(set(full)))
            first = {0, min(guidance_scale > 1, count - 1)}
            assert {*first, count - 1} <= set(full) <= set(range(count)), (steps, count, full)


def test_a_shorter_part_of_a_schedule_keeps_the_distance() -> None:
    assert steps_of(12, preset="fast") == (0, 1, 4, 7, 10, 11)
