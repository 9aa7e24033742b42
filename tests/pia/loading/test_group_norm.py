"""GroupNorm as in PIA's own code, against its five-dimensional arithmetic written out; rows keep their statistics."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from pia_ray import Animation, AnimationParams, AnimationRequest, Animator, CatalogConfig, ModelConfig
from pia_ray.manifest.items import run_spec
from pia_ray.pia.components import Components
from pia_ray.pia.engine import Engine
from pia_ray.pia.loading.group_norm import normalise_as_original
from pia_ray.pia.loading.load import assemble
from pia_ray.prepare import prepare
from pia_ray.testing import make_pipeline_folder
from pia_ray.weights import resolve


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pipeline_folder(tmp_path_factory.mktemp("model"), vae_factor=4, motion_mid_block=True)


def model_of(folder: Path, **settings: Any) -> ModelConfig:
    return ModelConfig(name="tiny", base=str(folder), device="cpu", long_edge=32, size_step=16, **settings)


def unet_of(folder: Path) -> Any:
    from diffusers import UNetMotionModel

    return UNetMotionModel.from_pretrained(folder / "unet").eval()


def picture(seed: int) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((32, 32), Image.Resampling.BICUBIC)


def ask(seed: int = 0, **knobs: Any) -> AnimationRequest:
    given = {"prompt": "a red cat", "num_frames": 4, "num_inference_steps": 3, "seed": seed, "motion_scale": 2, **knobs}
    return AnimationRequest(picture(seed), AnimationParams(**given))


def frames_of(animator: Animator, *requests: AnimationRequest) -> list[np.ndarray]:
    outcomes = animator.animate(list(requests))
    assert all(isinstance(outcome, Animation) for outcome in outcomes), outcomes
    return [outcome.frames.astype(int) for outcome in outcomes]


def inputs(num: int, num_frames: int, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    # Frames that differ in scale, where the two ways of normalising differ most.
    scale = torch.linspace(0.3, 3, num_frames).view(1, 1, -1, 1, 1)
    return {
        "sample": torch.randn(num, 9, num_frames, 8, 8, generator=generator) * scale,
        "timestep": torch.tensor([900.0, 20.0, 400.0][:num]),
        "encoder_hidden_states": torch.randn(num * num_frames, 7, 32, generator=generator),
    }


def normal(values: torch.Tensor, norm: torch.nn.GroupNorm, dims: tuple[int, ...]) -> torch.Tensor:
    """Group normalisation of [B, C, T, h, w] over the given dimensions of [B, groups, C / groups, T, h, w]."""
    grouped = values.unflatten(1, (norm.num_groups, -1))
    mean, variance = grouped.mean(dims, keepdim=True), grouped.var(dims, unbiased=False, keepdim=True)
    result = ((grouped - mean) / (variance + norm.eps).sqrt()).flatten(1, 2)
    return result * norm.weight.view(1, -1, 1, 1, 1) + norm.bias.view(1, -1, 1, 1, 1)


def written_out(unet: Any, num_frames: int) -> Any:
    """The same UNet with the original's normalisation written out and put in by the names of the layers."""
    unet = copy.deepcopy(unet)

    def over_the_video(norm: Any, args: tuple[torch.Tensor], _: torch.Tensor) -> torch.Tensor:
        values = args[0].unflatten(0, (-1, num_frames)).permute(0, 2, 1, 3, 4)
        return normal(values, norm, (2, 3, 4, 5)).permute(0, 2, 1, 3, 4).flatten(0, 1)

    def frame_by_frame(norm: Any, args: tuple[torch.Tensor], _: torch.Tensor) -> torch.Tensor:
        return normal(args[0], norm, (2, 4, 5))

    hooks = {r".*\.resnets\.\d+\.norm[12]": over_the_video, "conv_norm_out": over_the_video}
    hooks[r".*\.motion_modules\.\d+\.norm"] = frame_by_frame
    for name, module in unet.named_modules():
        for pattern, hook in hooks.items():
            if re.fullmatch(pattern, name):
                module.register_forward_hook(hook)
    return unet


