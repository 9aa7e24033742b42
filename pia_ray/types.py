"""The values that travel between modules: a manifest's row, a request, an encoded video, a row of the results.

Reads and writes nothing and loads no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol

import numpy as np

from pia_ray.config.acceptance import NUMBERS
from pia_ray.config.knob_types import VideoFormat
from pia_ray.config.knobs import AnimationParams
from pia_ray.config.resolving import canonical, canonical_params, seed_from_id, seed_of_video

if TYPE_CHECKING:
    from PIL import Image


Status = Literal["succeeded", "failed"]
SUCCEEDED: Final = "succeeded"
FAILED: Final = "failed"

JUDGED: Final = tuple(NUMBERS)
"""The numbers of a `Judgement`, which are columns of the results."""

OutputType = Literal["uint8", "pil", "np", "pt", "latent"]


@dataclass(frozen=True)
class ManifestRow:
    """One work item as planned: thin, picklable, everything resolved. Holds no image bytes."""

    id: str
    video_index: int
    image: str
    """URI of the picture, or `<manifest uri>#row=<n>&column=<name>` for bytes inside a Parquet manifest."""
    image_identity: str
    """The picture in the work key: its reference as written, or `sha256:<hex>` for bytes."""
    params: AnimationParams
    """Resolved; `seed` is set; `width` and `height` may still be None (chosen from the picture). Knobs that refer to
    files hold the identity of what they name, as `image_identity` does."""
    work_key: str
    """64 hex digits."""
    references: Mapping[str, str] = field(default_factory=dict)
    """The URIs, as in `image`, of the files that the params refer to, by knob."""
    picture_index: int | None = None
    """The picture's number among those of its row, from 0, where the row has several."""
    accept: str | None = None
    retakes: str | None = None
    """The row's own cells of these names, which replace the run's settings. No part of the work key."""
    takes: str | None = None
    """The takes that were tried before, as in `ResultRow`."""

    @property
    def reference_identities(self) -> dict[str, str]:
        """The work key's entries for the files that the params refer to, by knob: the values of these knobs."""
        return {knob: getattr(self.params, knob) for knob in self.references}


@dataclass(frozen=True)
class StepEnd:
    """The state of a row after a denoising step, as `AnimationRequest.on_step_end` gets it."""

    step: int
    """From 0; a scheduler that takes two evaluations a step, such as heun, counts each."""
    timestep: float
    """The scheduler's timestep at which the step began."""
    tensors: Mapping[str, Any]
    """The row's own torch tensors: `latents` [4, T, h, w], `prompt_embeds` [L, C] and, with guidance,
    `negative_prompt_embeds` [L, C]. They are copies, so a change in them has no effect."""


OnStepEnd = Callable[[StepEnd], Mapping[str, Any] | None]
"""May return tensors by the names of `StepEnd.tensors`, of the same shapes, that replace the row's own."""


@dataclass(frozen=True)
class AnimationRequest:
    """One animation to make: a picture and its params.

    The pictures and arrays are fields of the request. Knobs of the params with the same names only say where a picture
    or array comes from; a request with such a knob must have the field too.
    """

    image: Image.Image | np.ndarray[Any, Any]
    """PIL image, or uint8 [H, W, 3] RGB (also [H, W] or [H, W, 4])."""
    params: AnimationParams
    id: str = ""
    """Names the request in logs and errors; gives the seed where `params` has none."""
    deadline_s: float | None = None
    """Seconds from submission after which the request fails with `Timeout`."""
    end_image: Image.Image | np.ndarray[Any, Any] | None = None
    """Second keyframe: the picture that the last frame is to be. Fitted like `image`."""
    mask_image: Image.Image | np.ndarray[Any, Any] | None = None
    """Mask of the parts that may move: white moves, black and transparent stay. Cropped and scaled as `image` is."""
    ip_adapter_image: Image.Image | np.ndarray[Any, Any] | None = None
    """The IP-Adapter's picture: its content and style guide the video in addition to the prompt."""
    ip_adapter_image_embeds: np.ndarray[Any, Any] | None = None
    """float32, in place of `ip_adapter_image`: one embedding, several (a further axis in front), or diffusers' layout
    (two axes in front, the outer one of 2 with the negative first)."""
    latents: np.ndarray[Any, Any] | None = None
    """float32 [4, T, h, w], normal noise to start from in place of the seed's own first draw; below strength 1, the
    noise that the picture is given."""
    prompt_embeds: np.ndarray[Any, Any] | None = None
    """float32 [L, C], in place of the prompt's, which then plays no part."""
    negative_prompt_embeds: np.ndarray[Any, Any] | None = None
    """float32 [L, C], in place of the negative prompt's; both sides of guidance must have the same L."""
    output_type: OutputType = "uint8"
    """The type of `Animation.output`."""
    scheduler_config: Mapping[str, Any] | None = None
    """The settings of the scheduler's diffusers class, exactly as they are. None: the model's own, with the linear
    betas of PIA's training and without clipping."""
    on_step_end: OnStepEnd | None = None
    """Called after each denoising step, on the engine's thread, so other rows wait for it. An error fails this row."""

    def videos(self) -> list[AnimationRequest]:
        """One request for each of `params.num_videos` videos, with seeds of their own: the first one's + 0, 1, 2 ..."""
        params = self.params
        first = seed_from_id(self.id) if params.seed is None else params.seed
        return [
            replace(self, params=params.model_copy(update={"num_videos": 1, "seed": seed_of_video(first, index)}))
            for index in range(params.num_videos)
        ]


