"""A row's program under a preset: the steps that it asks the UNet for, and how near its latents come to exact."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from pia_ray.config.knobs import AnimationParams
from pia_ray.pia.denoising.denoise import denoise
from pia_ray.pia.denoising.schedulers import make_scheduler
from pia_ray.pia.evaluation import Branch
from pia_ray.types import OnStepEnd, StepEnd

SHAPE = (4, 3, 4, 4)


ALPHAS = torch.cumprod(1 - torch.linspace(0.00085, 0.012, 1000), 0)
"""Squares of the signal's share at each timestep of PIA's noise schedule."""


def ideal(latents: torch.Tensor, timestep: float) -> torch.Tensor:
    """The noise that the best possible model predicts where every value of the data is near -1 or 1."""
    signal, noise = float(ALPHAS[int(timestep)]) ** 0.5, float(1 - ALPHAS[int(timestep)]) ** 0.5
    variance = (0.3 * signal) ** 2 + noise**2
    return noise * (latents - signal * torch.tanh(signal * latents / variance)) / variance


def run(on_step_end: OnStepEnd | None = None, **knobs: Any) -> tuple[torch.Tensor, list[int]]:
    """The latents of a row and the steps that were evaluated, with the `ideal` model in place of the UNet."""
    params = AnimationParams(**{"prompt": "-", "num_frames": SHAPE[1], "guidance_scale": 1.0, **knobs})
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(SHAPE, generator=generator)
    branch = Branch(torch.zeros(2, 8), torch.ones(1, SHAPE[1], 1, 1), torch.zeros(4, 1, 4, 4))
    program = denoise(
        params,
        schedulers=[make_scheduler({}, params.scheduler, steps=steps) for steps in params.iterations],
        noise=noise,
        fresh_noise=lambda: torch.randn(SHAPE, generator=generator),
        condition=branch.condition,
        branches=(branch,),
        generator=generator,
        on_step_end=on_step_end,
    )
    evaluated: list[int] = []
    evaluation = next(program)
    while True:
        evaluated.append(evaluation.step)
        try:
            evaluation = program.send(ideal(evaluation.latents, evaluation.timestep)[None])
        except StopIteration as end:
            return end.value, evaluated


@pytest.mark.parametrize("preset", ["balanced", "fast"])
@pytest.mark.parametrize("scheduler", ["ddim", "euler", "dpm++2m", "unipc", "deis", "dpm++2s"])
def test_a_preset_comes_nearer_to_exact_than_as_many_steps_of_the_same_sampler(scheduler: str, preset: str) -> None:
    exact, every = run(scheduler=scheduler)
    latents, evaluated = run(scheduler=scheduler, preset=preset)
    rival, fewer = run(scheduler=scheduler, num_inference_steps=len(evaluated))
    assert len(every) == 25 > len(evaluated) == len(fewer)
    assert float((latents - exact).pow(2).mean()) < float((rival - exact).pow(2).mean())


def test_a_scheduler_with_two_evaluations_a_step_leaves_out_both() -> None:
    exact, every = run(scheduler="heun")
    latents, evaluated = run(scheduler="heun", preset="balanced")
    rival, fewer = run(scheduler="heun", num_inference_steps=14)
    assert (len(every), len(evaluated), len(fewer)) == (49, 27, 27)
    assert float((latents - exact).pow(2).mean()) < float((rival - exact).pow(2).mean())


def test_each_iteration_of_free_init_starts_anew() -> None:
    _, evaluated = run(preset="balanced", free_init="butterworth", free_init_iters=2)
    once = [0, 3, 6, 9, 12, 15, 18, 21, 24]
    assert evaluated == [*once, *(25 + step for step in once)]


def test_below_strength_1_the_first_step_that_is_run_is_evaluated() -> None:
    _, evaluated = run(preset="balanced", strength=0.5)
    assert evaluated == [0, 3, 6, 9, 11]


def test_after_a_callback_has_replaced_the_latents_the_next_step_is_evaluated() -> None:
    def shift(end: StepEnd) -> Mapping[str, torch.Tensor]:
        return {"latents": end.tensors["latents"] + 0.1} if end.step == 6 else {}

    def watch(end: StepEnd) -> None:
        return None

    _, evaluated = run(watch, preset="balanced")
    assert evaluated == [0, 3, 6, 9, 12, 15, 18, 21, 24]
    _, evaluated = run(shift, preset="balanced")
    assert evaluated == [0, 3, 6, 7, 9, 12, 15, 18, 21, 24]
