"""A finished animation in memory: its frames, how to save it, and how a notebook shows it."""

from __future__ import annotations

import base64
import html
import os
import tempfile
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol, cast

import numpy as np

from pia_ray.config.knob_types import MOTION_NAMES, VideoFormat
from pia_ray.config.knobs import AnimationParams
from pia_ray.config.workers import WorkerConfig
from pia_ray.errors import BadParameter, UnsafeContent, VideoError
from pia_ray.types import AnimationRequest, EncodedVideo, PreparedRequest, Upscale

if TYPE_CHECKING:
    from PIL import Image

    from pia_ray.media.judgement import Judgement

LEAST_WIDTH: Final = 192
"""Smaller videos are shown at this width, in px."""


@dataclass(frozen=True)
class Animation:
    """A finished animation in memory."""

    frames: np.ndarray[Any, Any]
    """uint8 [T, H, W, 3], RGB. Empty for the output type "latent", which is not decoded."""
    params: AnimationParams
    """Resolved, with the width, height and seed that were used."""
    model: str
    """Name and version of the model that made it."""
    id: str
    gpu_s: float
    """Seconds of engine time: this row's share of every forward it took part in, plus its decode."""
    animate_s: float
    """Seconds from submission to the finished frames."""
    motion: float
    """Mean L1 over H, S, V and an edge channel against the condition frame, 0 to 1. Source: PIA's training score."""
    output: Any = None
    """As the request's `output_type` asks: "uint8": `frames`; "pil": a list of PIL images; "np": float32 [T, H, W, 3]
    and "pt": a torch tensor [T, 3, H, W], both 0 to 1 and not rounded to 8 bits; "latent": the denoised latents, a
    torch tensor [4, T, h, w]. Tensors are float32, on the CPU."""
    subject_similarity: float | None = None
    """As `Judgement` has it; None where the model has no scorer."""
    prompt_similarity: float | None = None
    nsfw: bool | None = None
    """Whether the model's safety checker found a frame that is not safe; None where it was not asked."""
    upscale: Upscale | None = field(default=None, repr=False, compare=False)
    """Enlarges frames by the model's upscaler; None where the model has none."""
    image: Image.Image | None = None
    """The animated picture, RGB, of the frames' size."""

    def judge(self) -> Judgement:
        """Numbers that say how good the video is.

        Raises:
            BadParameter: there are no frames, or there is no image.
        """
        from pia_ray.media.judgement import judge_frames  # here, so that the import is quick

        if self.image is None:
            raise BadParameter("the animation has no image that its frames could be judged by", "image")
        return judge_frames(
            self.frames,
            image=self.image,
            motion=self.motion,
            loop=self.params.is_loop,
            subject_similarity=self.subject_similarity,
            prompt_similarity=self.prompt_similarity,
        )

    def encode(self, format: VideoFormat = "mp4") -> EncodedVideo:  # noqa: A002 - the field's word
        """The video as a file in memory, decoded again to see that it is whole; `save` writes the same bytes.

        Raises:
            VideoError: no frames, the format cannot hold the size or speed, or the encoder failed.
        """
        return encode_animation(self, format)

    def save(self, path: str | Path) -> None:
        """Encodes to a file; the extension picks the format (mp4, gif, webp, webm). A poster lies beside it.

        Raises:
            VideoError: unknown extension, no frames, or the encoder failed.
        """
        save_animation(self, path)

    def to_html(self, *, width: int | None = None) -> str:
        """A figure that holds and plays the video, for a notebook; `width` in px, left out: as large as the video.

        Raises:
            VideoError: no frames, or the encoder failed.
        """
        return as_html(self, width=width)

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, str]:
        """The video for a notebook, where there are frames."""
        count, height, width = self.frames.shape[:3] if self.frames.size else (0, 0, 0)
        text = {"text/plain": f"<Animation: {count} frames of {width} x {height} px, {self.params.prompt!r}>"}
        return {**text, "text/html": self.to_html()} if count else text


def provenance_of(animation: Animation) -> dict[str, Any]:
    """The provenance inside every file: id, seed, params and model. Seeds are strings."""
    params = animation.params.model_dump(mode="json")
    params["seed"] = None if animation.params.seed is None else str(animation.params.seed)
    return {"id": animation.id, "seed": params["seed"], "params": params, "model": animation.model}


