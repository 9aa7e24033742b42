"""GET and HEAD /v1/videos/{id}/content: the file of a completed video, and pictures of it."""

from __future__ import annotations

import asyncio
from typing import Annotated, Final, Literal

from fastapi import APIRouter, Query, Request, Response

from pia_ray.errors import Conflict
from pia_ray.media import video
from pia_ray.media.finish.posters import MIME as POSTER_MIME
from pia_ray.online.http import error_responses
from pia_ray.online.http.downloads import delivery
from pia_ray.online.http.middleware import Owner
from pia_ray.online.video_jobs import JobStore, VideoJob

Variant = Literal["video", "thumbnail", "spritesheet", "poster"]
Redirect = Annotated[
    Literal["0", "1"], Query(description="0: the bytes come from the endpoint itself, also where the file is on S3.")
]
_MIME: Final = {str(kind): mime for kind, mime in [*POSTER_MIME.items(), *video.MIME.items()]}
"""By the extension of the file."""


def video_content_routes(jobs: JobStore, *, prefix: str = "/v1") -> APIRouter:
    """The routes of the content of a video."""
    router = APIRouter(prefix=f"{prefix}/videos", tags=["videos"])

    @router.get(
        "/{video_id}/content",
        operation_id="download_video",
        summary="The video's file, or pictures of it",
        response_class=Response,
        responses={
            **error_responses.responses(404, 409),
            200: {
                "description": "The file.",
                "content": {mime: {} for mime in (*video.MIME.values(), *POSTER_MIME.values())},
            },
            206: {"description": "The part of the Range header."},
            302: {"description": "A link to the file, which is valid for 15 minutes."},
            416: {"description": "The file has no such part."},
        },
    )
    @router.head(
        "/{video_id}/content",
        operation_id="describe_video_content",
        summary="Length and type of the content",
        response_class=Response,
        responses=error_responses.responses(404, 409),
    )
    async def content(
        request: Request, owner: Owner, video_id: str, variant: Variant = "video", redirect: Redirect = "1"
    ) -> Response:
        job = await asyncio.to_thread(jobs.get, owner, video_id)
        uri = _uri_of(job, variant)
        ext = uri.rpartition(".")[2]
        return await delivery(
            uri,
            method=request.method,
            media_type=_MIME[ext],
            filename=f"{job.id}-{variant}.{ext}",
            by_link=redirect == "1",
        )

    return router


def _uri_of(job: VideoJob, variant: Variant) -> str:
    """The URI of that file of the job.

    Raises:
        Conflict: the job has no such file.
    """
    if job.result is None:
        raise Conflict(f"video {job.id} has no content, because it is {job.status}")
    uri = {
        "video": job.result.video_uri,
        "thumbnail": job.result.thumbnail_uri,
        "spritesheet": job.result.spritesheet_uri,
        "poster": job.result.poster_uri,
    }[variant]
    if uri is None:
        raise Conflict(f"video {job.id} has no poster, because it was created without the field poster (jpg, webp)")
    return uri
