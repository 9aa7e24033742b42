"""Frames between frames, by libavfilter's minterpolate, through PyAV."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from fractions import Fraction
from typing import TYPE_CHECKING, Final

import av
import av.filter
import numpy as np

from pia_ray.config.finish_knobs import Interpolation
from pia_ray.config.timeline import Timeline
from pia_ray.errors import VideoError
from pia_ray.media.video_facts import Frames

if TYPE_CHECKING:
    from av.filter.context import FilterContext

_MARGIN: Final = 2
"""Frames before and after a round that the filter sees, since it estimates motion from two frames on each side."""

_MODES: Final = {"motion": "mci", "blend": "blend"}


def play_at(frames: Frames, timeline: Timeline, *, interpolate: Interpolation) -> Frames:
    """The frames of one round, uint8 [N, H, W, 3], from the generated ones, uint8 [T, H, W, 3].

    A generated frame whose time is that of one of the round is in it unchanged. The last frame of a round that is not
    closed is shown until the round ends. Between two frames with a cut there is the nearer of both.

    Raises:
        VideoError: the filter failed.
    """
    shown = frames if timeline.shown == tuple(range(len(frames))) else frames[list(timeline.shown)]
    if not timeline.interpolated:
        return shown
    num_shown, num_frames = len(shown), timeline.round_frames
    # Frame n of the round is shown at n * num_shown, generated frame k at k * num_frames: whole numbers of one unit.
    if interpolate == "none" or num_shown == 1:
        return shown[[min(num_shown - 1, n * num_shown // num_frames) for n in range(num_frames)]]
    try:
        return _between(shown, num_frames, closed=timeline.closed, mode=_MODES[interpolate])
    except (av.FFmpegError, OSError) as error:
        height, width = shown.shape[1:3]
        raise VideoError(f"interpolating {num_shown} frames of {width}x{height} failed: {error}") from error


def _between(shown: Frames, num_frames: int, *, closed: bool, mode: str) -> Frames:
    num_shown, height, width = shown.shape[:3]
    result = np.empty((num_frames, height, width, 3), np.uint8)
    made = np.zeros(num_frames, np.bool_)
    for n, picture in _filtered(_sent(num_shown, closed=closed), shown, num_frames, mode=mode):
        if 0 <= n < num_frames:
            result[n], made[n] = picture, True
    for n in range(num_frames):
        kept, between = divmod(n * num_shown, num_frames)
        if not between:
            result[n], made[n] = shown[kept], True
    if not made.all():
        raise VideoError(f"interpolating gave {made.sum()} of {num_frames} frames")
    return result


def _sent(num_shown: int, *, closed: bool) -> Iterator[tuple[int, int]]:
    """The frames that the filter is given, each with its place in the round, from before its start to after its end."""
    for k in range(-_MARGIN, num_shown + _MARGIN):
        yield k % num_shown if closed else min(max(k, 0), num_shown - 1), k


def _filtered(
    sent: Iterable[tuple[int, int]], shown: Frames, num_frames: int, *, mode: str
) -> Iterator[tuple[int, Frames]]:
    """The filter's frames, uint8 [H, W, 3], each with its number in the round, where a round lasts a second."""
    num_shown, height, width = shown.shape[:3]
    unit = Fraction(1, num_shown * num_frames)
    graph = av.filter.Graph()
    graph.threads = 1  # workers finish several videos side by side
    source = graph.add("buffer", f"video_size={width}x{height}:pix_fmt=rgb24:time_base={unit}:frame_rate={num_shown}")
    # Without chroma subsampling, because a gif has none and frames may be composed further in RGB.
    chain = (
        source,
        graph.add("format", "pix_fmts=yuv444p"),
        graph.add("minterpolate", f"fps={num_frames}:mi_mode={mode}:scd=fdiff"),
        graph.add("format", "pix_fmts=rgb24"),
        graph.add("buffersink"),
    )
    graph.link_nodes(*chain).configure()
    for index, k in sent:
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(shown[index]), format="rgb24")
        frame.pts, frame.time_base = k * num_frames, unit
        source.push(frame)
        yield from _ready(chain[-1])
    source.push(None)
    yield from _ready(chain[-1])


def _ready(sink: FilterContext) -> Iterator[tuple[int, Frames]]:
    while True:
        try:
            frame = sink.pull()
        except (av.BlockingIOError, av.EOFError):
            return
        if isinstance(frame, av.VideoFrame) and frame.pts is not None:
            yield frame.pts, np.asarray(frame.to_ndarray(), np.uint8)
