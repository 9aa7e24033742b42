"""GroupNorm as in PIA's own code: ResNet blocks over all frames of a video, motion modules frame by frame.

diffusers' UNetMotionModel does the reverse. Each forward of the UNet sets the number of frames per video, so rows of
one forward have separate statistics.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNetMotionModel
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_motion_model import AnimateDiffTransformer3D
from torch import nn

from pia_ray.pia.unet.group_norms import ChosenGroupNorm, is_channels_last


def normalise_as_original(unet: UNetMotionModel) -> None:
    """Changes the GroupNorms of the UNet's ResNet blocks, output and motion modules to those of the original code.

    Weights stay. Spatial attention normalises frame by frame in both and is not changed. Source: AnimateDiff's and
    PIA's published code, whose tensors are [B, C, T, h, w] in ResNet blocks and [B*T, C, h, w] in motion modules.
    """
    length = _Length()
    unet.register_forward_pre_hook(length.read, with_kwargs=True)
    for module in list(unet.modules()):
        if isinstance(module, ResnetBlock2D):
            module.norm1 = _VideoGroupNorm(module.norm1, length)
            module.norm2 = _VideoGroupNorm(module.norm2, length)
        elif isinstance(module, AnimateDiffTransformer3D):
            module.norm = _FrameGroupNorm(module.norm)
    if unet.conv_norm_out is not None:
        unet.conv_norm_out = _VideoGroupNorm(unet.conv_norm_out, length)


class _Length:
    """Frames per video in the UNet's running forward. Its hook is a bound method, so that a deep copy has its own."""

    def __init__(self) -> None:
        self.num_frames = 1

    def read(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        sample = args[0] if args else kwargs["sample"]  # [N, 9, T, h, w]
        self.num_frames = sample.shape[2]


class _VideoGroupNorm(ChosenGroupNorm):
    """GroupNorm with statistics over all frames of each video of a flattened batch."""

    def __init__(self, norm: nn.GroupNorm, length: _Length) -> None:
        super().__init__(norm.num_groups, norm.num_channels, norm.eps, affine=False)
        self.weight, self.bias = norm.weight, norm.bias
        self._length = length

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - torch's own name
        """[N*T, C, h, w] -> the same shape."""
        rows, channels, height, width = input.shape
        num_frames = self._length.num_frames
        if not is_channels_last(input):
            videos = input.unflatten(0, (-1, num_frames)).transpose(1, 2)  # [N, C, T, h, w]
            normal = F.group_norm(videos, self.num_groups, self.weight, self.bias, self.eps)
            return normal.transpose(1, 2).flatten(0, 1)
        # Stacked vertically, the frames of a video are one tall picture, without a copy.
        tall = input.permute(0, 2, 3, 1).view(rows // num_frames, num_frames * height, width, channels)
        normal = super().forward(tall.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return normal.reshape(rows, height, width, channels).permute(0, 3, 1, 2)


class _FrameGroupNorm(ChosenGroupNorm):
    """GroupNorm with statistics frame by frame of videos [N, C, T, h, w]."""

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__(norm.num_groups, norm.num_channels, norm.eps, affine=False)
        self.weight, self.bias = norm.weight, norm.bias

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - torch's own name
        """[N, C, T, h, w] -> the same shape."""
        frames = input.transpose(1, 2)  # [N, T, C, h, w]
        return super().forward(frames.flatten(0, 1)).unflatten(0, frames.shape[:2]).transpose(1, 2)
