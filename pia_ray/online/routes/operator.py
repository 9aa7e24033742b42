"""The operator's page at /operator and its calls: the queue by owner, open and failed jobs, retry and cancel.

The routes exist where the endpoint has an `operator_key`. The page itself holds nothing and needs no key; its calls
need that one. Owners are shown by their names in logs, which tell nothing of their keys.
"""

from __future__ import annotations

import asyncio
from importlib.resources import files
from typing import Any, Final, Literal

from fastapi import APIRouter, Response
from pydantic import BaseModel

from pia_ray.online.routes import page
from pia_ray.online.routes.videos import VideoError, WebhookObject, webhook_object
from pia_ray.online.video_jobs import JobStore, VideoJob
from pia_ray.online.video_jobs.dispatcher import Dispatcher

OPERATOR: Final = "/operator"


class JobSummary(BaseModel):
    """A job as the operator sees it."""

    id: str
    owner: str
    status: Literal["queued", "in_progress", "completed", "failed"]
    is_cancelled: bool
    progress: int
    model: str
    prompt: str
    batch_id: str | None
    created_at: float
    started_at: float | None
    completed_at: float | None
    attempt: int
    retries: int
    claimed_by: str | None
    error: VideoError | None
    webhook: WebhookObject | None

    @staticmethod
    def of(job: VideoJob) -> JobSummary:
        """The summary of a job."""
        values: dict[str, Any] = {
            **dict(job),
            "is_cancelled": job.cancelled,
            "claimed_by": job.lease_owner,
            "error": None if job.error is None else VideoError(code=job.error.code, message=job.error.message),
            "webhook": webhook_object(job),
        }
        return JobSummary.model_validate({name: values[name] for name in JobSummary.model_fields})


class OwnerSummary(BaseModel):
    """The open jobs of an owner."""

    owner: str
    num_jobs: int
    num_lines: int


class OperatorJobs(BaseModel):
    """The jobs of all owners."""

    now: float
    owners: list[OwnerSummary]
    has_more: bool
    open: list[JobSummary]
    failed: list[JobSummary]


def operator_routes(jobs: JobStore, dispatcher: Dispatcher) -> APIRouter:
    """The routes. The OpenAPI document leaves them out, because it is the same for every endpoint."""
    routes = APIRouter(prefix=OPERATOR, include_in_schema=False)
    content = files(page).joinpath("operator.html").read_bytes()
    headers = {"content-type": "text/html; charset=utf-8", "content-security-policy": page.POLICY}

    @routes.get("")
    async def operator_page() -> Response:
        return Response(content, headers=headers)

    @routes.get("/jobs")
    async def operator_jobs() -> OperatorJobs:
        found = await asyncio.to_thread(jobs.overview.read)
        return OperatorJobs(
            now=await asyncio.to_thread(jobs.now),
            owners=[OwnerSummary(**vars(each)) for each in found.owners],
            has_more=found.has_more,
            open=[JobSummary.of(job) for job in found.open],
            failed=[JobSummary.of(job) for job in found.failed],
        )

    @routes.post("/jobs/{owner}/{video_id}/retry")
    async def retry(owner: str, video_id: str) -> JobSummary:
        job = await asyncio.to_thread(jobs.overview.retry, owner, video_id)
        dispatcher.wake()
        return JobSummary.of(job)

    @routes.post("/jobs/{owner}/{video_id}/cancel")
    async def cancel(owner: str, video_id: str) -> JobSummary:
        job = await asyncio.to_thread(jobs.cancel, owner, video_id)
        dispatcher.recheck(video_id)
        return JobSummary.of(job)

    return routes