def require_safe(animation: Animation, config: WorkerConfig) -> None:
    """Refuses a video that is not safe where `safety` is fail.

    Raises:
        UnsafeContent: it is not.
    """
    if animation.nsfw and config.safety == "fail":
        raise UnsafeContent("a frame of the video may not be safe for all, by the model's safety checker")


OnStep = Callable[[int, int], None]
"""Called after each denoising step with the number of finished steps and of all steps, on a thread of the animator:
it must return at once."""


OnStart = Callable[[], None]
"""Called when the row leaves the queue and its denoising begins, as `OnStep` is."""


class RowAnimator(Protocol):
    """The animator of a worker or an engine: `Animator`, or a fake of it."""

    batch_size: int
    """The rows that denoise together at most."""

    @property
    def num_loads(self) -> int:
        """As `Animator.num_loads`."""

    def version_of(self, style: str) -> str:
        """As `Animator.version_of`."""

    def expect_rows(self, num: int | None) -> None:
        """As `Animator.expect_rows`."""

    def submit(
        self,
        request: AnimationRequest | PreparedRequest,
        *,
        alone: bool = ...,
        on_step: OnStep | None = ...,
        on_start: OnStart | None = ...,
        priority: float = ...,
    ) -> Future[Animation]:
        """As `Animator.submit`."""

    def close(self) -> None:
        """As `Animator.close`."""


def encode_animation(animation: Animation, format: VideoFormat) -> EncodedVideo:  # noqa: A002 - the field's word
    """The verified video file, with how it was made inside.

    Raises:
        VideoError: no frames, the format cannot hold the size or speed, or the encoder failed.
    """
    return _encoded(animation, format)[0]


def _encoded(animation: Animation, video_format: VideoFormat) -> tuple[EncodedVideo, bytes | None]:
    """The video file, and the poster where the params ask for one."""
    from pia_ray.media.finish import encode_finished, finish, poster_of  # here: an animator starts without a codec
    from pia_ray.media.video import verify

    finished = finish(animation.frames, animation.params, upscale=animation.upscale)
    poster = poster_of(finished, animation.params, judged=animation.frames, image=animation.image)
    encoded = encode_finished(finished, video_format, provenance=provenance_of(animation))
    verify(encoded)
    return encoded, poster


def save_animation(animation: Animation, path: str | Path) -> None:
    """Encodes to a file whose extension picks the format; the file appears whole or not at all.

    A poster that the params ask for lies beside it: `cat-poster.jpg` for `cat.mp4`.

    Raises:
        VideoError: unknown extension, the encoder failed, or the file could not be written.
    """
    from pia_ray.media.video import MIME  # as above

    target = Path(path)
    extension = target.suffix.lower().removeprefix(".")
    if extension not in MIME:
        raise VideoError(f'"{target.name}" has no extension of a video format, choose from .{", .".join(MIME)}')
    video, poster = _encoded(animation, cast(VideoFormat, extension))
    if poster is not None:
        _write_whole(target.with_name(f"{target.stem}-poster.{animation.params.poster}"), poster)
    _write_whole(target, video.content)


def _write_whole(target: Path, content: bytes) -> None:
    """Writes a file that appears whole or not at all.

    Raises:
        VideoError: it could not be written.
    """
    try:
        with tempfile.NamedTemporaryFile(dir=target.parent, prefix=f".{target.name[:64]}.", delete=False) as file:
            unfinished = Path(file.name)
            try:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
                umask = os.umask(0)
                os.umask(umask)
                unfinished.chmod(0o666 & ~umask)
                unfinished.replace(target)
            except BaseException:
                unfinished.unlink(missing_ok=True)
                raise
    except OSError as error:
        raise VideoError(f"cannot write {target}: {error.strerror or error}") from error


def as_html(animation: Animation, *, width: int | None = None) -> str:
    """A figure that plays the video round and round, with what was asked for below it.

    `width` in px; left out: the video's own, and at least 192. Several in a row stand side by side.

    Raises:
        VideoError: there are no frames, or the encoder failed.
    """
    from pia_ray.media.video import MIME  # as above

    if width is not None and width < 1:
        raise VideoError(f"width must be at least 1 px (got {width})")
    video = encode_animation(animation, "mp4")
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
