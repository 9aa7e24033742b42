"""Copies that a GPU makes within one forward of the UNet and one decode, ours against diffusers' own."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNetMotionModel
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
from torch.nn import functional as F

from pia_ray.config.model import ModelConfig
from pia_ray.pia.device.placement import MEMORY_FORMAT, layout_of
from pia_ray.pia.evaluation import Branch, ImageTokens
from pia_ray.pia.loading.group_norm import normalise_as_original
from pia_ray.pia.loading.lora import _merged
from pia_ray.pia.unet.attention_kernels import choose_kernels
from pia_ray.pia.unet.choices import Choices
from pia_ray.pia.unet.cross_attention import CrossAttention
from pia_ray.pia.unet.free_u import free_u
from pia_ray.pia.unet.group_norms import SUMS
from pia_ray.pia.unet.image_attention import ImageCrossAttention
from pia_ray.pia.unet.motion_modules import time_kernels
from pia_ray.pia.unet.rewrites import restructure_unet, restructure_vae
from tests.pia.fake_gpu import GPU, FakeGPU

FRAMES, SIDE = 4, 16


def unet() -> UNetMotionModel:
    """With each kind of block of Stable Diffusion 1.5 and PIA's motion modules, at a tenth of the width."""
    with torch.device("meta"):
        return UNetMotionModel(
            in_channels=9,
            down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
            up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
            block_out_channels=(32, 64),
            layers_per_block=1,
            cross_attention_dim=64,
            num_attention_heads=8,
            motion_num_attention_heads=8,
            use_motion_mid_block=False,
            norm_num_groups=8,
        )


def vae() -> AutoencoderKL:
    with torch.device("meta"):
        return AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(16, 32),
            layers_per_block=1,
            norm_num_groups=8,
        )


def on_gpu(model: Any) -> Any:
    """In float16; weights keep their layout."""
    return model._apply(lambda weight: torch.empty_like(weight, dtype=torch.float16, device=GPU))


def random(*shape: int) -> torch.Tensor:
    return torch.empty(*shape, dtype=torch.float16, device=GPU)


def forward(unet: UNetMotionModel) -> object:
    sample, prompts = random(2, 9, FRAMES, SIDE, SIDE), random(2 * FRAMES, 77, 64)
    return unet(sample, torch.empty(2, device=GPU), encoder_hidden_states=prompts)


def decode(vae: AutoencoderKL) -> object:
    return vae.decode(random(FRAMES, 4, SIDE, SIDE))


def original() -> UNetMotionModel:
    made = unet()
    normalise_as_original(made)
    return made


def strengthened(unet: UNetMotionModel) -> object:
    with free_u(unet, (0.9, 0.2, 1.5, 1.6)):
        return forward(unet)


RUNS = {
    "unet": (unet, forward),
    "vae": (vae, decode),
    "original": (original, forward),
    "free_u": (unet, strengthened),
}


@cache
def copies_of(part: str, *, fastest: str | None) -> list[tuple[str, int]]:
    """The copies of one run, of diffusers' model or of ours on a GPU that is fastest by this way of GroupNorm."""
    make, run = RUNS[part]
    model: Any = make()
    if fastest is not None:
        model = model.to(memory_format=MEMORY_FORMAT)
    with FakeGPU() as gpu, torch.no_grad():
        model = on_gpu(model)
        if fastest is not None:
            choices = Choices(lambda name, way: 0.0 if name == fastest else 1.0)
            if isinstance(model, UNetMotionModel):
                restructure_unet(model, choices)
                time_kernels(model, choose_kernels(model))
            else:
                restructure_vae(model, choices)
        gpu.copies.clear()
        run(model)
    return gpu.copies


def looking(unet: UNetMotionModel) -> Callable[[], object]:
    """A step of one row: the forward of both sides of guidance with the picture of an IP-Adapter."""
    for layer in _cross_attentions(unet):
        width = layer.to_q.in_features
        layer.set_processor(ImageCrossAttention(random(width, 64), random(width, 64)))
    cross = CrossAttention(unet)
    images = [ImageTokens(random(4, 64), 0.5) for _ in range(2)]
    branches = [Branch(random(77, 64), random(1), random(1), image=image) for image in images]
    return lambda: unet(random(2, 9, FRAMES, SIDE, SIDE), torch.empty(2, device=GPU), cross.states(branches))


def looking_by_diffusers(unet: UNetMotionModel) -> Callable[[], object]:
    for layer in _cross_attentions(unet):
        layer.set_processor(on_gpu(IPAdapterAttnProcessor2_0(layer.to_q.in_features, 64, num_tokens=(4,))))
    states = random(2 * FRAMES, 77, 64), [random(2 * FRAMES, 1, 4, 64)]
    return lambda: unet(random(2, 9, FRAMES, SIDE, SIDE), torch.empty(2, device=GPU), states)


