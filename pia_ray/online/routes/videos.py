"""/v1/videos in the wire format of the OpenAI videos API: create, retrieve, list, delete, remix, cancel."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal
from urllib.parse import urlsplit

from fastapi import APIRouter, Header, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field, computed_field

from pia_ray.config.knobs import REFERENCE_KNOBS
from pia_ray.online.http import error_responses
from pia_ray.online.http.middleware import Owner
from pia_ray.online.http.pagination import Listed, Listing, PageQuery
from pia_ray.online.http.wire_types import UnixTime, VideoDescription, wire_params
from pia_ray.online.requests import openapi
from pia_ray.online.requests.aliases import IMAGE_FIELDS
from pia_ray.online.requests.request_reader import FormReader
from pia_ray.online.video_jobs import JobStore, VideoJob, webhook_fields
from pia_ray.online.video_jobs.creation import JobCreator
from pia_ray.online.video_jobs.dispatcher import Dispatcher, Outlook

IdempotencyKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        min_length=1,
        max_length=255,
        description="Requests with the same key make one video.",
    ),
]
RetryCount = Annotated[
    str | None, Header(alias="x-stainless-retry-count", description="Sent by the openai clients.", max_length=20)
]


class VideoError(BaseModel):
    """The error of a failed video."""

    model_config = ConfigDict(from_attributes=True)

    code: str
    message: str


class WebhookObject(BaseModel):
    """The delivery of a video's webhook."""

    host: str = Field(description="Host of the URL, whose path and query are not shown.")
    events: list[str] = Field(description="The events that it gets.")
    state: Literal["waiting", "delivered", "failed", "none"] = Field(
        description="waiting for the end of the job or for another try; delivered; failed once it is given up; none "
        "where the job has ended in a way whose event is not among `events`."
    )
    attempts: int = Field(description="Tries until now.")
    last_status: int | None = Field(None, description="HTTP status of the answer to the latest try, if it had one.")
    last_error: str | None = Field(None, description="Code of the error of the latest try.")
    next_attempt_at: UnixTime | None = Field(None, description="When the next try is due, once the job has ended.")


class VideoObject(VideoDescription, Listed):
    """A video job in the format of the openai clients, with the description of the finished video and more."""

    model_config = ConfigDict(
        protected_namespaces=(),
        json_schema_extra={
            "example": {
                "id": "video_064c1b9e8a7f50f3c1d2e3a4b5968778695a4b3c2d1e0f",
                "object": "video",
                "created_at": 1767225600,
                "status": "in_progress",
                "model": "demo",
                "progress": 40,
                "seconds": "2",
                "size": "512x384",
                "prompt": "clouds drift over the lake",
                "format": "mp4",
                "params": {"prompt": "clouds drift over the lake", "motion_scale": 1},
            }
        },
    )

    object: Literal["video"] = "video"
    created_at: UnixTime = Field(description="Seconds since 1970, UTC, as all times here.")
    completed_at: UnixTime | None = Field(None, description="When it completed or failed.")
    expires_at: UnixTime | None = Field(None, description="When the video is deleted.")
    status: Literal["queued", "in_progress", "completed", "failed"]
    model: str = Field(description="The model's name in the request. Its version is `model_version`.")
    progress: int = Field(ge=0, le=100, description="Percent of the denoising steps done.")
    seconds: str = Field(description="Duration of the video.")
    size: str = Field(description="WIDTHxHEIGHT.")
    prompt: str
    error: VideoError | None = Field(None, description='A cancelled job has failed with the code "cancelled".')
    remixed_from_video_id: str | None = None
    format: str
    params: dict[str, Any] = Field(
        description="The given knobs; once completed, all knobs. The seed is text, because it has 64 bits."
    )
    batch_id: str | None = None
    queue_position: int | None = Field(None, description="Jobs before it, while it is queued.")
    estimated_completion_at: UnixTime | None = Field(None, description="Estimated time of its completion.")
    webhook: WebhookObject | None = Field(None, description="Null without a webhook_url.")

    @computed_field(description="The same as `gpu_s`.")
    def gpu_seconds(self) -> float | None:
        """The same as `gpu_s`."""
        return self.gpu_s


class VideoList(Listing[VideoObject]):
    """Part of the list of videos."""


