"""Tensors of videos that are longer than one window: their noise, and the blended predictions of windows."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pia_ray.config.knobs import AnimationParams
from pia_ray.pia.evaluation import Window
from pia_ray.pia.transfers import to_device


def frame_noise(
    params: AnimationParams, shape: tuple[int, ...], generator: torch.Generator, device: torch.device
) -> torch.Tensor:
    """Normal noise [4, T, h, w] from the row's own CPU generator, so that a seed means the same on every device.

    `params.noise` decides the noise of frames beyond the first window. It is either the first window's again, as it is
    or shuffled within chunks of the distance between windows, which keeps windows alike; or new noise. The draws are
    those of diffusers' FreeNoise. Source: FreeNoise, arXiv 2310.15169.
    """
    noise = torch.randn(shape, generator=generator, dtype=torch.float32)
    frames, size = shape[1], params.piece_frames
    if params.long_video == "windows" and frames > size:
        if params.noise == "repeat":
            noise = noise[:, [frame % size for frame in range(frames)]]
        elif params.noise == "shuffle":
            hop = size - params.context_overlap
            for start in range(size, frames, hop):
                order = torch.randperm(hop, generator=generator)[: frames - start] + start - size
                noise[:, start : start + len(order)] = noise[:, order]
    return to_device(noise, device)


def blend(predictions: torch.Tensor, windows: Sequence[Window], num_frames: int) -> torch.Tensor:
    """Predictions [windows x branches, 4, window's frames, h, w] as one per branch, [branches, 4, T, h, w].

    Where windows overlap, a frame's predictions have pyramid weights, because the middle of a window has more frames
    before and after it than the borders. The predictions of one window are returned as they are.
    """
    if len(windows) == 1:
        return predictions
    size = len(windows[0])
    device, dtype = predictions.device, predictions.dtype
    # Made in host memory, and copied without waiting for a GPU.
    ramp = torch.tensor([min(position + 1, size - position) for position in range(size)], dtype=dtype)
    weights = ramp.to(device, non_blocking=True).view(-1, 1, 1)  # [window's frames, 1, 1]
    of_windows = predictions.unflatten(0, (len(windows), -1))  # [windows, branches, 4, window's frames, h, w]
    shape = (*of_windows.shape[1:3], num_frames, *of_windows.shape[4:])
    total = torch.zeros(shape, dtype=dtype, device=device)
    weight = torch.zeros(num_frames, 1, 1, dtype=dtype, device=device)
    for frames, prediction in zip(windows, of_windows, strict=True):
        index = torch.tensor(frames).to(device, non_blocking=True)
        total.index_add_(2, index, prediction * weights)
        weight.index_add_(0, index, weights)
    return total / weight