def _cross_attentions(unet: UNetMotionModel) -> list[Any]:
    return [each for name, each in unet.named_modules() if name.endswith("attn2") and "motion_modules" not in name]


def copies_of_a_second_step(
    begin: Callable[[UNetMotionModel], Callable[[], object]], *, ours: bool
) -> list[tuple[str, int]]:
    """What a step copies that is not the first one of its row."""
    with FakeGPU() as gpu, torch.no_grad():
        model: Any = on_gpu(unet().to(memory_format=MEMORY_FORMAT) if ours else unet())
        if ours:
            restructure_unet(model, Choices(lambda name, way: 0.0 if name == SUMS else 1.0))
            time_kernels(model, choose_kernels(model))
        step = begin(model)
        step()
        gpu.copies.clear()
        step()
    return gpu.copies


def test_a_step_with_the_picture_of_an_ip_adapter_copies_less_than_by_diffusers() -> None:
    theirs = copies_of_a_second_step(looking_by_diffusers, ours=False)
    ours = copies_of_a_second_step(looking, ours=True)
    (num, size), (their_num, their_size) = (num_and_bytes(copies, least=2048) for copies in (ours, theirs))
    assert num < their_num, (ours, theirs)
    assert size < their_size / 3, (ours, theirs)


def test_a_variant_with_a_lora_in_all_layers_copies_what_the_model_without_copies() -> None:
    def copies(*, merged: bool) -> list[tuple[str, int]]:
        with FakeGPU() as gpu, torch.no_grad():
            model: Any = on_gpu(unet().to(memory_format=MEMORY_FORMAT))
            choices = Choices(lambda name, way: 0.0 if name == SUMS else 1.0)
            restructure_unet(model, choices)
            if merged:
                layers = [
                    name for name, each in model.named_modules() if isinstance(each, torch.nn.Conv2d | torch.nn.Linear)
                ]
                model = _merged(
                    model, {(name, "weight"): random(*model.get_submodule(name).weight.shape) for name in layers}
                )
                restructure_unet(model, choices)
            gpu.copies.clear()
            forward(model)
        return gpu.copies

    assert copies(merged=True) == copies(merged=False)


def test_an_offloaded_unet_copies_no_more_than_by_diffusers() -> None:
    """It runs diffusers' own layers, so its weights have to be in their layout."""
    layout = layout_of(ModelConfig.named("demo").model_copy(update={"offload": "model"}), GPU)
    with FakeGPU() as gpu, torch.no_grad():
        model = on_gpu(unet().to(memory_format=layout))
        gpu.copies.clear()
        forward(model)
    assert gpu.copies == copies_of("unet", fastest=None)


def num_and_bytes(copies: list[tuple[str, int]], *, least: int = 0) -> tuple[int, int]:
    sizes = [size for _, size in copies if size >= least]
    return len(sizes), sum(sizes)


@pytest.mark.parametrize(("part", "share"), [("unet", 1 / 3), ("vae", 1 / 3), ("original", 1 / 3), ("free_u", 1.0)])
def test_a_gpu_copies_a_third_at_most_of_what_it_copies_for_diffusers_with_free_u_no_more(
    part: str, share: float
) -> None:
    theirs = copies_of("unet" if part == "original" else part, fastest=None)  # diffusers has no original
    ours = copies_of(part, fastest=SUMS)
    # Less is one value for each channel, which is no work to speak of.
    (num, size), (their_num, their_size) = (num_and_bytes(copies, least=2048) for copies in (ours, theirs))
    assert num < their_num, (ours, theirs)
    assert size < their_size * share, (ours, theirs)


def test_with_the_group_norm_of_torch_a_gpu_would_copy_each_picture_to_and_fro() -> None:
    """This is the fault that our ways mend, and it shows that the fake GPU has it."""
    with FakeGPU() as gpu:
        near = torch.empty(2, 8, 4, 4, device=GPU).to(memory_format=torch.channels_last)
        weight = torch.empty(8, 8, 3, 3, device=GPU).to(memory_format=torch.channels_last)
        gpu.copies.clear()
        normal = F.group_norm(near, 2)
        answer = F.conv2d(normal, weight)
    assert normal.is_contiguous()
    assert answer.is_contiguous(memory_format=torch.channels_last)
    assert gpu.copies == [("clone", near.nbytes), ("pictures of a convolution", near.nbytes)]
