"""A row never makes its host wait for a GPU: not at its start, and not at a step of any scheduler."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pia_ray import AnimationRequest
from pia_ray.config.knobs import AnimationParams
from pia_ray.config.model import ModelConfig
from pia_ray.pia.components import Components
from pia_ray.pia.denoising.conditions import Conditions
from pia_ray.pia.denoising.denoise import denoise
from pia_ray.pia.denoising.row_program import row_program
from pia_ray.pia.denoising.scheduler_steps import noised, step
from pia_ray.pia.denoising.schedulers import SCHEDULERS, make_configured, make_scheduler
from pia_ray.pia.evaluation import Program
from pia_ray.pia.loading.load import assemble
from pia_ray.pia.transfers import to_device
from pia_ray.prepare import prepare
from pia_ray.testing import make_pipeline_folder
from pia_ray.weights import resolve
from tests.pia.fake_gpu import GPU, FakeGPU
from tests.pia.test_engine import SIZE, ask, model_of, picture

OWN = {"prediction_type": "epsilon", "steps_offset": 1, "timestep_spacing": "leading"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    return model_of(make_pipeline_folder(tmp_path_factory.mktemp("checkpoint"), vae_factor=4))


@pytest.fixture(scope="module")
def components(model: ModelConfig) -> Components:
    return assemble(resolve(model), model)


@pytest.fixture
def gpu() -> Iterator[FakeGPU]:
    with FakeGPU() as fake:
        yield fake


def run(program: Program) -> None:
    """Answers every evaluation, as the engine does."""
    with torch.inference_mode():
        try:
            evaluation = next(program)
            while True:
                seen = [branch.frames_of(evaluation.latents) for branch in evaluation.branches]
                evaluation = program.send(torch.stack(seen or [evaluation.latents]))
        except StopIteration:
            pass


@pytest.mark.parametrize("name", SCHEDULERS)
def test_no_step_of_any_scheduler_waits(name: str, gpu: FakeGPU) -> None:
    params = AnimationParams(
        prompt="sea", num_inference_steps=6, num_frames=2, scheduler=name, guidance_scale=1.0, strength=0.5, eta=1.0
    )
    noise = torch.empty(4, 2, 4, 4, device=GPU)
    program = denoise(
        params,
        schedulers=[make_scheduler(OWN, name, steps=steps) for steps in params.iterations],
        noise=noise,
        fresh_noise=lambda: to_device(torch.randn(noise.shape), GPU),
        condition=noise[:, :1],
        branches=(),
        generator=torch.Generator(),
    )
    run(program)
    assert gpu.num_operators
    assert not gpu.waits


def on_gpu(components: Components) -> Components:
    def moved(module: Any) -> Any:
        return copy.deepcopy(module)._apply(lambda weight: torch.empty_like(weight, device=GPU))

    parts = {name: moved(getattr(components, name)) for name in ("unet", "vae", "text_encoder")}
    return replace(components, device=GPU, **parts)


STARTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "weighted prompt and chain": {
        "prompt": "a (red:1.3) cat",
        "prompt_syntax": "a1111",
        "num_frames": 6,
        "context_frames": 4,
        "long_video": "chain",
    },
    "FreeInit and windows": {
        "free_init": "butterworth",
        "free_init_iters": 2,
        "num_inference_steps": 2,
        "num_frames": 6,
        "context_frames": 4,
        "context_overlap": 2,
        "context_schedule": "uniform-loop",
    },
}


@pytest.mark.parametrize("case", STARTS)
def test_a_row_waits_neither_at_its_start_nor_later(
    case: str, components: Components, model: ModelConfig, gpu: FakeGPU
) -> None:
    parts = on_gpu(components)
    run(row_program(ask(model, **STARTS[case]), parts, Conditions(parts)))
    assert gpu.num_operators
    assert not gpu.waits


def test_no_input_of_a_row_makes_it_wait(components: Components, model: ModelConfig, gpu: FakeGPU) -> None:
    parts = on_gpu(components)
    params = AnimationParams(prompt="cat", num_frames=3, num_inference_steps=1, width=SIZE, height=SIZE)
    width, side = int(parts.text_encoder.config.hidden_size), SIZE // 4
    embeds = np.zeros((77, width), np.float32)
    request = AnimationRequest(
        picture(0),
        params,
        end_image=picture(1),
        mask_image=Image.new("L", (SIZE, SIZE)),
        latents=np.zeros((4, 3, side, side), np.float32),
        prompt_embeds=embeds,
        negative_prompt_embeds=embeds,
    )
    run(row_program(prepare(request, model), parts, Conditions(parts)))
    assert gpu.num_operators
    assert not gpu.waits


@pytest.mark.parametrize("order", [1, 2, 3])
def test_steps_of_unipc_with_scalars_in_host_memory_are_those_of_diffusers(order: int) -> None:
    config = {**OWN, "solver_order": order}
    ours, theirs = (make_configured(config, "unipc", steps=6) for _ in range(2))
    random = torch.Generator().manual_seed(0)
    latents = torch.randn(4, 2, 4, 4, generator=random)
    expected = latents[None]
    for timestep in ours.timesteps:
        prediction = torch.randn(latents.shape, generator=random)
        latents = step(ours, prediction, timestep, latents, {})
        expected = theirs.step(prediction[None], timestep, expected).prev_sample
    assert torch.equal(latents, expected[0])


@pytest.mark.parametrize("name", SCHEDULERS)
def test_noised_latents_are_those_of_diffusers_to_the_bit(name: str) -> None:
    scheduler = make_scheduler(OWN, name, steps=4)
    latents, noise = torch.randn(2, 4, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    for timestep in scheduler.timesteps:
        expected = scheduler.add_noise(latents[None], noise[None], timestep.reshape(1))[0]
        assert torch.equal(noised(scheduler, latents, noise, timestep), expected)