@pytest.mark.parametrize("num_frames", [1, 5])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@torch.inference_mode()
def test_the_unet_equals_the_originals_normalisation_written_out(
    folder: Path, num_frames: int, layout: torch.memory_format
) -> None:
    plain, ours = unet_of(folder), unet_of(folder).to(memory_format=layout)
    normalise_as_original(ours)
    given = inputs(2, num_frames)
    expected = written_out(plain, num_frames)(**given).sample
    assert torch.allclose(ours(**given).sample, expected, atol=1e-5)
    if num_frames > 1:
        difference = (plain(**given).sample - expected).norm() / expected.norm()
        assert difference > 0.02, "the inputs do not tell the two apart"


@torch.inference_mode()
def test_a_resnet_block_is_the_originals_five_dimensional_one(folder: Path) -> None:
    unet, num_frames = unet_of(folder), 4
    plain = copy.deepcopy(unet.down_blocks[0].resnets[0])
    normalise_as_original(unet)
    caught: dict[str, torch.Tensor] = {}
    unet.down_blocks[0].resnets[0].register_forward_hook(
        lambda _, args, kwargs, out: caught.update(kwargs, out=out), with_kwargs=True
    )
    unet(**inputs(2, num_frames))
    per_frame = lambda layer, x: layer(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (-1, num_frames)).transpose(1, 2)  # noqa: E731
    x = caught["input_tensor"].unflatten(0, (-1, num_frames)).transpose(1, 2)  # [B, C, T, h, w]
    embedding = plain.time_emb_proj(F.silu(caught["temb"])).unflatten(0, (-1, num_frames)).transpose(1, 2)
    hidden = per_frame(plain.conv1, F.silu(plain.norm1(x))) + embedding[..., None, None]  # torch's GroupNorm takes 5-D
    hidden = per_frame(plain.conv2, F.silu(plain.norm2(hidden)))
    shortcut = x if plain.conv_shortcut is None else per_frame(plain.conv_shortcut, x)
    assert torch.allclose(caught["out"], (shortcut + hidden).transpose(1, 2).flatten(0, 1), atol=1e-5)


class LeftAlone(torch.nn.Module):
    """A UNet that the engine does not recognise, and so does not rewrite."""

    def __init__(self, unet: torch.nn.Module) -> None:
        super().__init__()
        self.unet, self.config = unet, unet.config

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.unet(*args, **kwargs)


def test_videos_are_made_with_the_original_normalisation_where_the_model_says_so(folder: Path) -> None:
    config = model_of(folder, group_norm="original")
    weights = resolve(config)
    parts = assemble(weights, model_of(folder))
    by_hand = Components(**{**vars(parts), "unet": LeftAlone(written_out(parts.unet, 4))})
    engine = Engine(by_hand, batch_size=1)
    engine.join(prepare(ask(), config))
    ended: list[Any] = []
    while not ended:
        ended = engine.step()
    with Animator(config) as animator, Animator(model_of(folder)) as other:
        (ours,), (diffusers_way,) = frames_of(animator, ask()), frames_of(other, ask())
    assert np.abs(ours - ended[0][1].frames.astype(int)).max() <= 1
    assert np.abs(ours - diffusers_way).mean() > 0.5, "two models of one process have normalisations of their own"


def test_each_row_of_a_batch_equals_its_single_run(folder: Path) -> None:
    requests = [
        ask(1),
        ask(2, motion_scale=5, guidance_scale=3.0, prompt="the sea"),
        ask(3, scheduler="euler", guidance_scale=1.0),
        ask(4, num_frames=3),
    ]
    config = model_of(folder, group_norm="original")
    with Animator(config, batch_size=4) as many, Animator(config, batch_size=1) as one:
        together, alone = frames_of(many, *requests), frames_of(one, *requests)
    for first, second in zip(together, alone, strict=True):
        assert np.abs(first - second).max() <= 1


@torch.inference_mode()
def test_a_copy_of_the_unet_counts_its_own_frames(folder: Path) -> None:
    first = unet_of(folder)
    normalise_as_original(first)
    second = copy.deepcopy(first)
    first(**inputs(1, 6))
    assert torch.allclose(second(**inputs(2, 3)).sample, first(**inputs(2, 3)).sample)


def test_the_option_is_part_of_the_work_key(folder: Path) -> None:
    models = [model_of(folder, group_norm=way) for way in ("diffusers", "original")]
    specs = [run_spec(CatalogConfig(manifest="m.csv", output="out", model=model), model, "v") for model in models]
    assert specs[0] != specs[1]
