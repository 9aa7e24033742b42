"""A row of the results: the makers of a finished video's row and of a failed one's, and the fields' meaning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, Literal, Protocol

from pia_ray.config.acceptance import NUMBERS
from pia_ray.config.knobs import AnimationParams
from pia_ray.config.resolving import canonical, canonical_params, seed_from_id
from pia_ray.config.timeline import timeline_of

Status = Literal["succeeded", "failed"]
SUCCEEDED: Final = "succeeded"
FAILED: Final = "failed"

APPROVED: Final = "approved"
REJECTED: Final = "rejected"
"""The verdicts of a person on a video, in `review`."""

JUDGED: Final = tuple(NUMBERS)
"""The numbers of a `Judgement`, which are columns of the results."""


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
    """By commas: `black_frames`, `frozen` and `nsfw` of a suspicious video, and what was left out of its picture, such
    as `animated_input` and `icc_ignored`."""
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
    review: str | None = None
    """The last verdict of a person: `approved` or `rejected`."""
    review_note: str | None = None
    """The note that came with it."""
    review_take: int | None = None
    """The take that it is about. Where it is not `take`, the row has been taken again since."""
    nsfw: bool | None = None
    """Whether the safety checker found a frame that is not safe; None where `safety` is off."""
    poster_uri: str | None = None
    """The best frame, at the size of the video; None where `poster` asks for none."""

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
        width: int,
        height: int,
        video_index: int = 0,
        video_uri: str | None = None,
        thumbnail_uri: str | None = None,
        input_thumbnail_uri: str | None = None,
        poster_uri: str | None = None,
        size_bytes: int | None = None,
        sha256: str | None = None,
        input_sha256: str | None = None,
        original_width: int | None = None,
        original_height: int | None = None,
        fetch_s: float | None = None,
        flags: str | None = None,
        picture_index: int | None = None,
        accepted: bool | None = None,
        take: int | None = None,
        takes: str | None = None,
        nsfw: bool | None = None,
    ) -> ResultRow:
        """The row of a finished video.

        `params` are those that were used, with size and seed; `width` and `height` are those of the file, and
        `judgement` is a `Judgement` as a dict.
        """
        if params.seed is None:
            raise ValueError("the params of a finished video have a seed")
        numbers: dict[str, Any] = {name: judgement.get(name) for name in JUDGED}
        timeline = timeline_of(params)
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
            width=width,
            height=height,
            num_frames=timeline.num_frames,
            fps=timeline.fps,
            duration_s=timeline.duration_s,
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
            accepted=accepted,
            take=take,
            takes=takes,
            nsfw=nsfw,
            poster_uri=poster_uri,
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
        timeline = None if params is None else timeline_of(params)
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
            num_frames=None if timeline is None else timeline.num_frames,
            fps=None if timeline is None else timeline.fps,
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
