"""Makes video jobs of requests: of a single video, a remix, a line of a batch. Knows no routes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from pia_ray.config.knobs import REFERENCE_KNOBS
from pia_ray.config.serve import ServeConfig
from pia_ray.errors import BadParameter, Conflict, RowError
from pia_ray.online.files import FileStore
from pia_ray.online.rendering.renderer import BATCH_LINE, VIDEO_JOB
from pia_ray.online.requests.acceptance import fields_of
from pia_ray.online.requests.aliases import IMAGE_FIELDS
from pia_ray.online.requests.request_reader import Form, FormReader
from pia_ray.online.usage import Amounts, Usage
from pia_ray.online.video_jobs import JobStore, VideoJob
from pia_ray.online.video_jobs.document import WebhookEvent
from pia_ray.online.video_jobs.webhook_fields import webhook_of

_REMIXED: Final = frozenset({*IMAGE_FIELDS, *REFERENCE_KNOBS})


@dataclass(frozen=True)
class LineRequest:
    """The request of a batch's line for a video job."""

    owner: str
    batch_id: str
    body: Mapping[str, Any]
    idempotency_key: str
    job_id: str | None = None
    """The id of its job; None where a record under the key has it."""


class JobCreator:
    """Makes video jobs of requests."""

    def __init__(
        self,
        config: ServeConfig,
        *,
        jobs: JobStore,
        files: FileStore,
        reader: FormReader,
        usage: Usage,
        pace: Callable[[], float] = lambda: 10.0,
    ) -> None:
        """`pace` estimates the seconds until a job of an owner with many of them ends."""
        self._config = config
        self._jobs = jobs
        self._files = files
        self._reader = reader
        self._usage = usage
        self._pace = pace

    async def create(
        self, owner: str, fields: Mapping[str, object], *, idempotency_key: str | None, retry_count: int
    ) -> VideoJob:
        """The job of a request for one video.

        Raises:
            RowError: a field is wrong, or a picture cannot be fetched or used.
            Busy: the owner has the maximum of open jobs.
        """
        return await self._create(
            await self._read(owner, fields),
            VIDEO_JOB,
            owner=owner,
            idempotency_key=idempotency_key,
            retry_count=retry_count,
            max_open=self._config.max_jobs_per_key,
        )

    async def remix(
        self,
        owner: str,
        video_id: str,
        fields: Mapping[str, object],
        *,
        idempotency_key: str | None,
        retry_count: int,
    ) -> VideoJob:
        """The job of a video of the same picture, model and seed, with another prompt or other knobs.

        Raises:
            JobNotFound: there is no such video.
            Conflict: it is not completed.
            RowError, Busy: as `create`.
        """
        source = await asyncio.to_thread(self._jobs.get, owner, video_id)
        if source.result is None:
            raise Conflict(f"video {source.id} is {source.status}: only a completed video can be remixed")
        for name in fields:
            if name in _REMIXED:
                raise BadParameter(f"{name} is that of the remixed video and cannot be changed: make a new video", name)
        if "prompt" not in fields:
            raise BadParameter("prompt is missing: say what is to change", "prompt")
        request = await asyncio.to_thread(self._jobs.request, source)
        kept: dict[str, object] = {
            name: value
            for name, value in source.params.model_dump(exclude_unset=True).items()
            if name not in REFERENCE_KNOBS and name != "style"
        }
        if "size" in fields:
            kept = {name: value for name, value in kept.items() if name not in ("width", "height")}
        if "seconds" in fields:
            kept.pop("num_frames", None)
        seed = source.result.params.seed
        kept |= fields_of(source.policy)
        given = {"model": source.model, "format": source.format, "seed": seed, **kept, **request.inputs}
        return await self._create(
            await self._read(owner, {**given, "image": request.image, **fields}),
            VIDEO_JOB,
            owner=owner,
            remixed_from_video_id=source.id,
            idempotency_key=idempotency_key,
            retry_count=retry_count,
            max_open=self._config.max_jobs_per_key,
        )

    async def create_line(self, line: LineRequest) -> VideoJob:
        """The job of a batch's line, the same one at every call. It does not count as an open job of the owner.

        Raises:
            RowError: as `create`.
            QuotaExceeded: the owner has used up a quota.
        """
        self._usage.check(line.owner)
        self._usage.add(line.owner, Amounts(num_requests=1))
        try:
            return await self._create(
                await self._read(line.owner, line.body, is_line=True),
                BATCH_LINE,
                owner=line.owner,
                batch_id=line.batch_id,
                idempotency_key=line.idempotency_key if line.job_id is None else None,
                job_id=line.job_id,
            )
        except RowError as error:
            if error.retryable:  # its next try counts
                self._usage.add(line.owner, Amounts(num_requests=-1))
            raise

    async def _create(
        self,
        read: tuple[Form, str | None, tuple[WebhookEvent, ...]],
        priority: int,
        *,
        owner: str,
        idempotency_key: str | None,
        retry_count: int = 0,
        max_open: int | None = None,
        batch_id: str | None = None,
        job_id: str | None = None,
        remixed_from_video_id: str | None = None,
    ) -> VideoJob:
        form, webhook_url, webhook_events = read
        job = await asyncio.to_thread(
            partial(
                self._jobs.create,
                form.request("", deadline_s=None, priority=priority, default_format="mp4"),
                owner=owner,
                model=form.model,
                seconds=form.seconds,
                size=form.size,
                webhook_url=webhook_url,
                webhook_events=webhook_events,
                remixed_from_video_id=remixed_from_video_id,
                batch_id=batch_id,
                job_id=job_id,
                idempotency_key=idempotency_key,
                retry_count=retry_count,
                max_open=max_open,
                open_s=self._pace(),
            )
        )
        self._usage.add(owner, Amounts(num_bytes=sum(map(len, (form.image, *form.inputs.values())))))
        return job

    async def _read(
        self, owner: str, fields: Mapping[str, object], *, is_line: bool = False
    ) -> tuple[Form, str | None, tuple[WebhookEvent, ...]]:
        given = {name: value for name, value in fields.items() if value is not None}
        webhook_url, events = webhook_of(given, is_signed=self._config.webhook_secret is not None)
        for name in (*IMAGE_FIELDS, *REFERENCE_KNOBS):
            value = given.get(name)
            if isinstance(value, dict) and set(value) == {"file_id"}:
                if not isinstance(value["file_id"], str):
                    raise BadParameter(f"{name}: file_id must be text", name)
                given[name] = await asyncio.to_thread(self._files.read, owner, value["file_id"])
        return await self._reader.parse(given, owner=owner, is_line=is_line), webhook_url, events
