"""An animation as a piece of HTML that holds its video: what a notebook shows. Loads nothing from elsewhere."""

from __future__ import annotations

import base64
import html
from typing import Final

from pia_ray.errors import VideoError
from pia_ray.params import MOTION_NAMES, Animation
from pia_ray.video import MIME, encode, provenance_of

LEAST_WIDTH: Final = 192
"""Smaller videos are shown at this width, in px."""


def as_html(animation: Animation, *, width: int | None = None) -> str:
    """A figure that plays the video round and round, with what was asked for below it.

    `width` in px; left out: the video's own, and at least 192. Several in a row stand side by side.

    Raises:
        VideoError: there are no frames, or the encoder failed.
    """
    if width is not None and width < 1:
        raise VideoError(f"width must be at least 1 px (got {width})")
    params = animation.params
    video = encode(animation.frames, fps=params.fps, format="mp4", provenance=provenance_of(animation))
    shown = max(LEAST_WIDTH, video.width) if width is None else width
    content = base64.b64encode(video.content).decode("ascii")
    return (
        f'<figure style="display:inline-block;margin:0 12px 12px 0;width:{shown}px;vertical-align:top">'
        f'<video src="data:{MIME["mp4"]};base64,{content}" width="{shown}" autoplay loop muted playsinline controls>'
        f'</video><figcaption style="font-size:12px;overflow-wrap:anywhere">{html.escape(caption(animation))}'
        "</figcaption></figure>"
    )


def caption(animation: Animation) -> str:
    """One line: the prompt, the motion that was asked for, and the motion that was measured."""
    params = animation.params
    motion = "of its own affinity" if params.affinity is not None else MOTION_NAMES[params.motion_scale]
    return f"{params.prompt} · motion {motion}, measured {animation.motion:.3f}"