class VideoListQuery(PageQuery):
    """The query parameters of the list of videos."""

    limit: int = Field(20, ge=1, le=100)
    order: Literal["asc", "desc"] = Field("desc", description="By the time of creation.")


class VideoDeleted(BaseModel):
    """The answer to a deletion."""

    id: str
    object: Literal["video.deleted"] = "video.deleted"
    deleted: Literal[True] = True


def video_object(job: VideoJob, outlook: Outlook | None = None, *, now: float = 0.0) -> VideoObject:
    """The video object of a job, with its expected course if `outlook` is given.

    `now` is the time by the clock of the jobs' store, as all times of the object.
    """
    made = job.result
    left_s = None if outlook is None or job.ended else outlook.eta_s
    return VideoObject.model_validate(
        {
            **dict(job),
            **({} if made is None else dict(made)),
            "params": wire_params(job.params, only_given=True)
            if made is None
            else wire_params(made.params, only_given=False),
            "queue_position": None if outlook is None or job.status != "queued" else outlook.position,
            "estimated_completion_at": None if left_s is None else now + left_s + 0.5,
            "webhook": webhook_object(job),
        }
    )


def webhook_object(job: VideoJob) -> WebhookObject | None:
    """The delivery of a job's webhook; None without one."""
    if job.webhook_url is None:
        return None
    return WebhookObject(
        host=urlsplit(job.webhook_url).hostname or "",
        events=list(job.webhook_events),
        state=_webhook_state(job),
        attempts=job.webhook_attempts,
        last_status=job.webhook_status if job.webhook_attempts else None,
        last_error=job.webhook_error if job.webhook_attempts else None,
        next_attempt_at=int(max(job.not_before, job.completed_at or 0.0)) if job.webhook_state == "pending" else None,
    )


def _webhook_state(job: VideoJob) -> Literal["waiting", "delivered", "failed", "none"]:
    if job.webhook_state == "pending" or (job.webhook_state == "none" and not job.ended):
        return "waiting"
    return job.webhook_state


def video_routes(
    *, creator: JobCreator, jobs: JobStore, reader: FormReader, dispatcher: Dispatcher, prefix: str = "/v1"
) -> APIRouter:
    """The routes below /v1/videos, without those of contents and events."""
    router = APIRouter(prefix=f"{prefix}/videos", tags=["videos"])
    services = _Services(creator, jobs, reader, dispatcher)
    _add_resource(router, services)
    _add_actions(router, services)
    return router


@dataclass(frozen=True)
class _Services:
    """The services that the routes call."""

    creator: JobCreator
    jobs: JobStore
    reader: FormReader
    dispatcher: Dispatcher

    async def answer(self, job: VideoJob, response: Response) -> VideoObject:
        """The video object of a job; a header of the response says when to poll a job that has not ended."""
        outlook = await self.dispatcher.outlook(job)
        if not job.ended:
            response.headers["openai-poll-after-ms"] = str(outlook.poll_after_ms)
        return video_object(job, outlook, now=await asyncio.to_thread(self.jobs.now))


def _add_resource(router: APIRouter, services: _Services) -> None:
    """Adds the routes that create, list, retrieve and delete videos."""
    jobs, dispatcher = services.jobs, services.dispatcher

    @router.post(
        "",
        operation_id="create_video",
        summary="Make a video",
        responses=error_responses.responses(404, 409, 415, 502),
        openapi_extra={"requestBody": _create_body()},
    )
    async def create(
        request: Request,
        response: Response,
        owner: Owner,
        idempotency_key: IdempotencyKey = None,
        retry_count: RetryCount = None,
    ) -> VideoObject:
        fields = await services.reader.fields(request)
        job = await services.creator.create(
            owner, fields, idempotency_key=idempotency_key, retry_count=_count(retry_count)
        )
        dispatcher.wake()
        return await services.answer(job, response)

    @router.get("", operation_id="list_videos", summary="List videos", responses=error_responses.responses(404))
    async def list_videos(owner: Owner, page: Annotated[VideoListQuery, Query()]) -> VideoList:
        found = await asyncio.to_thread(lambda: jobs.list(owner, after=page.after, limit=page.limit, order=page.order))
        return VideoList.of([video_object(job) for job in found.documents], more=found.has_more)

    @router.get(
        "/{video_id}",
        operation_id="retrieve_video",
        summary="Retrieve a video",
        responses=error_responses.responses(404),
    )
    async def retrieve(owner: Owner, response: Response, video_id: str) -> VideoObject:
        return await services.answer(await asyncio.to_thread(jobs.get, owner, video_id), response)

    @router.delete(
        "/{video_id}",
        operation_id="delete_video",
        summary="Delete a video",
        responses=error_responses.responses(404),
    )
    async def delete(owner: Owner, video_id: str) -> VideoDeleted:
        await asyncio.to_thread(jobs.delete, owner, video_id)
        dispatcher.recheck(video_id)
        return VideoDeleted(id=video_id)


