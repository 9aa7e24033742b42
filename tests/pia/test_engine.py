"""The engine against diffusers' own PIAPipeline, and each row against its single run."""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pia_ray.animation import Animation
from pia_ray.config.knobs import AnimationParams
from pia_ray.config.model import ModelConfig
from pia_ray.errors import BadParameter, NonFiniteFrames, OutOfMemory, RowError, UnexpectedError, WeightsError
from pia_ray.pia.components import Components
from pia_ray.pia.denoising.schedulers import SCHEDULERS
from pia_ray.pia.engine import Engine
from pia_ray.pia.loading.load import assemble
from pia_ray.pia.model_cache import Model
from pia_ray.pia.unet.background_compilation import BackgroundCompilation
from pia_ray.pia.unet.compilation import CompiledCode, Kind
from pia_ray.prepare import prepare
from pia_ray.testing import make_pipeline_folder, make_split_checkpoint
from pia_ray.types import AnimationRequest
from pia_ray.weights import resolve

SIZE = 32
KINDS: dict[str, dict[str, Any]] = {
    "epsilon": {"vae_factor": 4},
    "v-prediction, zero SNR": {"vae_factor": 4, "prediction_type": "v_prediction", "zero_snr": True},
    "factor-8 VAE, motion in the mid block": {"vae_factor": 8, "motion_mid_block": True},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    return {kind: make_pipeline_folder(root / str(n), **how) for n, (kind, how) in enumerate(KINDS.items())}


@pytest.fixture(scope="module")
def model(folders: dict[str, Path]) -> ModelConfig:
    return model_of(folders["epsilon"])


@pytest.fixture(scope="module")
def components(model: ModelConfig) -> Components:
    return assemble(resolve(model), model)


def model_of(folder: Path, **settings: Any) -> ModelConfig:
    return ModelConfig(name="tiny", base=str(folder), device="cpu", long_edge=SIZE, size_step=16, **settings)


def picture(seed: int, size: tuple[int, int] = (SIZE, SIZE)) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(values).resize(size, Image.Resampling.BICUBIC)


def ask(model: ModelConfig, seed: int = 0, size: tuple[int, int] = (SIZE, SIZE), **knobs: Any) -> AnimationRequest:
    knobs = {
        "prompt": "a red cat",
        "negative_prompt": "dark",
        "num_frames": 4,
        "num_inference_steps": 3,
        "seed": seed,
        "width": size[0],
        "height": size[1],
        **knobs,
    }
    return prepare(AnimationRequest(picture(seed, size), AnimationParams(**knobs), id=f"row-{seed}"), model)


def run(engine: Engine, requests: list[AnimationRequest]) -> list[Animation | RowError]:
    rows = [engine.join(request) for request in requests]
    outcomes: dict[Any, Animation | RowError] = {}
    while engine.rows:
        outcomes.update(engine.step())
    return [outcomes[row] for row in rows]


def alone(components: Components, request: AnimationRequest) -> Animation:
    (outcome,) = run(Engine(components, batch_size=1), [request])
    assert isinstance(outcome, Animation), outcome
    return outcome


@cache
def load_pipeline(folder: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """The pipeline, and the config of the scheduler that came with it."""
    from diffusers import PIAPipeline

    pipe = PIAPipeline.from_pretrained(folder, torch_dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe, pipe.scheduler.config


@cache
def load_components(folder: Path) -> Components:
    config = model_of(folder)
    return assemble(resolve(config), config)


def reference(
    folder: Path,
    request: AnimationRequest,
    *,
    dtype: torch.dtype = torch.float32,
    tune: Callable[[Any], None] | None = None,
) -> np.ndarray:
    """The same request through diffusers' PIAPipeline, `tune`d before it runs."""
    params = request.params
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the pipeline is deprecated upstream, its arithmetic is not
        load = load_pipeline if tune is None else load_pipeline.__wrapped__
        pipe, scheduler_config = load(folder, dtype)
        kind, settings = SCHEDULERS[params.scheduler]
        betas = {"beta_schedule": "linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False}
        pipe.scheduler = kind.from_config(scheduler_config, **betas, **settings)
        if tune is not None:
            tune(pipe)
        result = pipe(
            image=request.image,
            prompt=params.prompt,
            negative_prompt=params.negative_prompt,
            num_frames=params.num_frames,
            width=params.width,
            height=params.height,
            num_inference_steps=params.num_inference_steps,
            guidance_scale=params.guidance_scale,
            strength=params.strength,
            eta=params.eta,
            motion_scale=params.motion_scale,
            generator=torch.Generator("cpu").manual_seed(params.seed),
            output_type="np",
        )
    return (result.frames[0] * 255).round().astype(np.uint8)


def assert_same(ours: np.ndarray, theirs: np.ndarray, *, mean: float = 0.02, most: int = 1) -> None:
    assert ours.shape == theirs.shape
    difference = np.abs(ours.astype(int) - theirs.astype(int))
    assert difference.max() <= most, f"off by up to {difference.max()} levels of 255"
    assert difference.mean() <= mean, f"off by {difference.mean():.4f} levels on average"


@pytest.fixture(scope="module")
def by_scheduler(
    components: Components, model: ModelConfig
) -> dict[str, tuple[AnimationRequest, Animation | RowError]]:
    """A request with each scheduler, and what it is in an engine that has all of them."""
    requests = [
        ask(model, scheduler=scheduler, guidance_scale=6.0, motion_scale=2, num_inference_steps=5)
        for scheduler in SCHEDULERS
    ]
    outcomes = run(Engine(components, batch_size=8), requests)
    return dict(zip(SCHEDULERS, zip(requests, outcomes, strict=True), strict=True))


@pytest.mark.parametrize("scheduler", list(SCHEDULERS))
def test_frames_equal_those_of_diffusers(
    scheduler: str,
    folders: dict[str, Path],
    by_scheduler: dict[str, tuple[AnimationRequest, Animation | RowError]],
) -> None:
    request, outcome = by_scheduler[scheduler]
    assert isinstance(outcome, Animation), outcome
    assert_same(outcome.frames, reference(folders["epsilon"], request))


@pytest.mark.parametrize("kind", list(KINDS)[1:])  # the first is the model above
@pytest.mark.parametrize("scheduler", ["ddim", "euler", "unipc"])
def test_frames_equal_those_of_diffusers_for_every_kind_of_model(
    kind: str, scheduler: str, folders: dict[str, Path]
) -> None:
    config = model_of(folders[kind])
    request = ask(config, scheduler=scheduler, seed=3, num_frames=6, motion_scale=1)
    assert_same(alone(load_components(folders[kind]), request).frames, reference(folders[kind], request))


@pytest.mark.parametrize(
    "knobs",
    [
        {"guidance_scale": 1.0},
        {"guidance_scale": 0.0},
        {"strength": 0.6, "num_inference_steps": 6},
        {"strength": 0.5, "scheduler": "euler", "num_inference_steps": 6},
        {"strength": 0.5, "scheduler": "heun", "num_inference_steps": 6},
        {"strength": 0.4, "scheduler": "heun", "num_inference_steps": 5},
        {"strength": 0.5, "scheduler": "pndm", "num_inference_steps": 6},
        {"strength": 0.7, "scheduler": "unipc", "num_inference_steps": 6},
        {"strength": 0.5, "scheduler": "dpm++2m-sde", "num_inference_steps": 6},
        {"strength": 0.2, "scheduler": "deis", "num_inference_steps": 5},
        {"strength": 0.5, "scheduler": "euler-a", "num_inference_steps": 6},
        {"eta": 0.7},
        {"seed": 2**64 - 1},
        {"width": 40, "height": 24},
        {"motion_scale": 8, "num_frames": 1},
        {"motion_scale": 5, "num_frames": 16, "num_inference_steps": 2},
    ],
    ids=str,
)
def test_a_knob_does_what_it_does_in_diffusers(
    knobs: dict[str, Any], folders: dict[str, Path], components: Components, model: ModelConfig
) -> None:
    size = (knobs.pop("width", SIZE), knobs.pop("height", SIZE))
    request = ask(model, seed=knobs.pop("seed", 5), size=size, **knobs)
    assert_same(alone(components, request).frames, reference(folders["epsilon"], request))


@pytest.mark.parametrize("steps", [2, 3, 7])
def test_full_noise_at_each_step_is_finite_for_a_model_without_signal_at_the_first(
    steps: int, folders: dict[str, Path]
) -> None:
    config = model_of(folders["v-prediction, zero SNR"])
    components = load_components(folders["v-prediction, zero SNR"])
    animation = alone(components, ask(config, eta=1.0, num_inference_steps=steps))
    nearly = alone(components, ask(config, eta=0.99999, num_inference_steps=steps))
    assert_same(animation.frames, nearly.frames, mean=0.5, most=4)


@pytest.mark.parametrize("scheduler", ["ddim", "pndm", "heun", "dpm++2m"])
def test_a_strength_too_small_for_a_step_runs_the_last_one(
    scheduler: str, components: Components, model: ModelConfig
) -> None:
    least, one = (
        alone(components, ask(model, scheduler=scheduler, strength=strength)).frames for strength in (0.001, 0.25)
    )
    assert np.array_equal(least, one)


@pytest.mark.parametrize(("dtype", "mean"), [("float16", 0.6), ("bfloat16", 4.0)])
def test_half_precision_stays_as_near_to_diffusers_as_its_rounding(
    dtype: str, mean: float, folders: dict[str, Path], components: Components
) -> None:
    config = model_of(folders["epsilon"], dtype=dtype)
    request = ask(config, seed=7)
    ours = alone(assemble(resolve(config), config), request).frames
    assert_same(ours, reference(folders["epsilon"], request, dtype=getattr(torch, dtype)), mean=mean, most=40)
    assert_same(ours, alone(components, request).frames, mean=mean, most=40)


def test_another_seed_prompt_picture_or_motion_gives_another_video(components: Components, model: ModelConfig) -> None:
    first = alone(components, ask(model, motion_scale=0)).frames.astype(int)
    for other in (
        ask(model, seed=1),
        ask(model, prompt="the sea"),
        ask(model, negative_prompt="blue sky"),
        ask(model, motion_scale=2),
        ask(model, clip_skip=1),
        ask(model, guidance_scale=3.0),
    ):
        assert np.abs(alone(components, other).frames - first).mean() > 0.5, other.params


def mixed_requests(model: ModelConfig) -> list[AnimationRequest]:
    return [
        ask(model, seed=1, scheduler="ddim", motion_scale=0),
        ask(model, seed=2, scheduler="euler-a", motion_scale=5, guidance_scale=12.0, prompt="waves on the sea"),
        ask(model, seed=3, scheduler="dpm++2m", guidance_scale=1.0, num_inference_steps=7),
        ask(model, seed=4, scheduler="unipc", negative_prompt="", num_inference_steps=3),
        ask(model, seed=5, scheduler="heun", strength=0.5),
        ask(model, seed=6, scheduler="pndm", size=(48, 32), num_frames=3),
        ask(model, seed=7, scheduler="dpm++2m-sde", size=(48, 32), num_frames=3, eta=0.5),
    ]


def test_each_of_many_mixed_rows_equals_its_single_run(components: Components, model: ModelConfig) -> None:
    requests = mixed_requests(model)
    together = run(Engine(components, batch_size=len(requests)), requests)
    for request, animation in zip(requests, together, strict=True):
        assert isinstance(animation, Animation)
        assert_same(animation.frames, alone(components, request).frames)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.soak) for seed in (1, 2, 3))])
