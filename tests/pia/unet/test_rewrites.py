"""The rewritten UNet and VAE against diffusers' own, on every path, and how much less they compute."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNetMotionModel
from diffusers.models.upsampling import Upsample2D
from torch.nn.attention import SDPBackend
from torch.utils.flop_counter import FlopCounterMode

from pia_ray.pia.device.placement import SDPA_ROWS
from pia_ray.pia.evaluation import Branch
from pia_ray.pia.unet.attention_kernels import Kernels, choose_kernels, chosen_kernels
from pia_ray.pia.unet.choices import Choices
from pia_ray.pia.unet.cross_attention import CrossAttention
from pia_ray.pia.unet.group_norms import SUMS, choose_group_norms
from pia_ray.pia.unet.guidance_prefix import Prefix
from pia_ray.pia.unet.motion_modules import TemporalTransformer, attend_over_time, most_positions, time_kernels
from pia_ray.pia.unet.rewrites import restructure_unet, restructure_vae
from pia_ray.pia.unet.upsample import SubpixelUpsample
from pia_ray.testing import make_pipeline_folder

FRAMES = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pipeline_folder(tmp_path_factory.mktemp("checkpoint"), motion_mid_block=True)


@pytest.fixture(scope="module")
def plain(folder: Path) -> UNetMotionModel:
    return UNetMotionModel.from_pretrained(folder, subfolder="unet").eval()


@pytest.fixture(scope="module")
def rewritten(plain: UNetMotionModel) -> tuple[UNetMotionModel, Prefix]:
    unet = copy.deepcopy(plain)
    prefix = restructure_unet(unet)
    assert prefix is not None
    return unet, prefix


def distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


@torch.inference_mode()
def predict(unet: UNetMotionModel, sample: torch.Tensor, timesteps: torch.Tensor, seed: int = 0) -> torch.Tensor:
    width = unet.config["cross_attention_dim"]
    prompts = torch.randn(len(sample), 7, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
    prompts = prompts.to(sample.dtype).repeat_interleave(sample.shape[2], dim=0)
    return unet(sample, timesteps, encoder_hidden_states=prompts, return_dict=False)[0]


def inputs(num: int, height: int, width: int, *, frames: int = FRAMES) -> torch.Tensor:
    return torch.randn(num, 9, frames, height, width, generator=torch.Generator().manual_seed(num))


@pytest.mark.parametrize(("height", "width"), [(8, 8), (6, 4), (5, 7)], ids=["whole", "uneven", "odd"])
@pytest.mark.parametrize("frames", [1, 4, 7])
def test_the_rewritten_unet_equals_the_plain_one_also_where_sides_do_not_halve(
    plain: UNetMotionModel, rewritten: tuple[UNetMotionModel, Prefix], height: int, width: int, frames: int
) -> None:
    sample, timesteps = inputs(2, height, width, frames=frames), torch.tensor([900.0, 41.0])
    assert distance(predict(rewritten[0], sample, timesteps), predict(plain, sample, timesteps)) < 5e-6


def test_the_weights_of_doublings_are_made_when_they_are_first_used(plain: UNetMotionModel) -> None:
    unet = copy.deepcopy(plain)
    restructure_unet(unet)
    before = {name for name, _ in unet.named_buffers()}
    predict(unet, inputs(1, 8, 8), torch.tensor([900.0]))
    made = {name for name, _ in unet.named_buffers()} - before
    assert made
    assert all(name.endswith(".upsamplers.0.subpixel") for name in made)


def test_channels_last_weights_change_nothing(
    plain: UNetMotionModel, rewritten: tuple[UNetMotionModel, Prefix]
) -> None:
    unet = copy.deepcopy(rewritten[0]).to(memory_format=torch.channels_last)
    sample, timesteps = inputs(2, 8, 8), torch.tensor([900.0, 41.0])
    assert distance(predict(unet, sample, timesteps), predict(plain, sample, timesteps)) < 5e-6


def test_entries_that_share_their_beginning_equal_those_that_are_computed_apart(
    plain: UNetMotionModel, rewritten: tuple[UNetMotionModel, Prefix]
) -> None:
    unet, prefix = rewritten
    spread = torch.tensor([0, 1, 2, 1, 0])
    sample = inputs(3, 8, 8)[spread]
    timesteps = torch.tensor([900.0, 41.0, 7.0])[spread]
    with prefix.shared(num=3, num_frames=FRAMES, inverse=spread):
        shared = predict(unet, sample, timesteps)
    assert distance(shared, predict(plain, sample, timesteps)) < 5e-6


def test_a_shared_beginning_is_that_of_the_first_entries_alone(rewritten: tuple[UNetMotionModel, Prefix]) -> None:
    unet, prefix = rewritten
    sample, timesteps = inputs(2, 8, 8), torch.tensor([500.0, 500.0])
    apart = predict(unet, sample, timesteps)
    with prefix.shared(num=1, num_frames=FRAMES, inverse=torch.tensor([0, 0])):
        shared = predict(unet, sample, timesteps)
    assert distance(predict(unet, sample, timesteps), apart) == 0  # nothing is shared any more
    assert distance(shared[:1], apart[:1]) < 5e-6
    assert distance(shared[1:], apart[1:]) > 1e-3  # the second entry's own noise was not looked at by those layers


def test_attention_over_time_in_pieces_equals_it_in_one(rewritten: tuple[UNetMotionModel, Prefix]) -> None:
    module = next(m for m in rewritten[0].modules() if isinstance(m, TemporalTransformer))
    attention = module.transformer_blocks[0].attn1
    hidden = torch.randn(2, FRAMES, 9, attention.to_q.in_features)
    with torch.inference_mode():
        whole = attend_over_time(attention, hidden)
        assert distance(attend_over_time(attention, hidden, most_heads=5), whole) < 1e-6


def test_only_motion_modules_as_diffusers_has_them_bound_what_a_gpu_takes_at_once(
    plain: UNetMotionModel, rewritten: tuple[UNetMotionModel, Prefix]
) -> None:
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert most_positions(plain, cuda) == SDPA_ROWS
    assert most_positions(plain, cpu) is None
    assert most_positions(rewritten[0], cuda) is None


def test_each_shape_of_self_attention_gets_the_kernel_that_is_fastest_there(plain: UNetMotionModel) -> None:
    unet = copy.deepcopy(plain)
    asked: list[tuple[int, str]] = []

    def time_of(query: torch.Tensor, kernel: SDPBackend | None) -> float:
        """As if one kernel were the fastest for large pictures, none for small ones, and another did not exist."""
        asked.append((query.shape[2], "" if kernel is None else kernel.name))
        if kernel is SDPBackend.CUDNN_ATTENTION:
            raise RuntimeError("No available kernel. Aborting execution.")
        fast = kernel is SDPBackend.FLASH_ATTENTION and query.shape[2] == 64
        return 0.5 if fast else 0.97 if kernel is not None else 1.0

    kernels = choose_kernels(unet, time_of)
    sample, timesteps = inputs(2, 8, 8), torch.tensor([900.0, 41.0])
    assert distance(predict(unet, sample, timesteps), predict(plain, sample, timesteps)) < 5e-6
    assert not asked, "outside of choosing no time is spent on it"
    for _ in range(2):
        with kernels.choosing():
            assert distance(predict(unet, sample, timesteps), predict(plain, sample, timesteps)) < 5e-6
    assert len(asked) == len(set(asked)), "once for each shape"
    assert {name for (shape, _), name in kernels._chosen.items() if shape[2] == 64} == {"FLASH_ATTENTION"}
    assert {name for (shape, _), name in kernels._chosen.items() if shape[2] < 64} == {"default"}
    assert distance(predict(unet, sample, timesteps), predict(plain, sample, timesteps)) < 5e-6
    assert chosen_kernels(unet)["8 x 4 x 64 x 4 float32"] == "FLASH_ATTENTION"
    assert chosen_kernels(plain) == {}
    assert choose_kernels(copy.deepcopy(unet)) is kernels, "what is known of a device holds for copies of the model"


def test_attention_over_time_runs_by_the_kernel_that_is_fastest_there_also_as_a_plain_product(
    plain: UNetMotionModel, rewritten: tuple[UNetMotionModel, Prefix]
) -> None:
    unet = copy.deepcopy(rewritten[0])
    asked: set[tuple[int, str]] = set()

    def time_of(query: torch.Tensor, kernel: SDPBackend | None) -> float:
        asked.add((query.shape[2], "" if kernel is None else kernel.name))
        return 0.5 if kernel is SDPBackend.MATH else 1.0

    kernels = Kernels(time_of)
    time_kernels(unet, kernels)
    sample, timesteps = inputs(2, 8, 8), torch.tensor([900.0, 41.0])
    for _ in range(2):
        with kernels.choosing():
            assert distance(predict(unet, sample, timesteps), predict(plain, sample, timesteps)) < 5e-6
    assert (FRAMES, "MATH") in asked
    assert {name for (shape, _), name in kernels._chosen.items() if shape[2] == FRAMES} == {"MATH"}
    with kernels.choosing():
        values = torch.randn(1, 2, 64, 8)
        kernels.attend(values, values, values)
    assert (64, "MATH") not in asked, "long sequences would need memory for all pairs"


def test_a_chosen_kernel_is_compiled_without_a_graph_break_and_other_shapes_change_nothing() -> None:
    kernels, graphs = (
        Kernels(lambda query, kernel: 0.5 if kernel is SDPBackend.FLASH_ATTENTION else 1.0),
        list[object](),
    )

    def count(graph: torch.fx.GraphModule, inputs: object) -> object:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(kernels.attend, fullgraph=True, dynamic=False, backend=count)
    small, large = torch.randn(1, 2, 8, 4), torch.randn(1, 2, 16, 4)
    for values in (small, large):
        with kernels.choosing():
            expected = kernels.attend(values, values, values)
        assert distance(compiled(values, values, values), expected) < 1e-6
    assert len(graphs) == 2
    compiled(small, small, small)
    assert len(graphs) == 2


def test_a_unet_whose_group_norms_stay_channels_last_equals_the_plain_one(
    plain: UNetMotionModel, rewritten: tuple[UNetMotionModel, Prefix]
) -> None:
    unet = copy.deepcopy(rewritten[0]).to(memory_format=torch.channels_last)
    choices = Choices(lambda name, way: 0.0 if name == SUMS else 1.0)
    choose_group_norms(unet, choices)
    sample, timesteps = inputs(2, 6, 4), torch.tensor([900.0, 41.0])
    assert distance(predict(unet, sample, timesteps), predict(plain, sample, timesteps)) < 5e-6
    assert set(choices.known().values()) == {SUMS}


def test_the_rewritten_vae_equals_the_plain_one(folder: Path) -> None:
    plain = AutoencoderKL.from_pretrained(folder, subfolder="vae").eval()
    ours = copy.deepcopy(plain)
    restructure_vae(ours)
    latents = torch.randn(3, 4, 5, 6)
    with torch.inference_mode():
        assert distance(ours.decode(latents).sample, plain.decode(latents).sample) < 5e-6


def test_in_bfloat16_the_rewrite_is_as_near_to_float32_as_the_plain_model(
    plain: UNetMotionModel, rewritten: tuple[UNetMotionModel, Prefix]
) -> None:
    sample, timesteps = inputs(2, 8, 8), torch.tensor([900.0, 41.0])
    truth = predict(plain, sample, timesteps)
    low, ours = copy.deepcopy(plain).bfloat16(), copy.deepcopy(rewritten[0]).bfloat16()
    theirs_off = distance(predict(low, sample.bfloat16(), timesteps).float(), truth)
    ours_off = distance(predict(ours, sample.bfloat16(), timesteps).float(), truth)
    assert ours_off < 1.25 * theirs_off


def test_parameters_keep_their_names_and_a_replaced_convolution_is_taken_over(
    plain: UNetMotionModel, rewritten: tuple[UNetMotionModel, Prefix]
) -> None:
    assert list(plain.state_dict()) == list(rewritten[0].state_dict())
    theirs, ours = copy.deepcopy(plain), copy.deepcopy(rewritten[0])
    for model in (theirs, ours):
        for module in model.modules():
            if isinstance(module, Upsample2D):
                module.conv.weight = torch.nn.Parameter(module.conv.weight * 1.5, requires_grad=False)
    restructure_unet(ours)
    assert any(isinstance(module, SubpixelUpsample) for module in ours.modules())
    sample, timesteps = inputs(1, 8, 8), torch.tensor([300.0])
    assert distance(predict(ours, sample, timesteps), predict(theirs, sample, timesteps)) < 5e-6


def test_a_full_size_step_takes_at_most_95_percent_and_a_decode_at_most_86_percent_of_the_operations() -> None:
    with torch.device("meta"):
        unet = UNetMotionModel(
            in_channels=9,
            block_out_channels=(320, 640, 1280, 1280),
            cross_attention_dim=768,
            num_attention_heads=8,
            motion_num_attention_heads=8,
            use_motion_mid_block=False,
        )
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
        )
        sample, timesteps = torch.empty(2, 9, 16, 64, 64), torch.empty(2)
        prompts, latents = torch.empty(32, 77, 768), torch.empty(16, 4, 64, 64)
        spread, nothing = torch.zeros(2, dtype=torch.int64), torch.empty(0)
        branches = [Branch(torch.empty(77, 768), nothing, nothing) for _ in range(2)]

    def step() -> object:
        return unet(sample, timesteps, encoder_hidden_states=prompts)

    def decode() -> object:
        return vae.decode(latents)

    theirs = teraflops(step), teraflops(decode)
    # Source of the counts: 2 floating-point operations per multiplication and addition, one video with guidance.
    assert theirs == (pytest.approx(35.354, abs=0.001), pytest.approx(40.232, abs=0.001))
    prefix = restructure_unet(unet)
    restructure_vae(vae)
    assert prefix is not None
    with prefix.shared(num=1, num_frames=16, inverse=spread):
        assert teraflops(step) <= 0.95 * theirs[0]
        cross = CrossAttention(unet)
        prompts = cross.states(branches)
        assert teraflops(step) <= 0.945 * theirs[0]
    assert teraflops(decode) <= 0.86 * theirs[1]


def teraflops(work: Callable[[], object]) -> float:
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops() / 1e12
