"""The checks of the knobs of finishing against each other and the other knobs."""

from __future__ import annotations

from typing import Final

from pia_ray.config.knobs import AnimationParams
from pia_ray.config.timeline import timeline_of
from pia_ray.errors import BadParameter

MAX_FILE_FRAMES: Final = 7200
"""Frames of a finished file that is interpolated or repeated: two minutes at 60 frames/s."""


def check_finishing(params: AnimationParams) -> None:
    """Refuses resolved params whose knobs of finishing contradict each other or the others.

    Raises:
        BadParameter: they do; says which.
    """
    if params.playback_fps is not None and params.playback_fps < params.fps:
        raise BadParameter(
            f"playback_fps must be fps or more, because finishing leaves no frame out (got {params.playback_fps} with "
            f"fps {params.fps})",
            "playback_fps",
        )
    if params.min_duration is not None and params.repeat > 1:
        raise BadParameter(
            f"min_duration counts the times that the video is repeated, and so does repeat (got {params.repeat}): "
            "give one of them",
            "min_duration",
        )
    timeline = timeline_of(params)
    if timeline.num_frames > max(MAX_FILE_FRAMES, params.num_frames):
        raise BadParameter(
            f"{_cause(params)} gives a file of {timeline.num_frames:,} frames ({timeline.duration_s:.0f} s at "
            f"{timeline.fps} frames/s), and {MAX_FILE_FRAMES:,} is the most: ask for less of it",
            _cause(params),
        )


def _cause(params: AnimationParams) -> str:
    """The knob that makes the file as long as it is."""
    if params.min_duration is not None:
        return "min_duration"
    return "repeat" if params.repeat > 1 else "playback_fps"