def test_rows_that_join_and_leave_at_random_steps_equal_their_single_runs(
    seed: int, components: Components, model: ModelConfig
) -> None:
    dice = random.Random(seed)
    requests = [
        ask(
            model,
            seed=dice.randrange(1000),
            scheduler=dice.choice(list(SCHEDULERS)[:-1]),
            motion_scale=dice.randrange(9),
            guidance_scale=dice.choice([0.0, 1.0, 2.5, 9.0]),
            num_inference_steps=dice.randrange(2, 7),
            strength=dice.choice([1.0, 1.0, 0.7]),
            num_frames=dice.choice([3, 4]),
            size=dice.choice([(32, 32), (24, 40)]),
            prompt=dice.choice(["a cat", "the sea at night", "zoom in"]),
        )
        for _ in range(8)
    ]
    expected = [alone(components, request) for request in requests]
    engine, waiting = Engine(components, batch_size=4), list(enumerate(requests))
    number: dict[Any, int] = {}
    outcomes: dict[int, Animation | RowError] = {}
    gone: set[int] = set()
    while waiting or engine.rows:
        while waiting and (not engine.rows or dice.random() < 0.5):
            index, request = waiting.pop(0)
            number[engine.join(request)] = index
        if engine.rows and dice.random() < 0.1:
            leaver = dice.choice(engine.rows)
            engine.leave(leaver)
            gone.add(number[leaver])
        outcomes.update({number[row]: outcome for row, outcome in engine.step()})
    assert len(outcomes) + len(gone) == len(requests)
    for index, outcome in outcomes.items():
        assert isinstance(outcome, Animation)
        assert_same(outcome.frames, expected[index].frames)


