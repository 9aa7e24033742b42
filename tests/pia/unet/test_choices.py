"""The ways that operators are computed in: chosen by timing, and equal whichever is chosen."""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from diffusers.models.activations import GEGLU
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from pia_ray.pia.unet.attention_products import KEYS_LAST, QUERIES_LAST, Products
from pia_ray.pia.unet.choices import DEFAULT, MOST_TIMED_FLOP, TIMED_FLOP, Choices, Clock, Way, sample_of, timed_share
from pia_ray.pia.unet.convolutions import COPIES_SHARE, MOST_POSITIONS, PACKED, ChosenConv, Copies, choose_weights
from pia_ray.pia.unet.feed_forward import FUSED, choose_gates
from pia_ray.pia.unet.linear_layers import ONEDNN, choose_libraries
from pia_ray.pia.unet.resnets import rewrite_resnets
from pia_ray.pia.unet.upsample import PLAIN, SubpixelUpsample

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch has no oneDNN here")


def preferring(fast: str) -> Clock:
    """A clock by which this way is the fastest; each way runs, so that one that cannot is found out."""

    def clock(name: str, way: Way) -> float:
        way()
        return 0.5 if name == fast else 1.0

    return clock


def distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def test_the_fastest_way_is_found_once_and_only_a_clear_gain_replaces_the_default() -> None:
    asked: list[str] = []
    times = {DEFAULT: 1.0, "a little faster": 0.95, "much faster": 0.5, "impossible": 0.0}

    def clock(name: str, way: Way) -> float:
        asked.append(name)
        if name == "impossible":
            raise RuntimeError("no such kernel")
        return times[name]

    def ways(*names: str) -> Callable[[], dict[str, Way]]:
        return lambda: {name: lambda: None for name in (DEFAULT, *names)}

    choices = Choices(clock)
    assert choices.choose(("one",), ways("a little faster", "impossible")) == DEFAULT
    assert choices.choose(("two",), ways("a little faster", "much faster")) == "much faster"
    asked.clear()
    assert copy.deepcopy(choices).choose(("two",), ways("a little faster")) == "much faster"
    assert not asked, "a kind is timed once, for all copies of a model"


def test_a_gpu_is_waited_for_only_where_that_is_wanted() -> None:
    choices = Choices(preferring("other"), waits=True)
    ways: dict[str, Way] = {DEFAULT: lambda: None, "other": lambda: None}
    assert choices.choose(("kind",), lambda: ways) == DEFAULT
    with choices.choosing():
        assert choices.choose(("kind",), lambda: ways) == "other"
    assert choices.choose(("kind",), lambda: ways) == "other"
    assert choices.choose(("another kind",), lambda: ways) == DEFAULT


@pytest.mark.parametrize(("fast", "shape"), [(ONEDNN, (256, 64)), (DEFAULT, (256, 64)), (ONEDNN, (2, 16, 9, 64))])
@torch.inference_mode()
def test_a_linear_layer_is_the_same_by_either_library(fast: str, shape: tuple[int, ...]) -> None:
    plain = nn.Sequential(nn.Linear(64, 128), nn.Linear(128, 128, bias=False))
    ours, choices = copy.deepcopy(plain), Choices(preferring(fast))
    choose_libraries(ours, choices)
    states = torch.randn(shape).transpose(0, -2)  # not in the order of memory
    assert distance(ours(states), plain(states)) < 1e-6
    assert set(choices.known().values()) == {fast}
    assert list(ours.state_dict()) == list(plain.state_dict())


@pytest.mark.parametrize("fast", [DEFAULT, FUSED])
@torch.inference_mode()
def test_a_gated_projection_is_the_same_in_one_piece_and_in_two_and_follows_a_weight_that_is_replaced(
    fast: str,
) -> None:
    plain = nn.Sequential(GEGLU(64, 128))
    ours, choices = copy.deepcopy(plain), Choices(preferring(fast))
    choose_gates(ours, choices)
    states = torch.randn(2, 9, 16, 64).transpose(1, 2)  # not in the order of memory
    assert distance(ours(states), plain(states)) < 1e-6
    assert set(choices.known().values()) == {fast}
    assert list(ours.state_dict()) == list(plain.state_dict())
    for model in (ours, plain):
        layer = model.get_submodule("0.proj")
        layer.weight = nn.Parameter(layer.weight * 1.5, requires_grad=False)
    assert distance(ours(states), plain(states)) < 1e-6


