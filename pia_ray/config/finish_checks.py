"""The checks of the knobs of finishing against each other and the other knobs."""

from __future__ import annotations

from typing import Final

from pia_ray.config.canvas import file_size
from pia_ray.config.knobs import AnimationParams
from pia_ray.config.timeline import timeline_of
from pia_ray.errors import BadParameter

MAX_FILE_FRAMES: Final = 7200
"""Frames of a finished file that is interpolated or repeated: two minutes at 60 frames/s."""

MIN_MOTION_SIDE: Final = 32
"""Sides in px from which minterpolate estimates motion: two of its blocks."""

MAX_ENLARGED_SIDE: Final = 4096
MAX_ENLARGED_PIXELS: Final = 4096 * 2304
"""Of a frame that is enlarged: those of H.264's level 5.2, which phones and browsers play."""

MAX_FRAMES_BYTES: Final = 2**31
"""Memory of the different frames of a finished file, uint8 RGB; a repeated frame counts once."""


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
    _check_framing(params)
    if (params.playback_fps, params.repeat, params.min_duration, params.repeat_mode) == (None, 1, None, "restart"):
        return
    timeline = timeline_of(params)
    if timeline.num_frames > max(MAX_FILE_FRAMES, params.num_frames):
        raise BadParameter(
            f"{longest_knob(params)} gives a file of {timeline.num_frames:,} frames ({timeline.duration_s:.0f} s at "
            f"{timeline.fps} frames/s), and {MAX_FILE_FRAMES:,} is the most: ask for less of it",
            longest_knob(params),
        )


def longest_knob(params: AnimationParams) -> str:
    """The knob that makes a file longer than its video."""
    if params.min_duration is not None:
        return "min_duration"
    if params.repeat > 1:
        return "repeat"
    return "repeat_mode" if params.playback_fps is None else "playback_fps"


def check_file_size(params: AnimationParams) -> None:
    """Refuses params with a width and height whose frames cannot be finished: too small ones, or too many large ones.

    Raises:
        BadParameter: they do.
    """
    if params.width is None or params.height is None:
        return
    timeline = timeline_of(params)
    if timeline.interpolated and params.interpolate == "motion" and min(params.width, params.height) < MIN_MOTION_SIDE:
        raise BadParameter(
            f"interpolate must be blend or none for a video of {params.width}x{params.height}: motion is found in "
            f"frames with sides of {MIN_MOTION_SIDE} px or more",
            "interpolate",
        )
    width, height = file_size((params.width, params.height), params)
    fits = max(width, height) <= MAX_ENLARGED_SIDE and width * height <= MAX_ENLARGED_PIXELS
    if params.upscale > 1 and not fits:
        raise BadParameter(
            f"upscale {params.upscale} of {params.width}x{params.height} gives a file of {width}x{height}, and the "
            f"most is {MAX_ENLARGED_SIDE} px on a side and {MAX_ENLARGED_PIXELS / 1e6:.1f} million pixels: take a "
            "smaller factor or a smaller video",
            "upscale",
        )
    size_bytes = 3 * timeline.round_frames * width * height
    generated = 3 * params.num_frames * params.width * params.height
    if size_bytes > max(MAX_FRAMES_BYTES, generated):
        field = "aspect" if timeline.round_frames == params.video_frames else "playback_fps"
        field = "upscale" if params.upscale > 1 else field
        raise BadParameter(
            f"{field} gives {timeline.round_frames} frames of {width}x{height}, which take "
            f"{size_bytes / 2**30:.1f} GiB of memory, and {MAX_FRAMES_BYTES / 2**30:g} is the most: choose smaller or "
            "fewer frames",
            field,
        )


def _check_framing(params: AnimationParams) -> None:
    width, height, aspect = params.width, params.height, params.aspect_ratio
    if aspect is None and params.fit != "crop":
        raise BadParameter(f"fit {params.fit} needs an aspect to which the picture is brought, such as 9:16", "fit")
    if params.focus is not None and params.fit != "crop":
        raise BadParameter(f"focus is for fit crop: with {params.fit} the whole picture is in view", "focus")
    if aspect is None or width is None or height is None:
        return
    if params.fit != "crop":
        raise BadParameter(
            f"width and height must not both be given with fit {params.fit} (got {width} and {height}): they are those "
            "of the whole picture, before what is added around it",
            "height",
        )
    if abs(width - height * aspect) > 8 and abs(height - width / aspect) > 8:
        raise BadParameter(
            f"aspect {params.aspect} is not that of width {width} and height {height}: leave out one of the three",
            "aspect",
        )