class FaultyUNet(torch.nn.Module):
    """A UNet that fails as real ones do: on too many rows at once, or with NaN for one prompt."""

    def __init__(self, unet: torch.nn.Module, *, most: int = 10**9, fault: Exception | None = None, nan_at: int = -1):
        super().__init__()
        self.unet, self.most, self.fault, self.nan_at = unet, most, fault, nan_at
        self.config = unet.config
        self.sizes: list[int] = []

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor]:
        self.sizes.append(len(sample))
        if len(sample) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        if self.fault is not None and len(sample) > 0 and bool((sample[:, 4, 0, 0, 0] == 0.5).any()):
            raise self.fault
        (out,) = self.unet(sample, timestep, **kwargs)
        if self.nan_at >= 0:
            out[sample[:, 4, 0, 0, 0] == 0.5] = float("nan")
        return (out,)


def with_unet(components: Components, unet: torch.nn.Module) -> Components:
    return Components(**{**components.__dict__, "unet": unet})


def test_out_of_memory_halves_the_forward_and_remembers(components: Components, model: ModelConfig) -> None:
    requests = [ask(model, seed=n) for n in range(4)]
    unet = FaultyUNet(components.unet, most=3)
    outcomes = run(Engine(with_unet(components, unet), batch_size=4), requests)
    for request, outcome in zip(requests, outcomes, strict=True):
        assert isinstance(outcome, Animation)
        assert_same(outcome.frames, alone(components, request).frames)
    assert unet.sizes[:2] == [8, 4]
    assert set(unet.sizes[2:]) == {2}, "the size that fits is kept for later steps"