@pytest.mark.parametrize("fast", [DEFAULT, KEYS_LAST, QUERIES_LAST])
@pytest.mark.parametrize(
    ("num", "positions", "heads", "keys"),
    [(9, 96, 2, 96), (2, 16, 300, 16), (2, 640, 3, 77), (3, 700, 2, 300)],
    ids=["over space", "over time", "over a prompt", "one head at a time"],
)
@torch.inference_mode()
def test_attention_is_the_same_by_each_way(fast: str, num: int, positions: int, heads: int, keys: int) -> None:
    choices = Choices(preferring(fast))
    query = torch.randn(num, positions, heads, 8).transpose(1, 2)
    key, value = (torch.randn(num, keys, heads, 8).transpose(1, 2) for _ in range(2))
    mixed = Products(choices).attend(query, key, value)
    assert distance(mixed, F.scaled_dot_product_attention(query, key, value)) < 1e-6
    assert set(choices.known().values()) == {fast}


@torch.inference_mode()
def test_attention_with_more_scores_than_a_cache_holds_runs_by_torchs_kernel() -> None:
    choices = Choices(preferring(KEYS_LAST))
    query = torch.randn(1, 1, 1024, 8)
    Products(choices).attend(query, query, query)
    assert not choices.known()


@pytest.mark.parametrize("stride", [1, 2])
@torch.inference_mode()
def test_a_convolution_is_the_same_by_packed_weights_and_follows_a_weight_that_is_replaced(stride: int) -> None:
    plain = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1, stride=stride))
    ours, choices = copy.deepcopy(plain), Choices(preferring(PACKED))
    choose_weights(ours, choices, Copies(lambda: 2**40))
    pictures = torch.randn(32, 64, 16, 16)
    assert distance(ours(pictures), plain(pictures)) < 2e-6
    assert set(choices.known().values()) == {PACKED}
    variant = copy.deepcopy(ours)
    for model in (variant, plain):
        layer = model.get_submodule("0")
        layer.weight = nn.Parameter(layer.weight * 1.5, requires_grad=False)
    assert distance(variant(pictures), plain(pictures)) < 2e-6
    assert distance(ours(pictures), plain(pictures)) > 0.1, "the other model keeps its own"


@torch.inference_mode()
def test_a_large_weight_that_many_pixels_share_gets_no_copy() -> None:
    model, choices = nn.Sequential(nn.Conv2d(1024, 1024, 1)), Choices(preferring(PACKED))
    choose_weights(model, choices, Copies(lambda: 2**40))
    layer = model.get_submodule("0")
    assert isinstance(layer, ChosenConv)
    model.to("meta")(torch.empty(2, 1024, 1, MOST_POSITIONS, device="meta"))
    assert choices.known() == {}


def test_copies_keep_to_their_share_of_the_memory_and_give_it_back() -> None:
    weight = torch.zeros(1000)  # 4,000 bytes
    copies = Copies(lambda: int(2 * 4000 / COPIES_SHARE) - 4000)
    first = copies.make(weight, torch.clone)
    assert copies.has_room_for(weight)
    second = copies.make(weight, torch.clone)
    assert not Copies(lambda: 0).has_room_for(weight)
    assert first.num_bytes + second.num_bytes == 8000
    del second
    assert copies.has_room_for(weight)


@pytest.mark.parametrize("fast", [DEFAULT, PLAIN, PACKED])
@torch.inference_mode()
def test_up_sampling_is_the_same_in_each_form(fast: str) -> None:
    plain = Upsample2D(64, use_conv=True, out_channels=64, name="conv")
    ours, choices = copy.deepcopy(plain), Choices(preferring(fast))
    assert SubpixelUpsample.suits(ours)
    ours.__class__ = SubpixelUpsample
    ours.choices, ours.copies = choices, Copies(lambda: 2**40)
    pictures = torch.randn(8, 64, 16, 16)
    assert distance(ours(pictures), plain(pictures)) < 2e-6
    assert set(choices.known().values()) == {fast}


def linear(choices: Choices) -> nn.Module:
    model = nn.Sequential(nn.Linear(64, 128))
    choose_libraries(model, choices)
    return model


