"""A model and its variants with LoRAs: parts that they share are rewritten once, and serve both as if alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from pia_ray.animation import Animation
from pia_ray.config.knobs import AnimationParams
from pia_ray.config.model import ModelConfig
from pia_ray.pia.components import Components
from pia_ray.pia.engine import Engine
from pia_ray.pia.loading.load import assemble
from pia_ray.prepare import prepare
from pia_ray.testing import make_ip_adapter, make_lora, make_pipeline_folder
from pia_ray.types import AnimationRequest
from pia_ray.weights import resolve


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    root = tmp_path_factory.mktemp("tiny")
    folder = make_pipeline_folder(root / "pipeline", vae_factor=4)
    words = make_lora(root / "words.safetensors", folder, parts=("text_encoder",))
    strokes = make_lora(root / "strokes.safetensors", folder, parts=("unet", "convolutions"))
    adapter, encoder = make_ip_adapter(root / "ip-adapter", folder)
    return ModelConfig(
        base=str(folder),
        device="cpu",
        ip_adapter=str(adapter),
        image_encoder=str(encoder),
        loras={"words": {"path": str(words), "weight": 0}, "strokes": {"path": str(strokes), "weight": 0}},  # type: ignore[dict-item]
    )


def components_of(model: ModelConfig) -> Components:
    return assemble(resolve(model), model)


def animate(engine: Engine, model: ModelConfig, **knobs: Any) -> tuple[np.ndarray[Any, Any], int]:
    """The frames of one row alone, and the operations of its steps and its decode."""
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    params = AnimationParams(
        prompt="the sea", seed=1, num_frames=3, num_inference_steps=3, width=32, height=32, **knobs
    )
    engine.join(prepare(AnimationRequest(Image.fromarray(pixels), params), model))
    done: list[Any] = []
    with FlopCounterMode(display=False) as counter:
        while engine.rows:
            done += engine.step()
    ((_, animation),) = done
    assert isinstance(animation, Animation), animation
    return animation.frames, counter.get_total_flops()


def test_rows_without_a_lora_are_the_same_after_rows_with_one(model: ModelConfig) -> None:
    parts = components_of(model)
    engine = Engine(parts, batch_size=1)
    first, _ = animate(engine, model)  # its prompts' keys and values are cached from here on
    before, operations = animate(engine, model)
    np.testing.assert_array_equal(first, before)
    processors = parts.unet.attn_processors
    for lora in ("words", "strokes", "strokes+words"):
        with_lora = animate(engine, model, lora=lora)[0]
        after, operations_after = animate(engine, model)
        np.testing.assert_array_equal(after, before)
        assert operations_after == operations, "the layers before the first cross-attention are shared as before"
        assert all(parts.unet.attn_processors[name] is processor for name, processor in processors.items())
        assert np.abs(with_lora.astype(int) - before).mean() > 0.5


def test_rows_with_a_lora_of_the_text_encoder_take_no_more_operations_than_others(model: ModelConfig) -> None:
    engine = Engine(components_of(model), batch_size=1)
    for _ in range(2):  # the first time projects the prompts
        _, plain = animate(engine, model)
        _, with_lora = animate(engine, model, lora="words")
    assert with_lora == plain


def test_rows_with_a_lora_of_the_text_encoder_share_forwards_with_others(model: ModelConfig) -> None:
    engine = Engine(components_of(model), batch_size=2)
    pixels = Image.fromarray(np.zeros((32, 32, 3), np.uint8))
    rows = [
        engine.join(
            prepare(AnimationRequest(pixels, AnimationParams(prompt="a", seed=1, num_frames=2, lora=lora)), model)
        )
        for lora in ("none", "words", "strokes")
    ]
    assert rows[0].forward_key == rows[1].forward_key != rows[2].forward_key


def test_two_engines_on_the_same_components_work_as_one_does(model: ModelConfig) -> None:
    parts = components_of(model)
    one = Engine(parts, batch_size=1)
    animate(one, model)
    before, operations = animate(one, model)
    other = Engine(parts, batch_size=1)
    for _ in range(2):
        again, operations_of_other = animate(other, model)
    after, operations_after = animate(one, model)
    np.testing.assert_array_equal(again, before)
    np.testing.assert_array_equal(after, before)
    assert operations_after == operations_of_other == operations


def test_what_is_rewritten_twice_is_rewritten_once(model: ModelConfig) -> None:
    parts = components_of(model)
    Engine(parts, batch_size=1)
    modules = {name: type(module) for module in (parts.unet, parts.vae) for name, module in module.named_modules()}
    tensors = {name: tensor.data_ptr() for part in (parts.unet, parts.vae) for name, tensor in part.named_buffers()}
    prefix = parts.unet.conv_in.prefix
    Engine(parts, batch_size=1)
    assert parts.unet.conv_in.prefix is prefix
    assert modules == {name: type(item) for part in (parts.unet, parts.vae) for name, item in part.named_modules()}
    assert tensors == {name: item.data_ptr() for part in (parts.unet, parts.vae) for name, item in part.named_buffers()}


def test_a_variant_shares_every_tensor_that_its_loras_leave(model: ModelConfig) -> None:
    parts = components_of(model)
    engine = Engine(parts, batch_size=1)
    animate(engine, model, lora="words")
    row = engine.join(
        prepare(AnimationRequest(Image.new("RGB", (32, 32)), AnimationParams(prompt="a", seed=1, lora="words")), model)
    )
    assert row.model.components.unet is parts.unet
    assert row.model.components.vae is parts.vae
    assert row.model.components.text_encoder is not parts.text_encoder
    assert isinstance(row.model.components.text_encoder, torch.nn.Module)