def test_a_row_too_large_even_alone_fails_as_out_of_memory_and_names_its_size(
    components: Components, model: ModelConfig
) -> None:
    (outcome,) = run(Engine(with_unet(components, FaultyUNet(components.unet, most=0)), batch_size=4), [ask(model)])
    assert isinstance(outcome, OutOfMemory)
    assert "32 x 32 px x 4 frames" in str(outcome)


def test_nan_fails_the_row_that_made_it_and_no_other(components: Components, model: ModelConfig) -> None:
    # Motion scale 8 starts with coefficient 0.5 in the mask channel, by which the faulty UNet knows its victim.
    requests = [ask(model, seed=1), ask(model, seed=2, motion_scale=8), ask(model, seed=3)]
    outcomes = run(Engine(with_unet(components, FaultyUNet(components.unet, nan_at=4)), batch_size=3), requests)
    assert isinstance(outcomes[1], NonFiniteFrames)
    assert "for row-2 at step 1 of 3" in str(outcomes[1])
    for n in (0, 2):
        assert isinstance(outcomes[n], Animation)
        assert_same(outcomes[n].frames, alone(components, requests[n]).frames)


@pytest.mark.parametrize("scheduler", ["ddim", "heun"])
def test_a_row_that_turns_nan_leaves_at_that_step(scheduler: str, components: Components, model: ModelConfig) -> None:
    unet = FaultyUNet(components.unet)
    engine = Engine(with_unet(components, unet), batch_size=2)
    victim = engine.join(ask(model, seed=2, motion_scale=8, scheduler=scheduler, num_inference_steps=4))
    other = engine.join(ask(model, seed=3, num_inference_steps=9))
    while victim.evaluation.step < 2:
        assert engine.step() == []
    unet.nan_at = 0
    ((row, outcome),) = engine.step()
    assert row is victim
    assert isinstance(outcome, NonFiniteFrames)
    assert "for row-2 at step 3 of 4" in str(outcome)
    assert engine.rows == [other]