def gate(choices: Choices) -> nn.Module:
    model = nn.Sequential(GEGLU(64, 128))
    choose_gates(model, choices)
    return model


def attention(choices: Choices) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda query: Products(choices).attend(query, query, query)


def convolution(choices: Choices) -> nn.Module:
    model = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1))
    choose_weights(model, choices, Copies(lambda: 2**40))
    return model


def up_sampling(choices: Choices) -> nn.Module:
    model = Upsample2D(64, use_conv=True, out_channels=64, name="conv")
    model.__class__ = SubpixelUpsample
    model.choices, model.copies = choices, Copies(lambda: 2**40)
    return model


@pytest.mark.parametrize(
    ("make", "fast", "shape", "operator"),
    [
        (linear, ONEDNN, (256, 64), "mkldnn._linear_pointwise"),
        (gate, FUSED, (256, 64), "mkldnn._linear_pointwise"),
        (attention, KEYS_LAST, (9, 2, 96, 8), "aten.baddbmm"),
        (convolution, PACKED, (32, 64, 16, 16), "mkldnn._convolution_pointwise"),
        (up_sampling, PACKED, (8, 64, 16, 16), "mkldnn._convolution_transpose_pointwise"),
    ],
)
def test_a_layer_runs_by_the_fastest_way_also_while_another_thread_compiles(
    make: Callable[[Choices], Callable[[torch.Tensor], object]], fast: str, shape: tuple[int, ...], operator: str
) -> None:
    """The compilation is torch's own, of a sum; the layer runs on another thread while it is not over."""
    layer, ran = make(Choices(preferring(fast))), list[str]()

    @torch.inference_mode()
    def run() -> None:
        layer(torch.randn(shape))  # chooses
        with Operators() as known:
            layer(torch.randn(shape))
        ran.extend(known.names)

    def compiled(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., object]:
        assert torch.compiler.is_compiling()
        with ThreadPoolExecutor(1) as other:
            other.submit(run).result()
        return graph.forward

    torch.compile(lambda one: one + 1, backend=compiled)(torch.zeros(1))
    assert any(name.startswith(operator) for name in ran), ran


def test_what_is_timed_is_a_part_of_a_large_call() -> None:
    pictures = torch.empty(8, 2, 64, 64, device="meta")
    assert sample_of(pictures, timed_share(TIMED_FLOP)).shape == pictures.shape
    assert sample_of(pictures, timed_share(4 * TIMED_FLOP)).shape == (2, 2, 64, 64)
    assert sample_of(pictures, timed_share(32 * TIMED_FLOP)).shape == (1, 2, 16, 64)
    assert sample_of(pictures, timed_share(10**6 * TIMED_FLOP)).shape == (1, 2, 4, 64)


def test_more_of_a_call_with_a_large_weight_is_timed() -> None:
    flop = 10 * MOST_TIMED_FLOP
    assert timed_share(flop, num_weights=32 * 32) * flop == pytest.approx(TIMED_FLOP)
    assert timed_share(flop, num_weights=640 * 640) * flop == pytest.approx(2 * 1000 * 640 * 640)
    assert timed_share(flop, num_weights=1280 * 10_240) * flop == pytest.approx(MOST_TIMED_FLOP)


@pytest.mark.parametrize("width", [32, 64], ids=["same width", "wider"])
def test_a_resnet_block_gives_the_same_bits_without_a_division(width: int) -> None:
    plain = ResnetBlock2D(in_channels=32, out_channels=width, temb_channels=16).eval()
    ours = copy.deepcopy(plain)
    rewrite_resnets(ours)
    pictures, times = torch.randn(2, 32, 8, 8), torch.randn(2, 16)
    before = pictures.clone(), times.clone()
    with torch.inference_mode():
        expected = plain(pictures, times)
        with Operators() as run:
            assert torch.equal(ours(pictures, times), expected)
    assert not [name for name in run.names if name.startswith("aten.div")]
    assert torch.equal(pictures, before[0])
    assert torch.equal(times, before[1])
    ours(pictures, times).sum().backward()  # training does not overwrite what gradients need
    plain(pictures, times).sum().backward()
    for one, other in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


class Operators(TorchDispatchMode):
    """The names of the operators that run in the context."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))
