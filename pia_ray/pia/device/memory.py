"""The memory of a device that a model may use, and the numbers of frames and evaluations that fit into it.

The sizes of activations are those that `benchmarks/memory.py` finds by running Stable Diffusion 1.5's architecture on
tensors without content; they grow with pixels and frames in proportion, since no attention keeps its whole matrix.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Final

import torch
from torch import nn

from pia_ray.config.model import ModelConfig
from pia_ray.errors import ConfigError
from pia_ray.pia.components import Components, Place
from pia_ray.pia.device.gpu_memory import bound_process, free_gpu_bytes
from pia_ray.pia.device.vae_tiling import TILE_PIXELS, is_tiled

DECODE_WIDTHS: Final = 6
"""Values alive at the peak of a decode, per pixel and channel of the VAE's first block: 768 for 128 channels."""

EVALUATION_WIDTHS: Final = 28
"""Values alive at the peak of an evaluation, per latent pixel of all frames and channel of the UNet's first block.

8,344 for 320 channels, 26.1; 27.7 with the original's GroupNorm.
"""

BEGINNING_WIDTHS: Final = 2
"""More of them in a compiled forward: its inputs, outputs of the first layers that run before it, stay to its end."""

HEADROOM: Final = 0.8
"""Share of the free memory that activations may take; the rest is for workspaces of convolutions and fragmentation."""

MOST_DECODED_PIXELS: Final = 16 * 512 * 512
"""Most pixels decoded at once, whatever the memory, because larger chunks are no faster."""

CPU_DECODE_BYTES: Final = 4 * 2**30
"""Taken as free for a decode on a CPU where the model states no bound: four frames of 512 x 512 px in float32."""

VARIANT_SHARE: Final = 0.5
"""Share of the memory beside a model's own weights that its variants with LoRAs may take; the rest is for
activations."""

CPU_VARIANT_BYTES: Final = 4 * 2**30
"""Most bytes of variants on a CPU where the model states no bound: 8 plain LoRAs of Stable Diffusion 1.5 in float16."""


def limit_memory(model: ModelConfig, device: torch.device) -> int | None:
    """The model's own bound in bytes; None where it states none.

    On a GPU torch enforces the least bound of this process's models.

    Raises:
        ConfigError: the device has less memory.
    """
    if model.memory_gib is None:
        return None
    most = int(model.memory_gib * 2**30)
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        if most > total:
            raise ConfigError(
                f"model {model.name}: memory_gib is {model.memory_gib:g}, but the GPU has {total / 2**30:.1f} GiB"
            )
        bound_process(most / total)
    return most


def frames_at_once(components: Components, *, height: int, width: int) -> int:
    """The number of frames of this size in px to decode at once, at least 1."""
    tiled = is_tiled(components.vae_tiling, height=height, width=width)
    pixels = min(height, TILE_PIXELS) * min(width, TILE_PIXELS) if tiled else height * width
    channels = components.vae.config["block_out_channels"][0]
    one = DECODE_WIDTHS * channels * pixels * components.vae_dtype.itemsize
    free = _free_bytes(components, components.vae)
    if free is None:
        free = CPU_DECODE_BYTES
    return max(1, min(int(HEADROOM * free) // one, MOST_DECODED_PIXELS // pixels))


def evaluations_that_fit(components: Components, *, num_frames: int, height: int, width: int) -> int | None:
    """The number of evaluations of this latent size whose activations fit, at least 1; None: no bound is known."""
    free = _free_bytes(components, components.unet)
    if free is None:
        return None
    channels = components.unet.config["block_out_channels"][0]
    widths = EVALUATION_WIDTHS + (0 if components.compile_mode is None else BEGINNING_WIDTHS)
    one = widths * channels * num_frames * height * width * components.dtype.itemsize
    return max(1, int(HEADROOM * free) // one)


def variant_bytes(components: Components, places: Iterable[Place]) -> int:
    """The bytes of a variant whose LoRAs change these parameters."""
    modules = [(getattr(components, part).get_submodule(module), name) for part, module, name in set(places)]
    return sum(getattr(module, name).numel() * getattr(module, name).element_size() for module, name in modules)


def variant_room(components: Components) -> int:
    """The bytes that all variants of the model may take together."""
    free = _free_bytes(components, components.unet)
    return CPU_VARIANT_BYTES if free is None else int(VARIANT_SHARE * (free + components.variants.num_bytes))


def weight_bytes(parts: Iterable[object]) -> int:
    """The bytes of the weights of those parts that are modules, on any device."""
    modules = [part for part in parts if isinstance(part, nn.Module)]
    return sum(weight.numel() * weight.element_size() for part in modules for weight in part.parameters())


def available_bytes() -> int:
    """The bytes of host memory that this process may still take, by the kernel's estimate; 0 where none is known."""
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
    except OSError:
        return 0
    free = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    try:  # of a container
        most, taken = (Path("/sys/fs/cgroup", name).read_text("ascii").strip() for name in _CGROUP)
    except OSError:
        return min(free, default=0)
    return min([*free, *([int(most) - int(taken)] if most != "max" else [])], default=0)


_CGROUP: Final = ("memory.max", "memory.current")


def _free_bytes(components: Components, part: nn.Module) -> int | None:
    """The bytes that activations of a part may take: below the model's bound, and on a GPU what it may take there."""
    device, bound = components.device, components.memory_bytes
    if device.type != "cuda":
        if bound is None:
            return None
        taken = weight_bytes(vars(components).values()) + components.variants.num_bytes + _reserved(components)
        return max(0, bound - taken)
    free = free_gpu_bytes(device) - _reserved(components)  # within the bound, which the process has
    if next(part.parameters()).device.type == "cpu":  # it is offloaded, and moves to the device when it runs
        free -= weight_bytes([part])
    return max(0, free)


def _reserved(components: Components) -> int:
    """The bytes that the model's upscaler may take at any time, on the threads that encode."""
    return 0 if components.upscaler is None else components.upscaler.reserved_bytes