def test_an_unknown_fault_of_one_row_becomes_its_own_failure_with_the_traceback(
    components: Components, model: ModelConfig
) -> None:
    unet = FaultyUNet(components.unet, fault=RuntimeError("shape mismatch in layer 7"))
    requests = [ask(model, seed=1), ask(model, seed=2, motion_scale=8), ask(model, seed=3)]
    outcomes = run(Engine(with_unet(components, unet), batch_size=3), requests)
    assert isinstance(outcomes[1], UnexpectedError)
    assert "shape mismatch in layer 7" in str(outcomes[1])
    assert "Traceback" in str(outcomes[1])
    assert isinstance(outcomes[0], Animation)
    assert isinstance(outcomes[2], Animation)


@pytest.mark.parametrize(
    ("knobs", "text"),
    [
        ({"num_frames": 9}, "num_frames must be 1 to 8"),
        ({"num_inference_steps": 1000}, "num_inference_steps must be below 1000"),
        ({"scheduler": "lcm", "num_inference_steps": 60}, "lcm cannot do 60 steps"),
        ({"clip_skip": 11}, "clip_skip must be 0 to"),
    ],
    ids=str,
)
def test_what_this_model_cannot_do_is_refused_before_any_denoising(
    knobs: dict[str, Any], text: str, components: Components, model: ModelConfig
) -> None:
    short = FaultyUNet(components.unet)
    short.config = {**components.unet.config, "motion_max_seq_length": 8}
    engine = Engine(with_unet(components, short), batch_size=1)
    with pytest.raises(BadParameter, match=text):
        engine.join(ask(model, **knobs))
    assert engine.rows == []


def test_base_and_motion_adapter_apart_make_the_same_frames_as_the_whole_pipeline(
    tmp_path: Path, components: Components
) -> None:
    base, adapter, vae = make_split_checkpoint(tmp_path, vae_factor=4)
    config = ModelConfig(
        name="tiny",
        base=str(base),
        motion_adapter=str(adapter),
        vae=str(vae),
        device="cpu",
        long_edge=SIZE,
        size_step=16,
    )
    request = ask(config)
    assert_same(alone(assemble(resolve(config), config), request).frames, alone(components, request).frames)


def test_a_base_without_motion_adapter_is_refused_with_what_to_do(tmp_path: Path) -> None:
    base, _, vae = make_split_checkpoint(tmp_path)
    config = ModelConfig(name="tiny", base=str(base), vae=str(vae), device="cpu")
    with pytest.raises(WeightsError, match="needs a motion_adapter"):
        assemble(resolve(config), config)


def test_the_hosts_own_lack_of_memory_counts_as_out_of_memory_too(components: Components, model: ModelConfig) -> None:
    text = "[enforce fail at alloc_cpu.cpp:119] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 GiB"
    unet = FaultyUNet(components.unet, fault=RuntimeError(text))
    (outcome,) = run(Engine(with_unet(components, unet), batch_size=2), [ask(model, motion_scale=8)])
    assert isinstance(outcome, OutOfMemory)


class Hears(BackgroundCompilation):
    """A compilation of nothing that keeps how many forwards are said to come for each one before."""

    def __init__(self) -> None:
        super().__init__(CompiledCode(mode="default", backend="eager"))
        self.ahead: list[float] = []

    def is_ready(self, kind: Kind, compile_kind: Callable[[], object], *, ahead: float = math.inf) -> bool:
        self.ahead.append(ahead)
        return False


def test_compilation_hears_how_many_rows_are_left_for_each_one_so_far(
    model: ModelConfig, components: Components
) -> None:
    parts, hears = Model(components), Hears()
    parts.forward._compilation = hears
    engine = Engine(batch_size=1)
    for expected in (3, None):
        engine.expected_rows = expected
        engine.join(ask(model, num_inference_steps=2), parts)
        while engine.rows:
            engine.step()
    assert hears.ahead == [0, 5, math.inf, math.inf], "nothing is known at first; half a row is done at the second step"
    engine.expected_rows = 2
    run_row = engine.join(ask(model, num_inference_steps=2), parts)
    engine.step()
    engine.leave(run_row)
    assert hears.ahead[-1] == 0, "all rows that were expected have ended"
