"""The frames that are denoised together at each step: segments of a chain, context windows of a step. Numbers only.

The estimate of a run counts with it, so it must load without torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pia_ray.config.knobs import AnimationParams

if TYPE_CHECKING:
    from pia_ray.pia.evaluation import Window


def segments(params: AnimationParams) -> tuple[int, ...]:
    """The number of frames of each segment of a chain; one segment of all frames where the video is no chain.

    Each segment after the first starts with the last frame of the one before, which is counted once. Lengths are as
    equal as possible, because a short last segment would hardly move.
    """
    frames, most = params.num_frames, params.piece_frames
    if params.long_video != "chain" or frames <= most:
        return (frames,)
    fresh = frames - 1
    num = -(-fresh // (most - 1))
    return tuple(fresh // num + (index < fresh % num) + 1 for index in range(num))


def windows(params: AnimationParams, step: int) -> tuple[Window, ...]:
    """The windows of one denoising step: equally long, together all frames. There is one where all frames fit in it.

    `standard` starts with a window at the first frame and ends with one at the last. `uniform` shifts the windows at
    each step by the van der Corput sequence, so that no frame stays at a border; `uniform-loop` shifts them around a
    closed loop. Source: the context schedulers of AnimateDiff's command line tool; unlike there, `uniform` does not
    pass the end, and no window holds a frame twice.
    """
    frames, size, overlap = params.num_frames, params.piece_frames, params.context_overlap
    if params.long_video != "windows" or frames <= size:
        return (tuple(range(frames)),)
    if params.context_schedule == "standard":
        return tuple(_across(frames, size, overlap, stride=1, shift=0.0))
    shift = _van_der_corput(step)
    found: dict[Window, None] = {}
    for level in range(params.context_stride):
        stride = 1 << level
        if params.context_schedule == "uniform-loop":
            if size * stride <= frames or stride == 1:
                found.update(dict.fromkeys(_around(frames, size, overlap, stride=stride, shift=shift)))
        elif (size - 1) * stride < frames:
            found.update(dict.fromkeys(_across(frames, size, overlap, stride=stride, shift=shift)))
    return tuple(found)


def _across(frames: int, size: int, overlap: int, *, stride: int, shift: float) -> Iterator[Window]:
    """Windows within the first and the last frame."""
    span = (size - 1) * stride + 1
    hop = max(1, size * stride - overlap)
    start = -int(hop * shift)
    while True:
        first = min(max(0, start), frames - span)
        yield tuple(range(first, first + span, stride))
        if first == frames - span:
            return
        start += hop


def _around(frames: int, size: int, overlap: int, *, stride: int, shift: float) -> Iterator[Window]:
    """Windows around a closed loop."""
    begin = round(frames * shift)
    for first in range(begin + int(shift * stride), begin + frames, size * stride - overlap):
        yield tuple((first + index * stride) % frames for index in range(size))


def _van_der_corput(index: int) -> float:
    """The index with its binary digits mirrored at the binary point: 0, 1/2, 1/4, 3/4, 1/8 ..."""
    value, digit = 0.0, 0.5
    while index:
        value += digit * (index & 1)
        index >>= 1
        digit /= 2
    return value
