"""FreeInit: further samplings from noise with the low frequencies of the last result. Source: arXiv 2312.07537."""

from __future__ import annotations

from typing import Any

import torch

from pia_ray.config.knobs import AnimationParams
from pia_ray.pia.transfers import to_device


def low_pass(params: AnimationParams, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """The low-pass filter of `params` over frequencies [T, h, w], zero frequency in the middle; 1 keeps a frequency."""
    stop, temporal = params.free_init_spatial_stop, params.free_init_temporal_stop
    if stop == 0 or temporal == 0:
        return torch.zeros(shape, device=device)
    squares = [(2 * torch.arange(size, dtype=torch.float64) / size - 1) ** 2 for size in shape]
    distance = (
        (stop / temporal) ** 2 * squares[0][:, None, None] + squares[1][None, :, None] + squares[2][None, None, :]
    )
    if params.free_init == "butterworth":
        kept = 1 / (1 + (distance / stop**2) ** params.free_init_order)
    elif params.free_init == "gaussian":
        kept = torch.exp(-distance / (2 * stop**2))
    else:
        kept = (distance <= 2 * stop).double()
    return to_device(kept.float(), device)


def mix(slow: torch.Tensor, fast: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """The low frequencies of `slow` and the high ones of `fast`, both [4, T, h, w], by a filter of `low_pass`."""
    axes = (-3, -2, -1)
    low = torch.fft.fftshift(torch.fft.fftn(slow, dim=axes), dim=axes) * kept
    high = torch.fft.fftshift(torch.fft.fftn(fast, dim=axes), dim=axes) * (1 - kept)
    mixed: torch.Tensor = torch.fft.ifftn(torch.fft.ifftshift(low + high, dim=axes), dim=axes).real
    return mixed


def diffuse(latents: torch.Tensor, noise: torch.Tensor, scheduler: Any) -> torch.Tensor:
    """Clean latents with the noise of the last training step, of variance one.

    All schedulers, also those that count in sigmas, start from it times their `init_noise_sigma`.
    """
    kept = scheduler.alphas_cumprod[-1].float()  # in host memory
    return kept.sqrt() * latents + (1 - kept).sqrt() * noise
