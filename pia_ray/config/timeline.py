"""The frames of a finished video by number: how many there are, and which are shown when. Pure functions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import chain

from pia_ray.config.knobs import AnimationParams


@dataclass(frozen=True)
class Timeline:
    """The frames of a finished video.

    A round is the video played once, or once there and back. Its frames are those of `shown`, or as many between them
    as `playback_fps` asks for; the file plays `num_rounds` of it.
    """

    shown: tuple[int, ...]
    """The generated frames of one round, by number, from which its frames are made."""
    closed: bool
    """Whether the last frame of a round goes over into the first."""
    round_frames: int
    """Frames of one round, at `fps`."""
    num_rounds: int
    num_closing: int
    """1 where a round ends on its first frame again, which then only the last round shows; else 0."""
    fps: int
    interpolated: bool
    """Whether frames are made between those of `shown`."""

    @property
    def num_frames(self) -> int:
        """Frames of the file."""
        return self.num_rounds * self.round_frames - (self.num_rounds - 1) * self.num_closing

    @property
    def duration_s(self) -> float:
        """Seconds that the file lasts."""
        return self.num_frames / self.fps

    @property
    def order(self) -> tuple[int, ...]:
        """The frames of the file, by their number within a round."""
        again = range(self.round_frames - self.num_closing)
        return tuple(chain(*[again] * (self.num_rounds - 1), range(self.round_frames)))

    @property
    def sources(self) -> tuple[int, ...]:
        """The frame of a round that is shown at the time of each frame of `shown`."""
        return tuple(k * self.round_frames // len(self.shown) for k in range(len(self.shown)))


def timeline_of(params: AnimationParams, *, num_generated: int | None = None) -> Timeline:
    """The frames of the finished video of resolved params, and of so many generated frames where that is known.

    A round of S frames at `fps` has round(S * playback_fps / fps) frames at `playback_fps`, halves rounded up.
    """
    forth = tuple(range(params.video_frames if num_generated is None else num_generated))
    back = forth[-2:0:-1] if params.repeat_mode == "there-and-back" else ()
    shown, closed = forth + back, bool(back) or params.is_loop
    fps = params.fps if params.playback_fps is None else params.playback_fps
    round_frames = max(1, (2 * len(shown) * fps + params.fps) // (2 * params.fps))
    interpolated = fps != params.fps
    num_closing = int(params.is_loop and params.seam == "keep" and not back)
    if interpolated and params.interpolate != "none" and num_closing:
        # The closing frame is the first again: shown beside it, the picture would stand still. The others share its
        # time, so that the video lasts as long as before.
        shown, num_closing = shown[:-1], 0
    num_rounds = params.repeat
    if params.min_duration is not None:
        least = math.ceil(params.min_duration * fps - 1e-6)
        num_rounds = max(1, math.ceil((least - num_closing) / max(1, round_frames - num_closing)))
    return Timeline(shown, closed, round_frames, num_rounds, num_closing, fps, interpolated)
