"""The finished frames of a video: from the frames of an animation to those of its file.

Runs on the threads that encode, beside the engine, after the frames were judged. The steps, in order:

1. A network of the caller enlarges the generated frames.
2. Frames between are made (`playback`).
3. Without a network Lanczos enlarges all frames (`enlarging`): cheaper than frames between of the larger size.
4. The canvas is put around them (`framing`), so that no motion is estimated over bars.
5. The order of playing, in which a frame that is shown twice costs no memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from pia_ray.config.knob_types import VideoFormat
from pia_ray.config.knobs import AnimationParams
from pia_ray.config.timeline import timeline_of
from pia_ray.media import video
from pia_ray.media.finish.enlarging import enlarge
from pia_ray.media.finish.framing import framed
from pia_ray.media.finish.playback import play_at
from pia_ray.media.finish.posters import write_poster
from pia_ray.media.judgement import best_frame
from pia_ray.media.video_facts import Frames
from pia_ray.types import EncodedVideo, Upscale


@dataclass(frozen=True)
class FinishedFrames:
    """The frames of a video file."""

    frames: Frames
    """uint8 [T, H, W, 3], RGB: each different frame once."""
    order: Sequence[int]
    """The frames of the file in order of playing, by their index in `frames`."""
    fps: int
    generated: Frames
    """The generated frames, uint8 [T, H, W, 3], RGB, enlarged where a network does that, and nothing around them."""
    sources: Sequence[int]
    """The frame in `frames` that is shown at the time of each generated frame of a round."""

    @property
    def preview(self) -> Frames:
        """As many frames of a round as were generated for it: for thumbnails, at the speed of those."""
        whole = list(self.sources) == list(range(len(self.frames)))
        return self.frames if whole else self.frames[list(self.sources)]

    @property
    def width(self) -> int:
        """Width of the file in px."""
        return int(self.frames.shape[2])

    @property
    def height(self) -> int:
        """Height of the file in px."""
        return int(self.frames.shape[1])


def finish(frames: Frames, params: AnimationParams, *, upscale: Upscale | None = None) -> FinishedFrames:
    """The frames of the file that resolved params ask for, from the generated ones, uint8 [T, H, W, 3], RGB.

    Where no knob of finishing is set, they are the generated ones. `upscale` enlarges them; left out: Lanczos does.

    Raises:
        VideoError: there are no frames, or frames between could not be made.
        OutOfMemory, NonFiniteFrames: `upscale` failed.
    """
    video.require_frames(frames)
    timeline = timeline_of(params, num_generated=len(frames))
    generated = frames if upscale is None or params.upscale == 1 else upscale(frames, params.upscale)
    finished = play_at(generated, timeline, interpolate=params.interpolate)
    if upscale is None:
        finished = enlarge(finished, params.upscale)
    return FinishedFrames(framed(finished, params), timeline.order, timeline.fps, generated, timeline.sources)


def poster_of(
    finished: FinishedFrames, params: AnimationParams, *, judged: Frames, image: Image.Image | None
) -> bytes | None:
    """The best of the generated frames as a JPEG or WebP file of the video's size; None where `poster` asks for none.

    `judged` are these frames as the animator made them, which are compared with `image`, the animated picture. Without
    it the first one is the best.
    """
    if params.poster == "none":
        return None
    index = 0 if image is None else best_frame(judged, image=image)
    best = finished.generated[index : index + 1]
    if best.shape == judged[index : index + 1].shape:  # no network has enlarged it
        best = enlarge(best, params.upscale)
    return write_poster(framed(best, params)[0], params.poster)


def encode_finished(
    finished: FinishedFrames,
    format: VideoFormat,  # noqa: A002 - the field's word
    *,
    provenance: Mapping[str, Any],
) -> EncodedVideo:
    """The video file of these frames.

    Raises:
        VideoError: the format cannot hold the size or speed, or the encoder failed.
    """
    return video.encode(finished.frames, fps=finished.fps, format=format, provenance=provenance, order=finished.order)


def require_finishable(format: VideoFormat, params: AnimationParams) -> None:  # noqa: A002 - the field's word
    """Refuses before any work what `encode_finished` would refuse after it. A size that is not known passes.

    Raises:
        VideoError: the format cannot hold the size or speed; says which can.
    """
    fps = timeline_of(params).fps
    video.require_encodable(format, width=params.width or 8, height=params.height or 8, fps=fps)
