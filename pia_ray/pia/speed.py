"""Where and how fast the model runs: device, precision, memory layout, CPU threads, sizes of a forward."""

from __future__ import annotations

from typing import Final

import torch

from pia_ray.config import ModelConfig
from pia_ray.errors import ConfigError

DTYPES: Final = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

SDPA_ROWS: Final = 65_535
"""Most rows of one scaled-dot-product attention call on CUDA; the motion modules make one row per latent pixel."""


def device_of(model: ModelConfig) -> torch.device:
    """The device the model asks for.

    Raises:
        ConfigError: cuda is asked for and there is none.
    """
    if model.device == "cpu":
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda")
    if model.device == "cuda":
        raise ConfigError(f'model {model.name} asks for device "cuda", but torch finds no GPU here')
    return torch.device("cpu")


def dtype_of(model: ModelConfig, device: torch.device) -> torch.dtype:
    """The precision of the weights: what the model asks for, else float16 on a GPU and float32 on a CPU."""
    if model.dtype == "auto":
        return torch.float16 if device.type == "cuda" else torch.float32
    return DTYPES[model.dtype]


def memory_format(device: torch.device) -> torch.memory_format:
    """Channels last on GPUs, where cuDNN's convolutions want it.

    On the CPU it was measured and lost: see README, Decisions.
    """
    return torch.channels_last if device.type == "cuda" else torch.contiguous_format


def set_cpu_threads(threads: int) -> None:
    """Bounds the threads of this process's CPU operators, so that workers on one machine do not crowd each other."""
    torch.set_num_threads(max(1, threads))


def forward_sizes(num: int, limit: int, *, device: torch.device) -> list[int]:
    """How to cut `num` UNet evaluations into forwards of at most `limit`.

    On a GPU the sizes are powers of two, so that few shapes occur and nothing is padded; on the CPU any size will do.
    """
    sizes = []
    while num > 0:
        size = min(num, limit)
        if device.type == "cuda":
            size = 1 << (size.bit_length() - 1)
        sizes.append(size)
        num -= size
    return sizes


def most_evaluations(batch_size: int, height: int, width: int, *, device: torch.device) -> int:
    """Most evaluations of one latent size in a forward: two branches per row, within the attention kernels' limit."""
    most = 2 * batch_size
    if device.type == "cuda":
        most = min(most, max(1, SDPA_ROWS // (height * width)))
    return most
