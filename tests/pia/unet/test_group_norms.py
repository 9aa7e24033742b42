"""GroupNorm by each of its ways: the numbers of torch's own, in the layout of the pictures."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pia_ray.pia.unet.choices import DEFAULT, Choices, Way
from pia_ray.pia.unet.group_norms import SUMS, TRITON, ChosenGroupNorm, by_sums, choose_group_norms

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(2, 80, 7, 11), (1, 16, 3, 3), (2, 80, 1, 1)]
KERNELS = "pia_ray.pia.unet.group_norm_kernel"


def preferring(fast: str) -> Choices:
    def clock(name: str, way: Way) -> float:
        way()
        return 0.5 if name == fast else 1.0

    return Choices(clock)


def norm_of(channels: int, dtype: torch.dtype = torch.float32) -> nn.GroupNorm:
    norm = nn.GroupNorm(4, channels, eps=1e-5)
    generator = torch.Generator().manual_seed(channels)
    nn.init.normal_(norm.weight, generator=generator)
    nn.init.normal_(norm.bias, generator=generator)
    return norm.to(dtype).requires_grad_(False)


def pictures_of(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Far from zero, where a difference of squares would lose most."""
    values = 30 + 2 * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return values.to(dtype).contiguous(memory_format=torch.channels_last)


def error_of(normal: torch.Tensor, pictures: torch.Tensor, norm: nn.GroupNorm) -> float:
    """Against float64."""
    weights = norm.weight.double(), norm.bias.double()
    exact = F.group_norm(pictures.double(), norm.num_groups, *weights, norm.eps)
    return float((normal.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_the_way_by_sums_rounds_as_torch_does_and_keeps_the_layout(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    norm, pictures = norm_of(shape[1], dtype), pictures_of(shape, dtype)
    normal = by_sums(pictures, norm)
    assert normal.dtype == dtype
    assert normal.is_contiguous(memory_format=torch.channels_last)
    most = max(1.1 * error_of(norm(pictures), pictures, norm), 1e-5)
    assert error_of(normal, pictures, norm) <= most


def test_a_group_norm_runs_by_the_way_that_is_fastest_and_by_torch_for_other_layouts_and_gradients() -> None:
    model, pictures = nn.Sequential(norm_of(16)), pictures_of((2, 16, 6, 5))
    expected = model(pictures)
    choices = preferring(SUMS)
    choose_group_norms(model, choices)
    assert torch.equal(model(pictures), expected)
    with torch.inference_mode():
        torch.testing.assert_close(model(pictures.contiguous()), expected, rtol=0, atol=1e-3)
        assert choices.known() == {}
        normal = model(pictures)
    assert list(choices.known().values()) == [SUMS]
    assert not torch.equal(normal, expected)
    torch.testing.assert_close(normal, expected, rtol=0, atol=1e-3)  # torch's own is a difference of squares here


@torch.no_grad()
def test_where_triton_cannot_run_another_way_is_taken() -> None:
    model, choices = nn.Sequential(norm_of(16)), preferring(TRITON)  # on a CPU it has no driver
    choose_group_norms(model, choices)
    model(pictures_of((2, 16, 6, 5)))
    assert list(choices.known().values()) == [DEFAULT]


@torch.no_grad()
def test_compiled_code_has_the_group_norm_of_torch_in_one_graph() -> None:
    model, pictures = nn.Sequential(norm_of(16)), pictures_of((2, 16, 6, 5))
    expected = model(pictures)
    choose_group_norms(model, preferring(SUMS))
    assert not torch.equal(model(pictures), expected)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.equal(compiled(pictures), expected)


def test_only_plain_group_norms_are_rewritten() -> None:
    class Other(nn.GroupNorm):
        pass

    model = nn.Sequential(norm_of(8), Other(4, 8), nn.GroupNorm(4, 8, affine=False))
    choose_group_norms(model, preferring(SUMS))
    assert [type(module) for module in model] == [ChosenGroupNorm, Other, nn.GroupNorm]


INTERPRETED = """
import torch
from torch.nn import functional as F
from pia_ray.pia.unet.group_norm_kernel import group_norm

torch.manual_seed(0)
for num, channels, height, width in ((2, 80, 7, 11), (1, 16, 3, 3), (2, 80, 1, 1)):
    for dtype, most in ((torch.float32, 1e-5), (torch.float16, 3e-4)):  # the interpreter cuts bfloat16 off
        values = 30 + 2 * torch.randn(num, channels, height, width)
        pictures = values.to(dtype).contiguous(memory_format=torch.channels_last)
        weight, bias = torch.randn(2, channels).to(dtype)
        normal = group_norm(pictures, groups=4, weight=weight, bias=bias, eps=1e-5)
        exact = F.group_norm(pictures.double(), 4, weight.double(), bias.double(), 1e-5)
        assert normal.dtype == dtype and normal.is_contiguous(memory_format=torch.channels_last)
        assert (normal.double() - exact).norm() <= most * exact.norm(), (pictures.shape, dtype)
"""


def test_the_kernels_give_the_numbers_of_torch_in_the_interpreter_of_triton() -> None:
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}  # before triton is imported
    ran = subprocess.run([sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


@pytest.mark.filterwarnings("ignore:AnnAssign:DeprecationWarning")  # Triton 3.9 on Python 3.13
@pytest.mark.parametrize("name", ["_moments", "_fold", "_scale"])
def test_the_kernels_compile_for_a_gpu_without_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # its default, about which Triton 3.9 warns
    triton = pytest.importorskip("triton")
    compiler = importlib.import_module("triton.compiler")
    backends = importlib.import_module("triton.backends.compiler")
    kernel = getattr(importlib.import_module(KERNELS), name)
    half, single = ("pictures", "weight", "bias", "normal"), ("means", "spreads", "factors", "shifts")
    types = dict.fromkeys(half, "*fp16") | dict.fromkeys(single, "*fp32") | {"eps": "fp32", "block": "constexpr"}
    source = compiler.ASTSource(
        fn=kernel,
        signature={argument: types.get(argument, "i32") for argument in kernel.arg_names},
        constexprs={(kernel.arg_names.index("block"),): 16} if "block" in kernel.arg_names else {},
    )
    assert triton.compile(source, target=backends.GPUTarget("cuda", 80, 32)).asm["cubin"]
