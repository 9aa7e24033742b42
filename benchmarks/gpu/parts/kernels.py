"""A table of single kernels at the shapes of the UNet: attention, up-sampling and GroupNorm, each in several ways."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Final

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu.budget import Budget
from benchmarks.gpu.part import Part, PartCard
from benchmarks.gpu.random_model import Cost, RandomModel
from benchmarks.gpu.upsampling import as_four_convolutions, four_weights
from pia_ray.pia.device.errors import device_is_lost
from pia_ray.pia.unet.attention_kernels import KERNELS
from pia_ray.pia.unet.group_norms import by_sums, by_triton
from pia_ray.pia.unet.upsample import subpixel_weight

BRANCHES: Final = 2
LAYOUTS: Final = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}

Ways = dict[str, Callable[[], torch.Tensor]]
"""Computations of the same by the names of their ways."""


@torch.inference_mode()
def measure(model: RandomModel, card: PartCard, budget: Budget) -> None:
    """Median milliseconds; a way that cannot run here has its reason in place of them."""
    for table in (spatial_attention, temporal_attention, upsampling, group_norm):
        card.numbers[table.__name__] = found = {}
        card.lines.append(table.__name__.replace("_", " ") + ", ms")
        for shape, ways in table(model):
            found[shape] = {name: milliseconds(model, work) for name, work in ways.items()}
            shown = ", ".join(
                f"{name} {value:.3f}" if isinstance(value, float) else f"{name} -"
                for name, value in found[shape].items()
            )
            card.lines.append(f"  {shape}: {shown}")
            model.free()


def milliseconds(model: RandomModel, work: Callable[[], torch.Tensor]) -> float | str:
    """Of the way, or the reason why it cannot run.

    Raises:
        RuntimeError: the device is lost.
    """
    try:
        return 1000 * model.median_s(work)
    except RuntimeError as error:
        if device_is_lost(error):
            raise
        return str(error).strip().splitlines()[0]


def levels(model: RandomModel) -> Iterator[tuple[int, int]]:
    """Channels and latent side of each resolution."""
    for level, width in enumerate(model.size.widths):
        yield width, model.size.side // 8 >> level


def random(model: RandomModel, *shape: int) -> torch.Tensor:
    """Normally distributed values."""
    return torch.randn(*shape, device=model.device, dtype=model.dtype)


def spatial_attention(model: RandomModel) -> Iterator[tuple[str, Ways]]:
    """Self-attention within each frame, where the UNet has it: not at its smallest resolution."""
    for width, side in list(levels(model))[:-1]:
        heads = model.size.heads
        query = random(model, BRANCHES * model.size.num_frames, side * side, heads, width // heads).transpose(1, 2)
        yield " x ".join(map(str, query.shape)), attention_ways(query)


def temporal_attention(model: RandomModel) -> Iterator[tuple[str, Ways]]:
    """Attention of each position over the frames, positions and heads merged, as our motion modules call it."""
    for width, side in levels(model):
        heads = model.size.heads
        frames_first = random(model, BRANCHES, model.size.num_frames, side * side * heads, width // heads)
        query = frames_first.transpose(1, 2)  # [N, S*H, T, d]
        yield " x ".join(map(str, query.shape)), {**attention_ways(query), "products": partial(by_products, query)}


def attention_ways(query: torch.Tensor) -> Ways:
    """torch's own choice and each of its kernels."""

    def by(kernel: SDPBackend) -> torch.Tensor:
        with sdpa_kernel(kernel):
            return F.scaled_dot_product_attention(query, query, query)

    chosen: Ways = {"default": lambda: F.scaled_dot_product_attention(query, query, query)}
    return chosen | {kernel.name.removesuffix("_ATTENTION").lower(): partial(by, kernel) for kernel in KERNELS}


def by_products(query: torch.Tensor) -> torch.Tensor:
    """Attention by two batched matrix products and a softmax."""
    weights = torch.matmul(query * query.shape[-1] ** -0.5, query.transpose(-1, -2)).softmax(-1)
    return torch.matmul(weights, query)


def upsampling(model: RandomModel) -> Iterator[tuple[str, Ways]]:
    """Doubling and its 3x3 convolution, in each form and layout; the UNet doubles all but its largest resolution."""
    for width, side in list(levels(model))[1:]:
        images = random(model, BRANCHES * model.size.num_frames, width, side, side)
        weight = random(model, width, width, 3, 3) * (9 * width) ** -0.5
        ways: Ways = {}
        for name, layout in LAYOUTS.items():
            inputs = images.contiguous(memory_format=layout)
            plain, transposed, four = (
                each.contiguous(memory_format=layout)
                for each in (weight, subpixel_weight(weight), four_weights(weight))
            )
            ways[f"doubled {name}"] = partial(as_doubling, inputs, plain)
            ways[f"transposed {name}"] = partial(as_transposed, inputs, transposed)
            ways[f"four {name}"] = partial(as_four_convolutions, inputs, four)
        yield " x ".join(map(str, images.shape)), ways


def as_doubling(images: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Nearest-neighbour doubling, then the convolution: diffusers' form."""
    return F.conv2d(F.interpolate(images, scale_factor=2.0, mode="nearest"), weight, padding=1)


def as_transposed(images: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """One transposed convolution by `subpixel_weight`: ours."""
    return F.conv_transpose2d(images, weight, stride=2, padding=1)


def group_norm(model: RandomModel) -> Iterator[tuple[str, Ways]]:
    """Of a frame, and of a whole video, whose frames are stacked to one tall picture; `kept`: the layout stays.

    `converted`: what torch's way costs where pictures are channels-last, with the conversion of its result.
    """
    for width, side in levels(model):
        for num, height in ((BRANCHES * model.size.num_frames, side), (BRANCHES, model.size.num_frames * side)):
            images = random(model, num, width, height, side)
            ways: Ways = {}
            for name, layout in LAYOUTS.items():
                work = partial(F.group_norm, images.contiguous(memory_format=layout), model.size.groups)
                kept = work().is_contiguous(memory_format=layout)
                ways[name if kept else f"{name}, not kept"] = work
            near = images.contiguous(memory_format=torch.channels_last)
            norm = torch.nn.GroupNorm(model.size.groups, width, device=model.device, dtype=model.dtype)
            ways["converted"] = partial(converted, near, norm)
            ways |= {way: partial(run, near, norm) for way, run in {"sums": by_sums, "triton": by_triton}.items()}
            yield " x ".join(map(str, images.shape)), ways


def converted(images: torch.Tensor, norm: torch.nn.GroupNorm) -> torch.Tensor:
    """torch's GroupNorm, channels-last as the next convolution makes it."""
    return norm(images).contiguous(memory_format=torch.channels_last)


PART: Final = Part("kernels", "attention, up-sampling and GroupNorm one by one", Cost(fixed_s=15), measure)
