"""The device, precision, memory layout and CPU threads of a model, and the sizes of its forwards."""

from __future__ import annotations

from typing import Final

import torch

from pia_ray.config.model import ModelConfig
from pia_ray.errors import ConfigError
from pia_ray.formatting import first_line

DTYPES: Final = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

SDPA_ROWS: Final = 65_535
"""Most batch entries, and most heads, of one scaled-dot-product attention call on CUDA: the size of its grid."""

MEMORY_FORMAT: Final = torch.channels_last
"""Layout of the weights of UNet and VAE, the one that cuDNN's convolutions use.

On a 2-core CPU (benchmarks/engine_cpu.py, commit 8d18d8b) the UNet took the same time in both layouts, and the demo
model's decoder 25 to 40 % less than with contiguous weights.
"""

CPU_FORWARD_PIXELS: Final = 16_384
"""Latent pixels of all frames in one forward on a CPU; larger forwards do not fit in the caches.

On a 2-core CPU (benchmarks/engine_cpu.py, commit 8d18d8b) an evaluation of 4,096 in the demo model took 67 ms in a
forward of 2, 64 in one of 4, 76 in one of 8 and 94 in one of 16.
"""


def device_of(model: ModelConfig) -> torch.device:
    """The device of the model's `device` setting.

    Raises:
        ConfigError: it is cuda, and torch finds no GPU.
    """
    if model.device == "cpu":
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda")
    if model.device == "cuda":
        raise ConfigError(f"model {model.name} is to run on a GPU, but torch finds none here: {_why_no_gpu()}")
    return torch.device("cpu")


def _why_no_gpu() -> str:
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} is a build without CUDA, install the one for this machine's GPUs"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return f"{first_line(error)} (a container sees GPUs only with `docker run --gpus all`)"
    return "its driver does not answer"


def dtype_of(model: ModelConfig, device: torch.device) -> torch.dtype:
    """The precision of the UNet's weights: the model's `dtype`, where auto is float16 on a GPU and float32 on a CPU."""
    if model.dtype == "auto":
        return torch.float16 if device.type == "cuda" else torch.float32
    return torch.float32 if model.dtype == "tf32" else DTYPES[model.dtype]


def layout_of(model: ModelConfig, device: torch.device) -> torch.memory_format:
    """The layout of the weights of UNet and VAE: `MEMORY_FORMAT`, or contiguous where a GPU's weights are offloaded.

    Offloaded models run diffusers' own layers, whose GroupNorm answers in contiguous memory on CUDA, so that
    channels-last convolutions would copy each input.
    """
    return torch.contiguous_format if model.offload != "none" and device.type == "cuda" else MEMORY_FORMAT


def vae_dtype_of(model: ModelConfig, device: torch.device) -> torch.dtype:
    """The precision of the VAE, by default the UNet's.

    The VAEs of Stable Diffusion 1.5, its own and ft-mse, stay within float16; bfloat16 has fewer digits than a colour
    of 8 bits.
    """
    return dtype_of(model, device) if model.vae_dtype == "auto" else DTYPES[model.vae_dtype]


def text_encoder_dtype_of(model: ModelConfig, device: torch.device) -> torch.dtype:
    """The precision of the text encoder, by default the UNet's."""
    return dtype_of(model, device) if model.text_encoder_dtype == "auto" else DTYPES[model.text_encoder_dtype]


def set_cpu_threads(threads: int) -> None:
    """Bounds the threads of this process's CPU operators, so that workers on one machine do not compete for cores."""
    torch.set_num_threads(max(1, threads))


def forward_sizes(num: int, limit: int, *, device: torch.device, powers_of_two: bool = False) -> list[int]:
    """The sizes of forwards, each at most `limit`, that run `num` UNet evaluations.

    On a GPU, and with `powers_of_two`, the sizes are such, so that few shapes occur and nothing is padded. Else any
    size may occur.
    """
    sizes = []
    while num > 0:
        size = min(num, limit)
        if powers_of_two or device.type == "cuda":
            size = 1 << (size.bit_length() - 1)
        sizes.append(size)
        num -= size
    return sizes


def most_evaluations(
    batch_size: int, num_frames: int, height: int, width: int, *, device: torch.device, most_positions: int | None
) -> int:
    """The most evaluations of one latent size in a forward: two branches a row, within the bounds of device and UNet.

    `most_positions` is the UNet's bound: see `unet.motion_modules.most_positions`.
    """
    most = 2 * batch_size
    if most_positions is not None:
        most = min(most, max(1, most_positions // (height * width)))
    if device.type == "cuda":
        return most
    return min(most, max(1, CPU_FORWARD_PIXELS // (num_frames * height * width)))