def _add_actions(router: APIRouter, services: _Services) -> None:
    """Adds the routes that act on a video: cancel it, send its webhook again, remix it."""
    jobs, dispatcher = services.jobs, services.dispatcher

    @router.post(
        "/{video_id}/cancel",
        operation_id="cancel_video",
        summary="Cancel a video that is not completed",
        responses=error_responses.responses(404, 409),
    )
    async def cancel(owner: Owner, response: Response, video_id: str) -> VideoObject:
        job = await asyncio.to_thread(jobs.cancel, owner, video_id)
        dispatcher.recheck(video_id)
        return await services.answer(job, response)

    @router.post(
        "/{video_id}/webhook/redeliver",
        operation_id="redeliver_webhook",
        summary="Send the webhook of an ended video again",
        responses=error_responses.responses(404, 409),
    )
    async def redeliver(owner: Owner, response: Response, video_id: str) -> VideoObject:
        """Sends the event again under its id, with all its tries, also where it was delivered or is given up."""
        job = await asyncio.to_thread(jobs.outbox.redeliver, owner, video_id)
        dispatcher.recheck(video_id)
        return await services.answer(job, response)

    @router.post(
        "/{video_id}/remix",
        operation_id="remix_video",
        summary="Make another video of the same picture",
        responses=error_responses.responses(404, 409, 415),
        openapi_extra={"requestBody": _remix_body()},
    )
    async def remix(
        request: Request,
        response: Response,
        owner: Owner,
        video_id: str,
        idempotency_key: IdempotencyKey = None,
        retry_count: RetryCount = None,
    ) -> VideoObject:
        fields = await services.reader.fields(request)
        job = await services.creator.remix(
            owner,
            video_id,
            fields,
            idempotency_key=idempotency_key,
            retry_count=_count(retry_count),
        )
        dispatcher.wake()
        return await services.answer(job, response)


def _create_body() -> dict[str, Any]:
    body = openapi.request_body()
    for content in body["content"].values():
        shape = content["schema"]
        shape["properties"] |= webhook_fields.SHAPES
        for name in (*IMAGE_FIELDS, *REFERENCE_KNOBS):
            field = shape["properties"][name]
            field["anyOf"] = [*field["anyOf"], _BY_FILE_ID]
        if "patternProperties" in shape:
            shape["patternProperties"][rf"^({'|'.join((*IMAGE_FIELDS, *REFERENCE_KNOBS))})\[file_id\]$"] = {
                "type": "string"
            }
            shape["patternProperties"][r"^webhook_events\[\]$"] = {
                "type": "string",
                "enum": list(webhook_fields.EVENTS),
            }
            shape["anyOf"] += [{"required": [f"{name}[file_id]"]} for name in IMAGE_FIELDS]
    return body


def _remix_body() -> dict[str, Any]:
    """The body of a new video without its files, which are those of the remixed one."""
    found = openapi.body_schema(files=False)
    left_out = {*IMAGE_FIELDS, *REFERENCE_KNOBS}
    properties = {name: each for name, each in found["properties"].items() if name not in left_out}
    shape = {
        "type": "object",
        "required": ["prompt"],
        "properties": properties | webhook_fields.SHAPES,
        "additionalProperties": False,
    }
    example = {"prompt": "the same lake under a storm"}
    return {"required": True, "content": {"application/json": {"schema": shape, "example": example}}}


_BY_FILE_ID: Final[dict[str, Any]] = {
    "type": "object",
    "required": ["file_id"],
    "properties": {"file_id": {"type": "string", "description": "A picture of /v1/files."}},
    "additionalProperties": False,
}


def _count(text: str | None) -> int:
    return int(text) if text is not None and text.isascii() and text.isdigit() else 0
