"""Precision, tiles, offload and bounds: the same videos in less memory, and the stated sizes are those of the code."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from benchmarks.peak_memory import peak_bytes, weightless
from pia_ray import Animation, AnimationParams, AnimationRequest, Animator, CatalogConfig, ModelConfig
from pia_ray.config.model import build, load_model
from pia_ray.errors import ConfigError, NonFiniteFrames
from pia_ray.manifest.items import run_spec
from pia_ray.pia.components import Components
from pia_ray.pia.decoding.decode import decode
from pia_ray.pia.denoising.conditions import Conditions
from pia_ray.pia.device.memory import (
    CPU_DECODE_BYTES,
    DECODE_WIDTHS,
    EVALUATION_WIDTHS,
    HEADROOM,
    evaluations_that_fit,
    frames_at_once,
    weight_bytes,
)
from pia_ray.pia.device.vae_tiling import TILE_PIXELS, is_tiled, tiled
from pia_ray.pia.loading.group_norm import normalise_as_original
from pia_ray.pia.loading.load import assemble
from pia_ray.pia.loading.offload import offload
from pia_ray.testing import make_lora, make_pipeline_folder, make_textual_inversion
from pia_ray.weights import resolve

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pipeline_folder(tmp_path_factory.mktemp("model"), vae_factor=4)


def model_of(folder: Path, **settings: Any) -> ModelConfig:
    return ModelConfig(name="tiny", base=str(folder), device="cpu", long_edge=32, size_step=16, **settings)


def parts_of(folder: Path, **settings: Any) -> Components:
    model = model_of(folder, **settings)
    return assemble(resolve(model), model)


def picture(seed: int, size: tuple[int, int] = (32, 32)) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(values).resize(size, Image.Resampling.BICUBIC)


def ask(seed: int = 0, *, size: tuple[int, int] = (32, 32), **knobs: Any) -> AnimationRequest:
    given = {"prompt": "a red cat", "num_frames": 4, "num_inference_steps": 3, "seed": seed, "motion_scale": 1, **knobs}
    return AnimationRequest(picture(seed, size), AnimationParams(width=size[0], height=size[1], **given))


@pytest.fixture(scope="module")
def plain(folder: Path) -> Iterator[Animator]:
    with Animator(model_of(folder)) as animator:
        yield animator


def animate(model: ModelConfig, *requests: AnimationRequest) -> list[np.ndarray]:
    with Animator(model) as animator:
        return frames_of(animator, *requests)


def frames_of(animator: Animator, *requests: AnimationRequest) -> list[np.ndarray]:
    outcomes = animator.animate(list(requests))
    assert all(isinstance(outcome, Animation) for outcome in outcomes), outcomes
    return [outcome.frames.astype(int) for outcome in outcomes]


# Precision.


@pytest.mark.parametrize(
    ("dtypes", "mean"),
    [
        ({"dtype": "float16", "vae_dtype": "float32"}, 0.6),
        ({"dtype": "float16", "vae_dtype": "bfloat16"}, 3.0),
        ({"dtype": "bfloat16", "vae_dtype": "float32", "text_encoder_dtype": "float32"}, 3.0),
        ({"dtype": "float32", "vae_dtype": "float16", "text_encoder_dtype": "bfloat16"}, 0.6),
    ],
    ids=str,
)
def test_unet_vae_and_text_encoder_may_differ_in_precision(
    folder: Path, plain: Animator, dtypes: dict[str, str], mean: float
) -> None:
    (exact,) = frames_of(plain, ask(3))
    (ours,) = animate(model_of(folder, **dtypes), ask(3))
    assert 0 < np.abs(ours - exact).mean() <= mean


def test_each_part_is_loaded_in_its_own_precision(folder: Path) -> None:
    parts = parts_of(folder, dtype="float16", vae_dtype="bfloat16", text_encoder_dtype="float32")
    assert [part.dtype for part in (parts.unet, parts.vae, parts.text_encoder)] == [
        torch.float16,
        torch.bfloat16,
        torch.float32,
    ]
    parts = parts_of(folder, dtype="float16")
    assert {part.dtype for part in (parts.unet, parts.vae, parts.text_encoder)} == {torch.float16}


def test_a_vae_in_full_precision_encodes_and_decodes_as_if_all_were(folder: Path) -> None:
    exact, mixed = parts_of(folder), parts_of(folder, dtype="bfloat16", vae_dtype="float32")
    pictures = [Conditions(parts).picture(picture(1), torch.Generator().manual_seed(1)) for parts in (exact, mixed)]
    assert torch.equal(*pictures)
    latents = torch.randn(4, 2, 8, 8, generator=torch.Generator().manual_seed(2)) * 0.2
    assert torch.equal(decode(exact, latents), decode(mixed, latents))


def test_a_vae_that_overflows_is_named_and_full_precision_helps(folder: Path) -> None:
    latents = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    results = []
    for dtype in ("float16", "float32"):
        parts = parts_of(folder, vae_dtype=dtype)
        parts.vae.decoder.conv_in.weight.mul_(6e4)
        try:
            results.append(decode(parts, latents))
        except NonFiniteFrames as error:
            results.append(error)
    assert isinstance(results[0], NonFiniteFrames)
    assert "vae_dtype float32" in str(results[0])
    assert results[1].shape == (1, 32, 32, 3)


@pytest.mark.parametrize(
    "setting", [{"vae_dtype": "float32"}, {"text_encoder_dtype": "float32"}, {"vae_tiling": "on"}], ids=str
)
def test_what_changes_a_videos_bytes_is_part_of_the_work_key(folder: Path, setting: dict[str, Any]) -> None:
    def spec(**settings: Any) -> dict[str, Any]:
        return run_spec(
            CatalogConfig(manifest="m.csv", output="out", model=(model := model_of(folder, **settings))), model, "v"
        )

    assert spec(**setting) != spec()
    assert spec(offload="model", memory_gib=4) == spec()


# Tiles.


def upscale(values: torch.Tensor) -> torch.Tensor:
    return values.repeat_interleave(4, -1).repeat_interleave(4, -2)


@pytest.mark.parametrize("size", [(16, 16), (17, 40), (30, 31), (64, 20), (100, 9)])
def test_tiles_put_together_what_they_took_apart(size: tuple[int, int]) -> None:
    values = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    shapes: set[tuple[int, ...]] = set()

    def run(tile: torch.Tensor) -> torch.Tensor:
        shapes.add(tuple(tile.shape[-2:]))
        return upscale(tile)

    assert torch.allclose(tiled(run, values, tile=16, scale=4), upscale(values), atol=1e-5)
    assert shapes == {(min(16, size[0]), min(16, size[1]))}, "no tile is a sliver"
    large = upscale(values)
    small = tiled(lambda tile: tile[..., ::4, ::4], large, tile=64, scale=1 / 4)
    assert torch.allclose(small, values, atol=1e-5)


@torch.inference_mode()
def test_tiles_blend_as_those_of_diffusers_where_those_are_whole(folder: Path) -> None:
    vae = parts_of(folder).vae
    latents = torch.randn(1, 4, 8, 28, generator=torch.Generator().manual_seed(0)) * 0.2
    ours = tiled(lambda tile: vae.decode(tile).sample, latents, tile=16, scale=4)
    vae.enable_tiling()
    vae.tile_latent_min_size, vae.tile_sample_min_size = 16, 64
    theirs = vae.decode(latents).sample
    whole = 4 * 24  # from here on diffusers blends in a sliver of 4 latents
    assert torch.allclose(ours[..., :whole], theirs[..., :whole], atol=1e-5)


def test_auto_tiles_only_what_is_larger_than_1024_px_square() -> None:
    assert not is_tiled("auto", height=1024, width=1024)
    assert is_tiled("auto", height=1024, width=1032)
    assert is_tiled("on", height=16, width=TILE_PIXELS + 8)
    assert not is_tiled("on", height=TILE_PIXELS, width=TILE_PIXELS)
    assert not is_tiled("off", height=4096, width=4096)


def test_a_wide_video_in_tiles_is_near_the_whole_one_and_its_neighbours_are_untouched(folder: Path) -> None:
    wide, small = ask(1, size=(640, 16), num_frames=2, num_inference_steps=2), ask(2)
    whole, plain = animate(model_of(folder, vae_tiling="off"), wide, small)
    in_tiles, neighbour = animate(model_of(folder, vae_tiling="on"), wide, small)
    assert np.array_equal(plain, neighbour)
    # GroupNorm and attention of the VAE see one tile at a time, so tiles are near and not equal.
    assert 0 < np.abs(in_tiles - whole).mean() < 12


def test_memory_of_tiles_does_not_grow_with_the_picture() -> None:
    from diffusers import AutoencoderKL

    with weightless(torch.float16):
        vae = AutoencoderKL(block_out_channels=(16, 16), norm_num_groups=8, **blocks(2))
        peaks = []
        for side in (128, 256):
            latents = torch.empty(1, 4, side // 2, side // 2)
            peaks.append(
                [
                    peak_bytes(
                        lambda latents=latents: tiled(lambda x: vae.decode(x).sample, latents, tile=32, scale=2)
                    ),
                    peak_bytes(lambda latents=latents: vae.decode(latents)),
                ]
            )
    (tiles, whole), (more_tiles, larger) = peaks
    assert larger == pytest.approx(4 * whole, rel=0.05)
    frame = 3 * 4 * 256**2  # only the finished frame in float32 grows
    assert more_tiles - tiles < 3 * frame < larger / 2


def blocks(num: int) -> dict[str, tuple[str, ...]]:
    return {"down_block_types": ("DownEncoderBlock2D",) * num, "up_block_types": ("UpDecoderBlock2D",) * num}


@pytest.mark.heavy
def test_a_video_of_1024_px_is_made_end_to_end(tmp_path: Path) -> None:
    folder = make_pipeline_folder(tmp_path, vae_factor=16)  # attention over latents of 128 px would take 8 s a frame
    request = ask(size=(1024, 1024), num_frames=1, num_inference_steps=1, guidance_scale=1.0, scheduler="euler")
    (frames,) = animate(model_of(folder, vae_tiling="on", memory_gib=1), request)
    assert frames.shape == (1, 1024, 1024, 3)
    assert frames.std() > 1


# Offload.


@pytest.mark.parametrize("mode", ["model", "sequential"])
def test_offloaded_models_make_the_same_videos(folder: Path, plain: Animator, mode: str) -> None:
    requests = [
        ask(1),
        ask(2, clip_skip=1, scheduler="euler-a", prompt="the sea"),
        ask(3, num_inference_steps=5, guidance_scale=1.0, strength=0.7),
        ask(4, size=(16, 32)),
        ask(1),
    ]
    ours = animate(model_of(folder, offload=mode), *requests)
    for first, second in zip(frames_of(plain, *requests), ours, strict=True):
        # Weights that stay are run in rewritten layers (pia.exact), which are equal to float tolerance.
        assert np.abs(first - second).max() <= 1


def test_loras_act_on_offloaded_models_and_beside_the_originals_group_norm(folder: Path, tmp_path: Path) -> None:
    lora = {"loras": {"one": str(make_lora(tmp_path / "one.safetensors", folder))}, "group_norm": "original"}
    requests = [ask(1, lora="none"), ask(1, lora="one"), ask(2, lora="one:0.5"), ask(3)]
    plain = animate(model_of(folder, **lora), *requests)
    ours = animate(model_of(folder, offload="model", **lora), *requests)
    for first, second in zip(plain, ours, strict=True):
        assert np.abs(first - second).max() <= 1
    assert np.abs(plain[0] - plain[1]).max() > 1


def test_sequential_offload_with_loras_is_refused_with_what_to_do() -> None:
    with pytest.raises(ConfigError, match="take offload model"):
        build(ModelConfig, {"base": "somewhere", "offload": "sequential", "loras": {"one": "one.safetensors"}})


def test_sequential_offload_leaves_no_weight_behind_after_a_forward(folder: Path, tmp_path: Path) -> None:
    words = {"<thing>": str(make_textual_inversion(tmp_path / "thing.safetensors"))}
    parts = parts_of(folder, offload="sequential", textual_inversions=words)
    decode(parts, torch.zeros(4, 1, 8, 8))
    Conditions(parts).prompt("the sea", clip_skip=None)
    modules = (parts.unet, parts.vae, parts.text_encoder)
    assert {weight.device.type for part in modules for weight in part.parameters()} == {"meta"}


class Travelling(nn.Linear):
    """A layer that is on a device when its weights are not those at home, and runs only there and alone."""

    everyone: list[Travelling]

    def __init__(self) -> None:
        super().__init__(2, 2)
        self.home = self.weight.data_ptr()

    @property
    def away(self) -> bool:
        return self.weight.data_ptr() != self.home

    def to(self, device: torch.device) -> Travelling:  # type: ignore[override]
        self.weight.data = self.weight.data.clone()
        return self

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        assert [part for part in self.everyone if part.away] == [self]
        return super().forward(values)


def test_model_offload_keeps_one_part_on_the_device_in_any_order() -> None:
    parts = Travelling.everyone = [Travelling() for _ in range(3)]
    offload(parts, "model", CPU)
    assert not any(part.away for part in parts)
    with torch.inference_mode():
        for index in (0, 1, 2, 1, 1, 0, 2, 0):
            parts[index](torch.ones(2))
    assert [part.away for part in parts] == [True, False, False]


def test_offload_on_a_cpu_says_that_it_saves_nothing(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    parts_of(folder, offload="model")
    assert "saves nothing on a CPU" in caplog.text


# Bounds.


def test_a_bound_on_memory_cuts_forwards_and_decodes_and_changes_no_video(folder: Path, plain: Animator) -> None:
    requests = [ask(seed) for seed in range(3)]
    tight = 0.003
    parts = parts_of(folder, memory_gib=tight)
    assert weight_bytes(vars(parts).values()) < tight * 2**30
    size = {"num_frames": 4, "height": 8, "width": 8}
    fit = evaluations_that_fit(parts, **size)
    assert fit is not None
    large = parts_of(folder, memory_gib=1)
    most, compiled = (evaluations_that_fit(replace(large, compile_mode=mode), **size) for mode in (None, "default"))
    assert fit < compiled < most
    unbound = parts_of(folder)
    assert evaluations_that_fit(unbound, **size) is None
    assert frames_at_once(parts, height=128, width=128) < frames_at_once(unbound, height=128, width=128)
    ours = animate(model_of(folder, memory_gib=tight), *requests)
    for first, second in zip(frames_of(plain, *requests), ours, strict=True):
        assert np.abs(first - second).max() <= 1


def test_a_bound_below_the_weights_still_leaves_one_frame_and_one_evaluation(folder: Path) -> None:
    parts = parts_of(folder, memory_gib=0.0001)
    assert frames_at_once(parts, height=64, width=64) == 1
    assert evaluations_that_fit(parts, num_frames=16, height=64, width=64) == 1


def test_frames_decoded_at_once_stay_within_what_counts_as_free(folder: Path) -> None:
    parts = parts_of(folder)
    channels = parts.vae.config["block_out_channels"][0]
    for side in (64, 256, 1024, 2048):
        num = frames_at_once(parts, height=side, width=side)
        pixels = min(side, TILE_PIXELS) ** 2 if side > 1024 else side**2
        assert num == 1 or num * pixels * channels * DECODE_WIDTHS * 4 <= HEADROOM * CPU_DECODE_BYTES


@pytest.mark.parametrize(("text", "value"), [("on", "on"), ("off", "off"), ("auto", "auto"), ('"on"', "on")])
def test_a_model_file_may_say_on_and_off_without_quotes(tmp_path: Path, text: str, value: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(f"base: somewhere\nvae_tiling: {text}\n")
    assert load_model(str(file)).vae_tiling == value


@pytest.mark.heavy
@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.float32, marks=pytest.mark.soak)])
def test_the_stated_activations_are_those_of_stable_diffusion_15(dtype: torch.dtype) -> None:
    from diffusers import AutoencoderKL, UNetMotionModel

    with weightless(dtype):
        vae = AutoencoderKL(block_out_channels=(128, 256, 512, 512), layers_per_block=2, **blocks(4))
        latents = torch.empty(1, 4, 64, 64)
        decoded = peak_bytes(lambda: vae.decode(latents))
        assert 0.95 < decoded / (DECODE_WIDTHS * 128 * 512**2 * dtype.itemsize) <= 1.01
        unet = UNetMotionModel(
            in_channels=9,
            cross_attention_dim=768,
            num_attention_heads=8,
            motion_num_attention_heads=8,
            use_motion_mid_block=False,
        )
        sample, prompts = torch.empty(2, 9, 16, 64, 64), torch.empty(32, 77, 768)
        stated = EVALUATION_WIDTHS * 320 * 2 * 16 * 64 * 64 * dtype.itemsize
        for ways in ("diffusers", "original"):
            if ways == "original":
                normalise_as_original(unet)
            evaluated = peak_bytes(lambda: unet(sample, torch.zeros(2), encoder_hidden_states=prompts))
            assert 0.85 < evaluated / stated <= 1, ways