@dataclass(frozen=True)
class PreparedRequest:
    """A request that an engine can run; only `pia_ray.prepare.prepare` makes one.

    It pickles, and its pictures have the size of the video, so it may be made in one process and submitted in another.
    The fields are those of `AnimationRequest`, and the pictures and arrays are checked.
    """

    image: Image.Image
    """RGB, of the video's size."""
    params: AnimationParams
    """Every knob, with the width, height and seed that are used."""
    id: str
    deadline_s: float | None
    end_image: Image.Image | None
    """RGB, of the video's size."""
    mask_image: Image.Image | None
    """Mode L, of the video's size."""
    ip_adapter_image: Image.Image | None
    """RGB, of its own size."""
    ip_adapter_image_embeds: np.ndarray[Any, Any] | None
    latents: np.ndarray[Any, Any] | None
    prompt_embeds: np.ndarray[Any, Any] | None
    negative_prompt_embeds: np.ndarray[Any, Any] | None
    output_type: OutputType
    scheduler_config: Mapping[str, Any] | None
    on_step_end: OnStepEnd | None

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the video, in px."""
        return self.image.size

    @property
    def seed(self) -> int:
        """The seed that is used."""
        assert self.params.seed is not None
        return self.params.seed


@dataclass(frozen=True)
class EncodedVideo:
    """A finished video file in memory."""

    content: bytes
    format: VideoFormat
    num_frames: int
    width: int
    height: int
    fps: int
    sha256: str

    @property
    def size_bytes(self) -> int:
        """Length of the file."""
        return len(self.content)


class Failure(Protocol):
    """The reason why a row failed: a `RowError`, or the part of it that the owner of a request may know."""

    @property
    def code(self) -> str:
        """As `PiaRayError.code`."""

    @property
    def message(self) -> str:
        """As `PiaRayError.message`."""

    @property
    def retryable(self) -> bool:
        """As `PiaRayError.retryable`."""


@dataclass(frozen=True)
class ResultRow:
    """One row of the results table; the fields are RESULTS_SCHEMA, in order. Unknown values are None."""

    id: str
    video_index: int
    status: Status
    error_code: str | None
    error_message: str | None
    retryable: bool | None
    attempts: int
    video_uri: str | None
    thumbnail_uri: str | None
    input_thumbnail_uri: str | None
    image_uri: str
    prompt: str | None
    seed: int
    width: int | None
    height: int | None
    num_frames: int | None
    fps: int | None
    duration_s: float | None
    size_bytes: int | None
    sha256: str | None
    input_sha256: str | None
    original_width: int | None
    original_height: int | None
    params: str
    """The resolved params as canonical JSON; seeds as strings."""
    work_key: str
    model: str
    run_id: str
    worker: str
    fetch_s: float | None
    animate_s: float | None
    publish_s: float | None
    gpu_s: float | None
    motion: float | None
    finished_at: datetime
    flags: str | None = None
    """By commas: `black_frames` and `frozen` of a suspicious video, and what was left out of its picture, such as
    `animated_input` and `icc_ignored`."""
    likeness: float | None = None
    likeness_min: float | None = None
    likeness_part: float | None = None
    flicker: float | None = None
    sharpness: float | None = None
    colour_shift: float | None = None
    stillness: float | None = None
    closure: float | None = None
    subject_similarity: float | None = None
    prompt_similarity: float | None = None
    """The numbers of a `Judgement`, with `motion`."""
    picture_index: int | None = None
    """As in `ManifestRow`."""
    accepted: bool | None = None
    """Whether the video meets the bounds that `accept` gave; None without bounds."""
    take: int | None = None
    """Number of the take whose video is published, from 0."""
    takes: str | None = None
    """The takes that were tried, as JSON: number, seed, numbers, `gpu_s`, `run_id` of each; `error` without a video."""

    @classmethod
    def succeeded(
        cls,
        *,
        id: str,  # noqa: A002 - the column's name
        work_key: str,
        image_uri: str,
        params: AnimationParams,
        model: str,
        run_id: str,
        worker: str,
        attempts: int,
        animate_s: float,
        gpu_s: float,
        judgement: Mapping[str, float | None],
        finished_at: datetime,
        video_index: int = 0,
        video_uri: str | None = None,
        thumbnail_uri: str | None = None,
        input_thumbnail_uri: str | None = None,
        size_bytes: int | None = None,
        sha256: str | None = None,
        input_sha256: str | None = None,
        original_width: int | None = None,
        original_height: int | None = None,
        fetch_s: float | None = None,
        flags: str | None = None,
        picture_index: int | None = None,
    ) -> ResultRow:
        """The row of a finished video.

        `params` are those that were used, with size and seed; `judgement` is a `Judgement` as a dict.
        """
        if params.seed is None:
            raise ValueError("the params of a finished video have a seed")
        numbers: dict[str, Any] = {name: judgement.get(name) for name in JUDGED}
        return cls(
            id=id,
            video_index=video_index,
            status=SUCCEEDED,
            error_code=None,
            error_message=None,
            retryable=None,
            attempts=attempts,
            video_uri=video_uri,
            thumbnail_uri=thumbnail_uri,
            input_thumbnail_uri=input_thumbnail_uri,
            image_uri=image_uri,
            prompt=params.prompt,
            seed=params.seed,
            width=params.width,
            height=params.height,
            num_frames=params.video_frames,
            fps=params.fps,
            duration_s=params.video_frames / params.fps,
            size_bytes=size_bytes,
            sha256=sha256,
            input_sha256=input_sha256,
            original_width=original_width,
            original_height=original_height,
            params=canonical_params(params),
            work_key=work_key,
            model=model,
            run_id=run_id,
            worker=worker,
            fetch_s=fetch_s,
            animate_s=animate_s,
            publish_s=None,
            gpu_s=gpu_s,
            finished_at=finished_at,
            flags=flags,
            **numbers,
            picture_index=picture_index,
        )

    @classmethod
    def failed(
        cls,
        error: Failure,
        *,
        id: str,  # noqa: A002 - the column's name
        work_key: str,
        image_uri: str,
        params: AnimationParams | None,
        model: str,
        run_id: str,
        worker: str,
        attempts: int,
        finished_at: datetime,
        video_index: int = 0,
        prompt: str | None = None,
        picture_index: int | None = None,
    ) -> ResultRow:
        """The row of a video that was not made; where cells are bad, `params` is None, and `prompt` may be known."""
        seed = seed_from_id(id) if params is None or params.seed is None else params.seed
        return cls(
            id=id,
            video_index=video_index,
            status=FAILED,
            error_code=error.code,
            error_message=error.message,
            retryable=error.retryable,
            attempts=attempts,
            video_uri=None,
            thumbnail_uri=None,
            input_thumbnail_uri=None,
            image_uri=image_uri,
            prompt=prompt if params is None else params.prompt,
            seed=seed,
            width=None if params is None else params.width,
            height=None if params is None else params.height,
            num_frames=None if params is None else params.video_frames,
            fps=None if params is None else params.fps,
            duration_s=None,
            size_bytes=None,
            sha256=None,
            input_sha256=None,
            original_width=None,
            original_height=None,
            params=canonical({} if prompt is None else {"prompt": prompt})
            if params is None
            else canonical_params(params),
            work_key=work_key,
            model=model,
            run_id=run_id,
            worker=worker,
            fetch_s=None,
            animate_s=None,
            publish_s=None,
            gpu_s=None,
            motion=None,
            finished_at=finished_at,
            picture_index=picture_index,
        )
