"""FreeInit against diffusers where that is right, and against its arithmetic in sigma space and below strength 1."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.pipelines.free_init_utils import FreeInitMixin

from pia_ray.animation import Animation
from pia_ray.config.knobs import AnimationParams
from pia_ray.config.model import ModelConfig
from pia_ray.pia.animator import Animator
from pia_ray.pia.components import Components
from pia_ray.pia.denoising.denoise import denoise
from pia_ray.pia.denoising.free_init import low_pass, mix
from pia_ray.pia.denoising.schedulers import make_scheduler
from pia_ray.pia.engine import Engine
from pia_ray.pia.evaluation import Branch
from pia_ray.pia.loading.load import assemble
from pia_ray.testing import make_pipeline_folder
from pia_ray.weights import resolve
from tests.pia.test_engine import alone, ask, assert_same, model_of, reference, run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pipeline_folder(tmp_path_factory.mktemp("checkpoint"), vae_factor=4)


@pytest.fixture(scope="module")
def model(folder: Path) -> ModelConfig:
    return model_of(folder)


@pytest.fixture(scope="module")
def components(model: ModelConfig) -> Components:
    return assemble(resolve(model), model)


@pytest.mark.parametrize("method", ["butterworth", "gaussian", "ideal"])
@pytest.mark.parametrize("shape", [(16, 8, 6), (5, 7, 3)])
@pytest.mark.parametrize("stops", [(0.25, 0.25), (0.4, 0.1), (0.0, 0.25)])
def test_the_filter_equals_that_of_diffusers(method: str, shape: tuple[int, ...], stops: tuple[float, float]) -> None:
    spatial, temporal = stops
    params = AnimationParams(
        prompt="sea",
        free_init=method,
        free_init_order=3,
        free_init_spatial_stop=spatial,
        free_init_temporal_stop=temporal,
    )
    expected = FreeInitMixin()._get_free_init_freq_filter((1, 4, *shape), "cpu", method, 3, spatial, temporal)
    torch.testing.assert_close(low_pass(params, shape, torch.device("cpu")).expand(1, 4, *shape), expected)


def test_the_mixture_equals_that_of_diffusers() -> None:
    slow, fast = torch.randn(2, 4, 6, 8, 5, generator=torch.Generator().manual_seed(0))
    kept = low_pass(AnimationParams(prompt="sea", free_init="butterworth"), (6, 8, 5), torch.device("cpu"))
    torch.testing.assert_close(mix(slow, fast, kept), FreeInitMixin()._apply_freq_filter(slow, fast, kept))


@pytest.mark.parametrize(
    "knobs",
    [
        {"free_init": "butterworth"},
        {"free_init": "gaussian", "free_init_fast_sampling": "on", "num_inference_steps": 5},
        {"free_init": "ideal", "scheduler": "ddpm", "free_init_spatial_stop": 0.5, "free_init_iters": 2},
        {"free_init": "butterworth", "eta": 1.0, "free_init_iters": 2, "free_init_order": 2},
    ],
    ids=str,
)
def test_frames_equal_those_of_diffusers(
    knobs: dict[str, Any], folder: Path, components: Components, model: ModelConfig
) -> None:
    request = ask(model, seed=3, **{"num_inference_steps": 3, **knobs})
    params = request.params

    def enable(pipe: Any) -> None:
        pipe.enable_free_init(
            num_iters=params.free_init_iters,
            use_fast_sampling=params.free_init_fast_sampling == "on",
            method=params.free_init,
            order=params.free_init_order,
            spatial_stop_frequency=params.free_init_spatial_stop,
            temporal_stop_frequency=params.free_init_temporal_stop,
        )

    ours = alone(components, request).frames
    assert_same(ours, reference(folder, request, tune=enable))
    with pytest.raises(AssertionError, match="off by"):
        assert_same(ours, alone(components, ask(model, seed=3, **{**knobs, "free_init": "off"})).frames)


def test_in_sigma_space_it_is_what_it_is_in_ddim(components: Components, model: ModelConfig) -> None:
    """Euler's step and DDIM's are the same but for the last, whose level the checkpoint's DDIM takes from its betas."""
    knobs = {"seed": 5, "free_init": "butterworth", "num_inference_steps": 6, "guidance_scale": 1.0}
    euler, ddim = (alone(components, ask(model, scheduler=name, **knobs)).frames for name in ("euler", "ddim"))
    assert_same(euler, ddim, mean=1.5, most=12)
    plain = alone(components, ask(model, scheduler="ddim", **{**knobs, "free_init": "off"})).frames
    with pytest.raises(AssertionError, match="off by"):
        assert_same(plain, ddim, mean=1.5, most=12)


