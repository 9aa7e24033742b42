"""Video jobs: a JSON document per job in storage, so that every replica answers for every job and a restart loses none.

`store` is for owners, `queue` for dispatchers, `webhook_outbox` for senders of webhooks. Local storage is for one host,
S3 for many; it must have conditional writes. Calls block: asyncio programs make them in threads. Knows no HTTP, no Ray.
"""

from pia_ray.online.public_errors import PublicError, public_error
from pia_ray.online.video_jobs.document import VideoJob, VideoResult
from pia_ray.online.video_jobs.queue import JobQueue
from pia_ray.online.video_jobs.store import JobStore
from pia_ray.online.video_jobs.webhook_outbox import WebhookOutbox

__all__ = ["JobQueue", "JobStore", "PublicError", "VideoJob", "VideoResult", "WebhookOutbox", "public_error"]
