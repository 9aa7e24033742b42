"""Videos of more frames than the motion modules have positions for: context windows and chains."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.pipelines.free_noise_utils import AnimateDiffFreeNoiseMixin

from pia_ray.animation import Animation
from pia_ray.config.knobs import AnimationParams
from pia_ray.config.model import ModelConfig
from pia_ray.errors import BadParameter
from pia_ray.pia.animator import Animator
from pia_ray.pia.components import Components
from pia_ray.pia.denoising.conditions import Conditions, affinity_mask
from pia_ray.pia.denoising.context_windows import segments, windows
from pia_ray.pia.denoising.schedulers import make_scheduler
from pia_ray.pia.denoising.window_blending import blend, frame_noise
from pia_ray.pia.engine import Engine
from pia_ray.pia.loading.load import assemble
from pia_ray.testing import make_pipeline_folder
from pia_ray.types import AnimationRequest, StepEnd
from pia_ray.weights import resolve
from tests.pia.test_engine import alone, ask, assert_same, model_of, run

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    return model_of(make_pipeline_folder(tmp_path_factory.mktemp("checkpoint"), vae_factor=4))


@pytest.fixture(scope="module")
def components(model: ModelConfig) -> Components:
    return assemble(resolve(model), model)


def knobs_of(**knobs: Any) -> AnimationParams:
    return AnimationParams(prompt="sea", **knobs)


@pytest.mark.parametrize("schedule", ["standard", "uniform", "uniform-loop"])
def test_windows_of_a_step_have_one_length_and_together_every_frame(schedule: str) -> None:
    for frames, size, overlap, stride in itertools.product((17, 33, 100), (8, 16), (0, 4, 7), (1, 4)):
        params = knobs_of(
            num_frames=frames,
            context_frames=size,
            context_overlap=overlap,
            context_stride=stride,
            context_schedule=schedule,
        )
        for step in (0, 1, 5, 6):
            views = windows(params, step)
            assert {len(view) for view in views} == {size}
            assert set(itertools.chain.from_iterable(views)) == set(range(frames))
            assert all(len(set(view)) == size for view in views)
            assert len(set(views)) == len(views)
            if schedule != "uniform-loop":
                assert all(list(view) == sorted(view) for view in views), "no window passes the end"
            if schedule == "standard":
                assert views == windows(params, 0)


def test_a_closed_loop_has_the_windows_of_animatediff() -> None:
    """The published rule: at each step, around the circle from the bit-mirrored share of the frames."""
    params = knobs_of(num_frames=64, context_frames=16, context_schedule="uniform-loop", context_stride=3)
    for step in range(12):
        mirrored = int(f"{step:064b}"[::-1], 2) / 2**64
        pad = round(64 * mirrored)
        expected = [
            tuple(frame % 64 for frame in range(first, first + 16 * stride, stride))
            for stride in (1, 2, 4)
            for first in range(int(mirrored * stride) + pad, 64 + pad, 16 * stride - 4)
        ]
        assert windows(params, step) == tuple(expected)
    assert len({windows(params, step) for step in range(8)}) == 8


def test_segments_of_a_chain_are_even_and_count_each_seam_once() -> None:
    for frames, size in itertools.product(range(2, 120), (2, 3, 16, 32)):
        lengths = segments(knobs_of(num_frames=frames, context_frames=size, long_video="chain"))
        assert sum(lengths) - (len(lengths) - 1) == frames
        assert max(lengths) <= size
        assert max(lengths) - min(lengths) <= 1
        assert len(lengths) == max(1, math.ceil((frames - 1) / (size - 1)))


@pytest.mark.parametrize(("kind", "theirs"), [("shuffle", "shuffle_context"), ("repeat", None), ("random", "random")])
def test_noise_beyond_the_first_window_is_that_of_free_noise(kind: str, theirs: str | None) -> None:
    params = knobs_of(num_frames=21, context_frames=8, context_overlap=3, noise=kind)
    noise = frame_noise(params, (4, 21, 3, 5), torch.Generator().manual_seed(4), CPU)
    drawn = torch.randn(4, 21, 3, 5, generator=torch.Generator().manual_seed(4))
    if theirs is None:
        expected = torch.cat([drawn[:, :8], drawn[:, :8], drawn[:, :5]], dim=1)
    else:
        mixin = AnimateDiffFreeNoiseMixin()
        mixin._free_noise_context_length, mixin._free_noise_context_stride = 8, 5
        mixin._free_noise_noise_type, mixin.vae_scale_factor = theirs, 1
        expected = mixin._prepare_latents_free_noise(
            1, 4, 21, 3, 5, torch.float32, CPU, torch.Generator().manual_seed(4)
        )[0]
    torch.testing.assert_close(noise, expected, rtol=0, atol=0)
    torch.testing.assert_close(noise[:, :8], drawn[:, :8], rtol=0, atol=0)


def test_predictions_are_averaged_by_a_pyramid() -> None:
    views = ((0, 1, 2, 3), (2, 3, 4, 5))
    predictions = torch.stack([torch.full((4, 4, 1, 1), value) for value in (1.0, 10.0, 3.0, 30.0)])
    blended = blend(predictions, views, 6)
    pyramid = (1, 2, 2, 1)
    third = (1 * pyramid[2] + 3 * pyramid[0]) / (pyramid[2] + pyramid[0])
    fourth = (1 * pyramid[3] + 3 * pyramid[1]) / (pyramid[3] + pyramid[1])
    expected = torch.tensor([1.0, 1.0, third, fourth, 3.0, 3.0])
    torch.testing.assert_close(blended[0, 0, :, 0, 0], expected)
    torch.testing.assert_close(blended[1, 0, :, 0, 0], 10 * expected)


@pytest.mark.parametrize("long_video", ["windows", "chain"])
def test_one_window_over_all_frames_is_the_plain_run_to_the_bit(
    long_video: str, components: Components, model: ModelConfig
) -> None:
    plain = alone(components, ask(model, num_frames=6)).frames
    whole = ask(model, num_frames=6, context_frames=6, long_video=long_video, context_schedule="uniform")
    assert np.array_equal(alone(components, whole).frames, plain)


def by_hand(
    components: Components,
    request: AnimationRequest,
    noise: torch.Tensor,
    condition: torch.Tensor,
    views: Any = None,
) -> torch.Tensor:
    """Latents of a DDIM run, one UNet call per window and guidance branch, averaged frame by frame."""
    params, frames = request.params, noise.shape[1]
    conditions = Conditions(components)
    scheduler = make_scheduler(components.scheduler_config, "ddim", steps=params.num_inference_steps)
    part = params.model_copy(update={"num_frames": frames})
    mask = affinity_mask(part, keyframes=[0], device=CPU).expand(1, *noise.shape[1:])
    fixed = torch.cat([mask, condition[:, None].expand(-1, frames, -1, -1)])
    latents = noise
    for step, timestep in enumerate(scheduler.timesteps):
        sides = []
        for text in (params.negative_prompt, params.prompt):
            total, weight = torch.zeros_like(latents), torch.zeros(frames, 1, 1)
            for view in views(step) if views else [tuple(range(frames))]:
                seen = torch.cat([latents, fixed])[:, list(view)][None]
                prompt = conditions.prompt(text, clip_skip=None)[None].repeat_interleave(len(view), dim=0)
                predicted = components.unet(seen, timestep, encoder_hidden_states=prompt).sample[0]
                for position, frame in enumerate(view):
                    share = min(position + 1, len(view) - position)
                    total[:, frame] += share * predicted[:, position]
                    weight[frame] += share
            sides.append(total / weight)
        guided = sides[0] + params.guidance_scale * (sides[1] - sides[0])
        latents = scheduler.step(guided, timestep, latents).prev_sample
    return latents


def latents_of(components: Components, request: AnimationRequest) -> torch.Tensor:
    outcome = alone(components, replace(request, output_type="latent"))
    assert isinstance(outcome.output, torch.Tensor)
    return outcome.output


@pytest.mark.parametrize("schedule", ["standard", "uniform-loop"])
@torch.inference_mode()
def test_windows_denoise_as_they_do_by_hand(schedule: str, components: Components, model: ModelConfig) -> None:
    request = ask(
        model,
        num_frames=9,
        context_frames=4,
        context_overlap=1,
        context_schedule=schedule,
        num_inference_steps=2,
        motion_scale=2,
    )
    generator = torch.Generator().manual_seed(request.params.seed)
    noise = frame_noise(request.params, (4, 9, 8, 8), generator, CPU)
    condition = Conditions(components).picture(request.image, generator)
    expected = by_hand(components, request, noise, condition, lambda step: windows(request.params, step))
    torch.testing.assert_close(latents_of(components, request), expected, rtol=1e-3, atol=1e-3)


@torch.inference_mode()
def test_a_chain_goes_on_from_the_last_frame_of_each_segment(components: Components, model: ModelConfig) -> None:
    request = ask(model, num_frames=7, context_frames=4, long_video="chain", num_inference_steps=2)
    generator = torch.Generator().manual_seed(request.params.seed)
    shape = (4, 4, 8, 8)
    noise = torch.randn(shape, generator=generator)
    first = by_hand(components, request, noise, Conditions(components).picture(request.image, generator))
    second = by_hand(components, request, torch.randn(shape, generator=generator), first[:, -1])
    expected = torch.cat([first, second[:, 1:]], dim=1)
    torch.testing.assert_close(latents_of(components, request), expected, rtol=1e-3, atol=1e-3)


def test_rows_of_every_kind_equal_their_single_runs(components: Components, model: ModelConfig) -> None:
    long: dict[str, Any] = {"num_frames": 9, "context_frames": 4, "context_overlap": 1, "num_inference_steps": 3}
    requests = [
        ask(model, seed=1, **long),
        ask(model, seed=2, num_frames=4, guidance_scale=1.0),
        ask(model, seed=3, **long, context_schedule="uniform", scheduler="euler-a", strength=0.6),
        ask(model, seed=4, **long, long_video="chain", scheduler="dpm++2m-sde", image_guidance_scale=1.5),
        ask(model, seed=7, **long, condition_frame=6, image_guidance_scale=2.0, affinity="1,.7,.9"),
        ask(model, seed=5, **long, context_schedule="uniform-loop", free_init="butterworth", free_init_iters=2),
        ask(model, seed=6, **long, long_video="chain", free_u="0.9,0.2,1.5,1.6", free_init="ideal", strength=0.6),
    ]
    outcomes = run(Engine(components, batch_size=7), requests)
    for request, outcome in zip(requests, outcomes, strict=True):
        assert isinstance(outcome, Animation), outcome
        assert len(outcome.frames) == request.params.num_frames
        assert_same(outcome.frames, alone(components, request).frames)


@pytest.mark.parametrize("long_video", ["windows", "chain"])
def test_40_frames_are_made_and_progress_reaches_the_end(long_video: str, model: ModelConfig) -> None:
    seen: list[tuple[int, int]] = []
    with Animator(model) as animator:
        request = ask(model, num_frames=40, long_video=long_video, num_inference_steps=2, guidance_scale=1.0)
        made = animator.submit(request, on_step=lambda done, total: seen.append((done, total))).result()
    assert made.frames.shape == (40, 32, 32, 3)
    assert seen[-1] == ((2, 2) if long_video == "windows" else (6, 6))
    assert seen == sorted(seen)


def test_embeddings_that_a_callback_replaces_stay_so_in_the_segments_that_follow(
    components: Components, model: ModelConfig
) -> None:
    request = ask(model, num_frames=7, context_frames=4, long_video="chain", num_inference_steps=2)
    sea = Conditions(components).prompt("the sea", clip_skip=None)

    def at_first(end: StepEnd) -> dict[str, torch.Tensor]:
        return {"prompt_embeds": sea} if end.step == 0 else {}

    once = latents_of(components, replace(request, on_step_end=at_first))
    always = latents_of(components, replace(request, on_step_end=lambda end: {"prompt_embeds": sea}))
    assert torch.equal(once, always)
    assert not torch.equal(once, latents_of(components, request))


def test_what_cannot_be_is_refused_and_says_why(model: ModelConfig, components: Components) -> None:
    engine = Engine(components, batch_size=1)
    given = replace(
        ask(model, num_frames=7, context_frames=4, long_video="chain"), latents=np.zeros((4, 7, 8, 8), np.float32)
    )
    with pytest.raises(BadParameter, match="latents cannot be given for a chain"):
        engine.join(given)
    chain: dict[str, Any] = {"num_frames": 9, "context_frames": 4, "long_video": "chain"}
    for knobs, text in (
        ({"affinity": "1,.8,1"}, "cannot close a loop"),
        ({"condition_frame": 2}, "needs the picture to be the first frame"),
        ({"image_guidance_scale": 0}, "goes on from pictures"),
        ({"end_image": "end.png"}, "long_video must be windows with an end_image"),
    ):
        with pytest.raises(BadParameter, match=text):
            ask(model, **chain, **knobs)