@pytest.mark.parametrize("scheduler", ["ddim", "euler"])
def test_below_strength_1_each_time_starts_from_the_noised_result_and_the_noised_picture(scheduler: str) -> None:
    params = AnimationParams(
        prompt="sea",
        scheduler=scheduler,
        num_inference_steps=5,
        strength=0.6,
        num_frames=4,
        free_init="gaussian",
        free_init_iters=2,
        guidance_scale=1.0,
    )
    generator = torch.Generator().manual_seed(1)
    noise, fresh = torch.randn(2, 4, 4, 6, 6, generator=generator)
    still = torch.randn(4, 1, 6, 6, generator=generator)

    def made() -> Any:
        return make_scheduler({"steps_offset": 1, "timestep_spacing": "leading"}, scheduler, steps=5)

    program = denoise(
        params,
        schedulers=[made(), made()],
        noise=noise,
        fresh_noise=lambda: fresh,
        condition=still,
        branches=(Branch(torch.zeros(1, 1), torch.zeros(1, 1, 1, 1), still),),
        generator=generator,
    )
    evaluation = next(program)
    try:
        while True:
            evaluation = program.send(0.3 * evaluation.latents[None])
    except StopIteration as end:
        ours = end.value

    expected = still.expand_as(noise)
    kept = low_pass(params, (4, 6, 6), torch.device("cpu"))
    for iteration in range(2):
        steps = made()
        steps.set_begin_index(2) if scheduler == "euler" else None
        timesteps = steps.timesteps[2:]
        picture = still.expand_as(noise)
        start = steps.add_noise(expected, noise, timesteps[:1])
        if iteration:
            start = FreeInitMixin()._apply_freq_filter(start, steps.add_noise(picture, fresh, timesteps[:1]), kept)
        latents = start
        for timestep in timesteps:
            scaled = steps.scale_model_input(latents, timestep)
            latents = steps.step(0.3 * scaled, timestep, latents).prev_sample
        expected = latents
    torch.testing.assert_close(ours, expected)


def test_rows_with_and_without_it_equal_their_single_runs(components: Components, model: ModelConfig) -> None:
    requests = [
        ask(model, seed=1, free_init="butterworth", scheduler="euler-a"),
        ask(model, seed=2),
        ask(model, seed=3, free_init="ideal", free_init_iters=2, free_init_fast_sampling="on", scheduler="heun"),
    ]
    for request, outcome in zip(requests, run(Engine(components, batch_size=3), requests), strict=True):
        assert isinstance(outcome, Animation)
        assert_same(outcome.frames, alone(components, request).frames)


def test_progress_counts_every_iteration(model: ModelConfig) -> None:
    seen: list[tuple[int, int]] = []
    with Animator(model) as animator:
        request = ask(model, num_inference_steps=2, free_init="ideal", free_init_iters=3)
        animator.submit(request, on_step=lambda done, total: seen.append((done, total))).result()
    assert seen == [(done, 6) for done in range(1, 7)]


@pytest.mark.parametrize(("word", "method"), [(False, "off"), ("on", "butterworth"), ("Gaussian", "gaussian")])
def test_words_for_it_are_understood(word: object, method: str) -> None:
    assert AnimationParams(prompt="sea", free_init=word).free_init == method
