"""What a request may bring and take away: arrays in place of text and noise, output types, a step callback, n videos.

Against diffusers' own PIAPipeline where that is right, through the Animator.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pia_ray import Animation, AnimationParams, AnimationRequest, Animator, ModelConfig
from pia_ray.errors import BadParameter, Cancelled, RowError, UnexpectedError
from pia_ray.prepare import prepare
from pia_ray.testing import FakeAnimator, make_pipeline_folder
from pia_ray.types import PreparedRequest, StepEnd

SIZE = 32
LATENTS = (4, 4, 8, 8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pipeline_folder(tmp_path_factory.mktemp("model"), vae_factor=4)


@pytest.fixture(scope="module")
def model(folder: Path) -> ModelConfig:
    return ModelConfig(name="tiny", base=str(folder), device="cpu", long_edge=SIZE, size_step=16)


@pytest.fixture(scope="module")
def animator(model: ModelConfig) -> Iterator[Animator]:
    with Animator(model, batch_size=4) as animator:
        yield animator


def picture(seed: int = 0, size: tuple[int, int] = (SIZE, SIZE)) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(values).resize(size, Image.Resampling.BICUBIC)


def ask(brings: dict[str, Any] | None = None, **knobs: Any) -> AnimationRequest:
    given = {"prompt": "a red cat", "negative_prompt": "dark", "num_frames": 4, "num_inference_steps": 3, "seed": 5}
    return AnimationRequest(picture(), AnimationParams(**{**given, **knobs}), id="row", **(brings or {}))


def run(animator: Animator | FakeAnimator, *requests: AnimationRequest | PreparedRequest) -> list[Animation]:
    outcomes = animator.animate(requests)
    for outcome in outcomes:
        assert isinstance(outcome, Animation), outcome
    return outcomes  # type: ignore[return-value]


def refused(animator: Animator, request: AnimationRequest) -> RowError:
    (outcome,) = animator.animate([request])
    assert isinstance(outcome, RowError)
    return outcome


def noise(seed: int = 3, shape: tuple[int, ...] = LATENTS) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def embedding(seed: int, length: int = 77) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((length, 32)).astype(np.float32)


@cache
def load_pipeline(folder: Path) -> tuple[Any, Any]:
    """The pipeline, and the config of the scheduler that came with it."""
    from diffusers import PIAPipeline

    pipe = PIAPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe, pipe.scheduler.config


def diffusers_of(folder: Path, request: AnimationRequest, model: ModelConfig, **call: Any) -> Any:
    """The same request through diffusers' PIAPipeline, with further arguments of its call."""
    from diffusers import DDIMScheduler, EulerDiscreteScheduler

    params = prepare(request, model).params
    kind = {"ddim": DDIMScheduler, "euler": EulerDiscreteScheduler}[params.scheduler]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the pipeline is deprecated upstream, its arithmetic is not
        pipe, scheduler_config = load_pipeline(folder)
        betas = {"beta_schedule": "linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False}
        pipe.scheduler = kind.from_config(scheduler_config, **betas)
        arguments = {
            "image": request.image,
            "prompt": params.prompt,
            "negative_prompt": params.negative_prompt,
            "num_frames": params.num_frames,
            "width": params.width,
            "height": params.height,
            "num_inference_steps": params.num_inference_steps,
            "guidance_scale": params.guidance_scale,
            "strength": params.strength,
            "motion_scale": params.motion_scale,
            "generator": torch.Generator("cpu").manual_seed(params.seed),
            "output_type": "np",
            **call,
        }
        return pipe(**arguments).frames[0]


def assert_same(ours: np.ndarray, theirs: np.ndarray) -> None:
    """8-bit frames against floats from 0 to 1."""
    assert np.abs(ours.astype(float) - theirs * 255).max() <= 1


def assert_near(one: np.ndarray, other: np.ndarray) -> None:
    """8-bit frames of runs that differ in what shared their forwards."""
    assert np.abs(one.astype(int) - other).max() <= 1


# Arrays in place of noise and text


@pytest.mark.parametrize("scheduler", ["ddim", "euler"])
def test_given_latents_are_the_noise_that_diffusers_starts_from_too(
    scheduler: str, folder: Path, model: ModelConfig, animator: Animator
) -> None:
    request = ask({"latents": noise()}, scheduler=scheduler)
    (given,) = run(animator, request)
    assert_same(given.frames, diffusers_of(folder, request, model, latents=torch.from_numpy(noise())[None]))
    (drawn,) = run(animator, ask(scheduler=scheduler))
    assert np.abs(given.frames.astype(int) - drawn.frames).mean() > 1


def test_below_strength_1_given_latents_are_the_noise_on_the_picture(
    folder: Path, model: ModelConfig, animator: Animator
) -> None:
    # diffusers ignores latents there; with some given, its draws are the picture's posterior and then this noise.
    generator = torch.Generator().manual_seed(5)
    torch.randn((1, 4, 8, 8), generator=generator)
    drawn = torch.randn((1, *LATENTS), generator=generator)[0].numpy()
    request = ask({"latents": drawn}, strength=0.7, num_inference_steps=5)
    (ours,) = run(animator, request)
    assert_same(ours.frames, diffusers_of(folder, request, model, latents=torch.zeros((1, *LATENTS))))
    (other,) = run(animator, ask({"latents": noise(1)}, strength=0.7, num_inference_steps=5))
    assert np.abs(ours.frames.astype(int) - other.frames).mean() > 1


def test_given_embeddings_make_what_they_make_in_diffusers(
    folder: Path, model: ModelConfig, animator: Animator
) -> None:
    request = ask({"prompt_embeds": embedding(1), "negative_prompt_embeds": embedding(2)})
    (ours,) = run(animator, request)
    theirs = diffusers_of(
        folder,
        request,
        model,
        prompt=None,
        negative_prompt=None,
        prompt_embeds=torch.from_numpy(embedding(1))[None],
        negative_prompt_embeds=torch.from_numpy(embedding(2))[None],
    )
    assert_same(ours.frames, theirs)


def test_a_negative_prompt_is_encoded_beside_given_embeddings_as_in_diffusers(
    folder: Path, model: ModelConfig, animator: Animator
) -> None:
    request = ask({"prompt_embeds": embedding(1)})
    (ours,) = run(animator, request)
    theirs = diffusers_of(folder, request, model, prompt=None, prompt_embeds=torch.from_numpy(embedding(1))[None])
    assert_same(ours.frames, theirs)


def test_embeddings_of_any_length_share_an_engine_with_other_rows_and_equal_their_single_runs(
    animator: Animator,
) -> None:
    requests = [
        ask({"prompt_embeds": embedding(1, 154), "negative_prompt_embeds": embedding(2, 154)}),
        ask({"prompt_embeds": embedding(3, 5)}, guidance_scale=1.0),
        ask({"latents": noise(4)}),
        ask(),
    ]
    for request, together in zip(requests, run(animator, *requests), strict=True):
        (alone,) = run(animator, request)
        assert np.abs(together.frames.astype(int) - alone.frames).max() <= 1


def test_an_encoded_prompt_given_back_makes_the_same_video_as_its_text(animator: Animator) -> None:
    for clip_skip in (None, 1):
        prompt = animator.encode_prompt("a red cat", clip_skip=clip_skip)
        negative = animator.encode_prompt("dark", clip_skip=clip_skip)
        assert prompt.dtype == np.float32
        assert prompt.shape == (77, 32)
        brings = {"prompt_embeds": prompt, "negative_prompt_embeds": negative}
        text, embedded = run(animator, ask(clip_skip=clip_skip), ask(brings, prompt="unused", negative_prompt="unused"))
        assert_near(text.frames, embedded.frames)


def test_an_encoded_prompt_survives_half_precision_exactly(folder: Path) -> None:
    half = ModelConfig(name="tiny", base=str(folder), device="cpu", dtype="bfloat16", long_edge=SIZE, size_step=16)
    with Animator(half, batch_size=1) as animator:
        brings = {"prompt_embeds": animator.encode_prompt("a red cat")}
        text, embedded = run(animator, ask(guidance_scale=1), ask(brings, guidance_scale=1))
    assert (text.frames == embedded.frames).all()


def test_encoding_a_prompt_is_refused_where_it_cannot_be_done(folder: Path, model: ModelConfig) -> None:
    with Animator(model) as animator, pytest.raises(BadParameter, match="clip_skip must be 0 to 2"):
        animator.encode_prompt("a cat", clip_skip=3)
    with pytest.raises(Cancelled):
        animator.encode_prompt("a cat")


@pytest.mark.parametrize(
    ("brings", "text"),
    [
        ({"latents": noise(shape=(4, 3, 8, 8))}, r"latents must be \[4, 4, 8, 8\] .*got \[4, 3, 8, 8\]"),
        ({"latents": noise(shape=(4, 8, 8))}, r"latents must be \[4, T, h, w\] \(got \[4, 8, 8\]\)"),
        ({"latents": noise().astype(int)}, "latents must hold floats, not int64"),
        ({"latents": noise() * np.nan}, "latents holds NaN"),
        ({"latents": noise().tolist()}, "latents must be a numpy array"),
        ({"prompt_embeds": embedding(1)[:, :16]}, r"prompt_embeds must be \[L, 32\] for this model \(got \[77, 16\]\)"),
        ({"prompt_embeds": embedding(1, 9)}, "both branches of guidance need embeddings of one length .*is 77.* 9"),
        ({"output_type": "jpeg"}, "output_type must be one of uint8, pil, np, pt, latent"),
        ({"end_image": [1, 2]}, "end_image must be a PIL image or a numpy array, not list"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused_before_any_denoising(
    brings: dict[str, Any], text: str, animator: Animator
) -> None:
    steps: list[StepEnd] = []
    error = refused(animator, ask({"on_step_end": steps.append, **brings}))
    assert isinstance(error, BadParameter)
    assert error.field == next(iter(brings)) or "length" in text
    with pytest.raises(BadParameter, match=text):
        raise error
    assert steps == []


def test_a_leading_axis_of_one_as_diffusers_has_it_is_dropped(animator: Animator) -> None:
    with_axis, without = run(animator, ask({"latents": noise()[None]}), ask({"latents": noise()}))
    assert_near(with_axis.frames, without.frames)


def test_params_that_name_a_file_are_refused_where_it_was_not_loaded(animator: Animator) -> None:
    error = refused(animator, ask(latents="noise.safetensors"))
    assert isinstance(error, BadParameter)
    assert "load noise.safetensors" in str(error)


# Output types


def test_outputs_equal_those_of_diffusers_to_float_tolerance(
    folder: Path, model: ModelConfig, animator: Animator
) -> None:
    kinds = ("uint8", "pil", "np", "pt", "latent")
    ours = dict(zip(kinds, run(animator, *(ask({"output_type": k}) for k in kinds)), strict=True))
    theirs = {kind: diffusers_of(folder, ask(), model, output_type=kind) for kind in kinds[1:]}
    assert ours["uint8"].output is ours["uint8"].frames
    assert ours["np"].output.dtype == np.float32
    assert ours["np"].output.shape == (4, SIZE, SIZE, 3)
    np.testing.assert_allclose(ours["np"].output, theirs["np"], atol=2e-3)
    assert ours["pt"].output.shape == (4, 3, SIZE, SIZE)
    torch.testing.assert_close(ours["pt"].output, theirs["pt"], atol=2e-3, rtol=0)
    assert ours["latent"].output.shape == LATENTS
    torch.testing.assert_close(ours["latent"].output, theirs["latent"], atol=2e-3, rtol=1e-3)
    assert len(ours["pil"].output) == 4
    for mine, other, frame in zip(ours["pil"].output, theirs["pil"], ours["pil"].frames, strict=True):
        assert mine.mode == "RGB"
        assert (np.asarray(mine) == frame).all()
        assert np.abs(np.asarray(mine).astype(int) - np.asarray(other)).max() <= 1
    for kind in ("pil", "np", "pt"):
        assert_near(ours[kind].frames, ours["uint8"].frames)
        assert ours[kind].motion == pytest.approx(ours["uint8"].motion, rel=0.01)
    assert len(ours["latent"].frames) == 0


def test_float_output_is_not_rounded_to_eight_bits(animator: Animator) -> None:
    (animation,) = run(animator, ask({"output_type": "np"}))
    levels = animation.output * 255
    assert np.abs(levels - levels.round()).max() > 0.3


@pytest.mark.parametrize("kind", ["pt", "latent"])
def test_tensors_that_come_out_are_ordinary_ones(animator: Animator, kind: str) -> None:
    (animation,) = run(animator, ask({"output_type": kind}))
    weight = torch.ones((), requires_grad=True)
    (animation.output.add_(1) * weight).sum().backward()
    assert weight.grad is not None


# The step callback


def test_a_step_callback_sees_the_row_alone_and_can_replace_its_latents_as_in_diffusers(
    folder: Path, model: ModelConfig, animator: Animator
) -> None:
    seen: list[StepEnd] = []

    def ours(end: StepEnd) -> dict[str, torch.Tensor] | None:
        seen.append(end)
        return {"latents": end.tensors["latents"] * 0.5} if end.step == 1 else None

    def theirs(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        return {"latents": tensors["latents"] * 0.5} if step == 1 else {}

    request = ask({"on_step_end": ours})
    replaced, plain = run(animator, request, ask())
    assert_same(replaced.frames, diffusers_of(folder, request, model, callback_on_step_end=theirs))
    assert np.abs(replaced.frames.astype(int) - plain.frames).mean() > 1
    assert [end.step for end in seen] == [0, 1, 2]
    assert [end.timestep for end in seen] == sorted((end.timestep for end in seen), reverse=True)
    shapes = {name: tuple(tensor.shape) for name, tensor in seen[0].tensors.items()}
    assert shapes == {"latents": LATENTS, "prompt_embeds": (77, 32), "negative_prompt_embeds": (77, 32)}
    np.testing.assert_array_equal(seen[0].tensors["prompt_embeds"].numpy(), animator.encode_prompt("a red cat"))


def test_a_callback_that_replaces_the_prompt_from_the_first_step_on_leaves_others_with_that_prompt_alone(
    animator: Animator,
) -> None:
    def spoil(end: StepEnd) -> None:
        for tensor in end.tensors.values():
            tensor.zero_()

    def other_text(end: StepEnd) -> dict[str, torch.Tensor]:
        return {"prompt_embeds": torch.zeros_like(end.tensors["prompt_embeds"])}

    plain, changed, spoiled = run(animator, ask(), ask({"on_step_end": other_text}), ask({"on_step_end": spoil}))
    assert_near(plain.frames, spoiled.frames)
    assert np.abs(plain.frames.astype(int) - changed.frames).mean() > 0.5


def test_a_callback_may_write_to_the_tensor_that_it_gave_before(animator: Animator) -> None:
    kept: list[torch.Tensor] = []

    def fade_in_place(end: StepEnd) -> dict[str, torch.Tensor]:
        kept[:] = kept or [end.tensors["prompt_embeds"]]
        return {"prompt_embeds": kept[0].mul_(0.5)}

    def fade(end: StepEnd) -> dict[str, torch.Tensor]:
        return {"prompt_embeds": end.tensors["prompt_embeds"] * 0.5}

    in_place, copied = run(animator, ask({"on_step_end": fade_in_place}), ask({"on_step_end": fade}))
    assert_near(in_place.frames, copied.frames)


def test_an_exception_in_a_callback_fails_its_row_alone(animator: Animator) -> None:
    def fail(end: StepEnd) -> None:
        raise RuntimeError("out of ideas")

    def misshape(end: StepEnd) -> dict[str, torch.Tensor]:
        return {"latents": end.tensors["latents"][:2]}

    outcomes = animator.animate(
        [
            ask({"on_step_end": fail}),
            ask(),
            ask({"on_step_end": misshape}),
            ask({"on_step_end": lambda end: {"mask": 0}}),
            ask({"on_step_end": lambda end: 3}),
        ]
    )
    assert isinstance(outcomes[0], UnexpectedError)
    assert "out of ideas" in str(outcomes[0])
    assert isinstance(outcomes[1], Animation)
    for outcome, text in zip(
        outcomes[2:], ("[4, 4, 8, 8] (got [2, 4, 8, 8])", "cannot replace mask", "got int"), strict=True
    ):
        assert isinstance(outcome, BadParameter)
        assert text in str(outcome)


def test_a_callback_may_encode_a_prompt(animator: Animator) -> None:
    def to_sea(end: StepEnd) -> dict[str, torch.Tensor]:
        return {"prompt_embeds": torch.from_numpy(animator.encode_prompt("the sea"))}

    (changed,) = run(animator, ask({"on_step_end": to_sea}))
    (plain,) = run(animator, ask())
    assert np.abs(changed.frames.astype(int) - plain.frames).max() > 1


# Several videos, and the range of knobs


def test_a_request_for_several_videos_becomes_that_many_with_seeds_that_follow(animator: Animator) -> None:
    several = ask(num_videos=3, seed=2**64 - 2)
    error = refused(animator, several)
    assert "animate(request.videos())" in str(error)
    assert [request.params.seed for request in several.videos()] == [2**64 - 2, 2**64 - 1, 0]
    made = run(animator, *several.videos())
    (first,) = run(animator, ask(seed=2**64 - 2))
    assert_near(made[0].frames, first.frames)
    assert (made[1].frames != made[2].frames).any()


def test_videos_of_a_request_without_a_seed_start_at_its_ids_own(animator: Animator) -> None:
    params = AnimationParams(prompt="x", num_frames=2, num_inference_steps=2, num_videos=2)
    request = AnimationRequest(picture(), params, id="cat")
    first, _ = run(animator, *request.videos())
    (alone,) = run(animator, AnimationRequest(picture(), params.model_copy(update={"num_videos": 1}), id="cat"))
    assert_near(first.frames, alone.frames)


@pytest.mark.parametrize("num_frames", [1, 2, 32])
def test_every_number_of_frames_that_the_model_has_positions_for_equals_diffusers(
    num_frames: int, folder: Path, model: ModelConfig, animator: Animator
) -> None:
    request = ask(num_frames=num_frames, num_inference_steps=2)
    assert_same(run(animator, request)[0].frames, diffusers_of(folder, request, model))


def test_more_frames_than_a_video_may_have_are_refused() -> None:
    with pytest.raises(ValueError, match="less than or equal to 256"):
        AnimationParams(prompt="x", num_frames=257)


@pytest.mark.parametrize("guidance_scale", [0.0, 0.5, 1.0])
def test_guidance_from_0_to_1_is_none_and_the_negative_prompt_then_unused(
    guidance_scale: float, folder: Path, model: ModelConfig, animator: Animator
) -> None:
    request = ask(guidance_scale=guidance_scale)
    (ours,) = run(animator, request)
    assert_same(ours.frames, diffusers_of(folder, request, model))
    (other,) = run(animator, ask(guidance_scale=guidance_scale, negative_prompt="bright"))
    assert_near(ours.frames, other.frames)


@pytest.mark.parametrize("clip_skip", [0, 1, 2])
def test_clip_skip_leaves_out_the_last_layers_for_both_prompts(
    clip_skip: int, folder: Path, model: ModelConfig, animator: Animator
) -> None:
    from transformers import CLIPTextModel, CLIPTokenizer

    encoder = CLIPTextModel.from_pretrained(folder / "text_encoder")
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")

    def encode(text: str) -> torch.Tensor:
        tokens = tokenizer(text, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
        with torch.no_grad():
            states = encoder(tokens, output_hidden_states=True).hidden_states
            return encoder.final_layer_norm(states[-1 - clip_skip])

    request = ask(clip_skip=clip_skip)
    theirs = diffusers_of(
        folder,
        request,
        model,
        prompt=None,
        negative_prompt=None,
        prompt_embeds=encode("a red cat"),
        negative_prompt_embeds=encode("dark"),
    )
    assert_same(run(animator, request)[0].frames, theirs)


# Prepared once


def test_a_request_that_has_been_prepared_is_not_prepared_again(model: ModelConfig, animator: Animator) -> None:
    pictures = {"end_image": picture(1, (50, 40)), "mask_image": picture(2, (30, 60))}
    request = ask({**pictures, "latents": np.zeros(LATENTS, np.float64)})
    prepared = prepare(request, model)
    assert prepare(prepared, model) is prepared
    assert prepare(prepared, model.model_copy(update={"long_edge": 64, "defaults": {"fps": 3}})) is prepared
    (plain,), (from_prepared,) = run(animator, request), run(animator, prepared)
    np.testing.assert_array_equal(from_prepared.frames, plain.frames)
    assert from_prepared.params == plain.params


def test_a_prepared_request_can_be_sent_to_another_process(model: ModelConfig, animator: Animator) -> None:
    request = ask({"mask_image": picture(2, (30, 60))}, seed=None)
    sent = pickle.loads(pickle.dumps(prepare(request, model)))
    assert (sent.size, sent.seed, sent.image.mode, sent.mask_image.mode) == ((SIZE, SIZE), sent.params.seed, "RGB", "L")
    (plain,), (again,) = run(animator, request), run(animator, sent)
    np.testing.assert_array_equal(again.frames, plain.frames)


def test_a_fake_animator_takes_prepared_requests_too(model: ModelConfig) -> None:
    with FakeAnimator(model) as animator:
        (plain,), (from_prepared,) = run(animator, ask()), run(animator, prepare(ask(), model))
    np.testing.assert_array_equal(from_prepared.frames, plain.frames)
