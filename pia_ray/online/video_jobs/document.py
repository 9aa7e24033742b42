"""The document of a video job."""

from __future__ import annotations

import math
from typing import Any, Final, Literal

from pydantic import Field, field_serializer

from pia_ray.config.knob_types import VideoFormat
from pia_ray.config.knobs import AnimationParams
from pia_ray.errors import JobConflict, JobNotFound
from pia_ray.online.documents.document import Document, Index, Kind
from pia_ray.online.public_errors import PublicError
from pia_ray.online.rendering.renderer import FinishedVideo
from pia_ray.takes import NO_POLICY, Policy

Status = Literal["queued", "in_progress", "completed", "failed"]

WebhookEvent = Literal["video.completed", "video.failed", "video.in_progress"]
"""Types of the events that a webhook may get, each named after a status."""

END_EVENTS: Final[tuple[WebhookEvent, ...]] = ("video.completed", "video.failed")
"""The events of a webhook whose request names none."""


class VideoResult(FinishedVideo):
    """The finished video of a job, and where its files are."""

    video_uri: str
    thumbnail_uri: str
    spritesheet_uri: str
    poster_uri: str | None = None


class VideoJob(Document):
    """One video job."""

    status: Status = "queued"
    started_at: float | None = None
    """Time of the first step of the latest attempt."""
    completed_at: float | None = None
    """Time at which the job completed or failed."""
    expires_at: float | None = None
    """Time at which the document is deleted; set when the job ends."""
    model: str
    """The model's name in the request."""
    prompt: str
    seconds: str
    """Length of the video, as text."""
    size: str
    """`<width>x<height>`."""
    progress: int = Field(0, ge=0, le=100)
    """Percent of the denoising steps done; 100 when completed."""
    eta_at: float | None = None
    """Estimated time of its completion, once it is in progress."""
    error: PublicError | None = None
    cancelled: bool = False
    """Whether its owner cancelled it; its error may say `cancelled` also where an engine shut down."""
    params: AnimationParams
    """As in the request; which knobs were given is kept."""
    format: VideoFormat = "mp4"
    inputs: dict[str, str] = Field(default_factory=dict)
    """URIs of the request's files: `image`, and those of knobs by their names."""
    result: VideoResult | None = None
    remixed_from_video_id: str | None = None
    batch_id: str | None = None
    priority: int = Field(ge=0, le=9)
    """As that of a RenderRequest: the least is first."""
    policy: Policy = NO_POLICY
    record: str
    """Name of the record by which the same request finds it again."""
    webhook_url: str | None = None
    webhook_events: tuple[WebhookEvent, ...] = END_EVENTS
    webhook_state: Literal["none", "pending", "delivered", "failed"] = "none"
    webhook_attempts: int = 0
    webhook_error: str | None = None
    """Code of the error of the latest try; None where that was delivered."""
    webhook_status: int | None = None
    """HTTP status that the receiver answered to the latest try, if it answered one."""
    attempt: int = 0
    """Attempts begun since it was queued, without those given back."""
    retries: int = 0
    """Times that an operator queued it again after it had failed."""
    not_before: float = 0.0
    """Time before which no attempt begins."""
    lease_owner: str | None = None
    """The dispatcher that has claimed it, or that delivers its webhook."""
    lease_until: float = 0.0

    @field_serializer("params")
    def _given_params(self, params: AnimationParams) -> dict[str, Any]:
        return params.model_dump(mode="json", exclude_unset=True)

    @property
    def ended(self) -> bool:
        """Whether it has completed or failed."""
        return self.status in ("completed", "failed")

    def wants(self, status: str) -> bool:
        """Whether its webhook gets the event of that status."""
        return self.webhook_url is not None and f"video.{status}" in self.webhook_events

    @property
    def claimable_at(self) -> float:
        """Time from which a dispatcher may claim it; infinite once it has ended."""
        return math.inf if self.ended else max(self.not_before, self.lease_until)


VIDEO_JOBS: Final = Kind(
    name="video",
    model=VideoJob,
    folder="jobs",
    expires_at=lambda job: job.expires_at,
    id_bytes=16,
    owner_digits=16,
    not_found=JobNotFound,
    conflict=JobConflict,
)

QUEUE: Final = Index[VideoJob]("queue", lambda job: None if job.ended else job.priority, digits=1, by_owner=True)
"""Jobs that have not ended, by priority, owner and age."""

_LAST_SECOND: Final = 10**12 - 1

FAILED: Final = Index[VideoJob](
    "failed",
    lambda job: _LAST_SECOND - int(job.completed_at or 0.0) if job.status == "failed" and not job.cancelled else None,
    digits=12,
)
"""Jobs that failed by themselves, the latest first, for operators."""

WEBHOOKS: Final = Index[VideoJob](
    "webhooks", lambda job: int(job.not_before) if job.webhook_state == "pending" else None, digits=12, idle_s=30.0
)
"""Ended jobs whose webhook is not settled, by the second in which it is due. Entries of 0.1.0 have no rank."""
