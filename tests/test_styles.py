"""Several models side by side: rows name one as their style, each is as if alone, and what is equal is held once."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pia_ray import Animation, AnimationParams, AnimationRequest, Animator, ModelConfig, weights
from pia_ray.errors import BadParameter
from pia_ray.pia.assemble import assemble
from pia_ray.pia.sharing import Pool
from pia_ray.testing import make_pipeline_folder, make_split_checkpoint

STYLES = ("ink", "oil", "clay")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelConfig]:
    """Three bases with UNets and text encoders of their own, one adapter and one VAE for all, and a whole pipeline."""
    root = tmp_path_factory.mktemp("checkpoints")
    models = {}
    for number, style in enumerate(STYLES):
        base, adapter, vae = make_split_checkpoint(root / style, seed=number, vae_factor=4)
        first = root / STYLES[0]
        if number:  # as where users download them: other folders, equal files
            for folder, origin in ((adapter, first / "motion-adapter"), (vae, first / "vae")):
                shutil.rmtree(folder)
                shutil.copytree(origin, folder)
        models[style] = tiny(style, base, motion_adapter=str(adapter), vae=str(vae))
    models["plain"] = tiny("plain", make_pipeline_folder(root / "plain", seed=7, vae_factor=4))
    return models


def tiny(name: str, base: Path, **settings: Any) -> ModelConfig:
    defaults = {"num_inference_steps": 2, "num_frames": 4, "negative_prompt": ""}
    values: dict[str, Any] = {"device": "cpu", "long_edge": 32, "size_step": 16, "defaults": defaults, **settings}
    return ModelConfig(name=name, base=str(base), **values)


def ask(style: str | None = None, seed: int = 1, **knobs: Any) -> AnimationRequest:
    named = {} if style is None else {"style": style}
    values = np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    picture = Image.fromarray(values).resize((32, 32), Image.Resampling.BICUBIC)
    return AnimationRequest(picture, AnimationParams(prompt="a cat", seed=seed, **named, **knobs))


def frames(outcome: object) -> np.ndarray:
    assert isinstance(outcome, Animation), outcome
    return outcome.frames.astype(int)


@pytest.fixture(scope="module")
def alone(checkpoints: dict[str, ModelConfig]) -> dict[str, np.ndarray]:
    """What each model makes in an animator of its own."""
    made = {}
    for style, model in checkpoints.items():
        with Animator(model) as animator:
            made[style] = frames(animator.animate([ask()])[0])
    return made


@pytest.fixture
def animator(checkpoints: dict[str, ModelConfig]) -> Iterator[Animator]:
    styles = {style: checkpoints[style] for style in STYLES}
    with Animator(checkpoints["plain"], styles=styles, keep_models=4, batch_size=4) as animator:
        yield animator


def test_a_row_is_animated_by_the_model_its_style_names_as_if_that_were_alone(
    animator: Animator, checkpoints: dict[str, ModelConfig], alone: dict[str, np.ndarray]
) -> None:
    order = [None, "ink", "oil", "clay", "ink", "default"]
    outcomes = animator.animate([ask(style) for style in order])
    for style, outcome in zip(order, outcomes, strict=True):
        name = "plain" if style in (None, "default") else style
        assert np.abs(frames(outcome) - alone[name]).max() <= 1
        assert isinstance(outcome, Animation)
        assert outcome.model == weights.version(checkpoints[name])
        assert outcome.params.style == (style or "default")
    assert np.abs(alone["ink"] - alone["oil"]).max() > 10, "the models differ"


def test_a_style_that_is_not_there_fails_its_row_and_names_those_there_are(animator: Animator) -> None:
    unknown, fine = animator.animate([ask("inc"), ask("ink")])
    assert isinstance(unknown, BadParameter)
    assert unknown.field == "style"
    assert "default, ink, oil, clay" in unknown.message
    assert 'Did you mean "ink"?' in unknown.message
    assert isinstance(fine, Animation)


def test_knobs_and_sizes_that_are_not_given_are_those_of_the_styles_model(checkpoints: dict[str, ModelConfig]) -> None:
    small = checkpoints["ink"].model_copy(
        update={"long_edge": 16, "defaults": {"num_inference_steps": 1, "num_frames": 3}}
    )
    with Animator(checkpoints["plain"], styles={"small": small}) as animator:
        (made,) = animator.animate([ask("small")])
    assert frames(made).shape == (3, 16, 16, 3)


def test_models_with_equal_parts_hold_them_once(checkpoints: dict[str, ModelConfig]) -> None:
    pool = Pool()
    ink, oil = (assemble(weights.resolve(checkpoints[style]), checkpoints[style], pool) for style in STYLES[:2])
    assert places(ink.vae) == places(oil.vae)
    for name, place in places(ink.unet).items():
        assert (place == places(oil.unet)[name]) == ("motion_modules" in name), name
    assert not set(places(ink.text_encoder).values()) & set(places(oil.text_encoder).values())
    same = checkpoints["ink"].model_copy(update={"name": "same"})
    twin = assemble(weights.resolve(same), same, pool)
    assert places(twin.unet) == places(ink.unet)
    assert places(twin.text_encoder) == places(ink.text_encoder)
    assert twin.unet is not ink.unet


def places(module: torch.nn.Module) -> dict[str, int]:
    return {name: parameter.data_ptr() for name, parameter in module.named_parameters()}


def test_loading_a_second_model_on_the_same_adapter_does_not_change_the_first(
    checkpoints: dict[str, ModelConfig],
) -> None:
    pool = Pool()
    ink = assemble(weights.resolve(checkpoints["ink"]), checkpoints["ink"], pool)
    before = {name: value.clone() for name, value in ink.unet.state_dict().items()}
    oil = assemble(weights.resolve(checkpoints["oil"]), checkpoints["oil"], pool)
    assert all(torch.equal(value, before[name]) for name, value in ink.unet.state_dict().items())
    assert not torch.equal(ink.unet.conv_in.weight, oil.unet.conv_in.weight)
    unshared = assemble(weights.resolve(checkpoints["oil"]), checkpoints["oil"])
    assert all(torch.equal(value, unshared.unet.state_dict()[name]) for name, value in oil.unet.state_dict().items())


def test_weights_in_another_precision_are_not_shared(checkpoints: dict[str, ModelConfig]) -> None:
    pool = Pool()
    full = assemble(weights.resolve(checkpoints["ink"]), checkpoints["ink"], pool)
    half_model = checkpoints["ink"].model_copy(update={"dtype": "bfloat16"})
    half = assemble(weights.resolve(half_model), half_model, pool)
    assert {parameter.dtype for parameter in half.unet.parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in full.unet.parameters()} == {torch.float32}


def test_the_pool_forgets_weights_when_the_last_model_that_holds_them_is_gone(
    checkpoints: dict[str, ModelConfig],
) -> None:
    pool = Pool()
    ink = assemble(weights.resolve(checkpoints["ink"]), checkpoints["ink"], pool)
    oil = assemble(weights.resolve(checkpoints["oil"]), checkpoints["oil"], pool)
    assert len(pool) == 8  # of both one VAE and one adapter; two text encoders, UNets and inputs of UNets
    del ink
    assert len(pool) == 5
    del oil
    assert len(pool) == 0
