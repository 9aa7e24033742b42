"""Doubling and its 3x3 convolution as one 2x2 convolution with four outputs a pixel, which are then interleaved."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from pia_ray.pia.unet.upsample import subpixel_weight


def four_weights(weight: torch.Tensor) -> torch.Tensor:
    """The weight of the 2x2 convolution. [O, I, 3, 3] -> [4*O, I, 2, 2], the four outputs of a pixel in sequence."""
    taps = subpixel_weight(weight).transpose(0, 1)  # [O, I, 4, 4]
    # A transposed convolution writes input j, tap k, to output 2j - 1 + k: an even output reads taps 3 and 1 of the
    # inputs before and at its own, an odd one taps 2 and 0 of its own and the next.
    rows = ((3, 1), (2, 0))
    four = [taps[:, :, rows[y]][:, :, :, rows[x]] for y in (0, 1) for x in (0, 1)]
    return torch.cat(four)


def as_four_convolutions(images: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The result of doubling and convolution, by `four_weights`. [N, I, h, w] -> [N, O, 2h, 2w]."""
    height, width = images.shape[-2:]
    outputs = F.conv2d(images, weight, padding=1).chunk(4, dim=1)  # each [N, O, h + 1, w + 1]
    shifted = [
        output[:, :, index // 2 : index // 2 + height, index % 2 : index % 2 + width]
        for index, output in enumerate(outputs)
    ]
    return F.pixel_shuffle(torch.stack(shifted, 2).flatten(1, 2), 2)
