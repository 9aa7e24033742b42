"""Video jobs: one JSON document per job in storage, so that any replica answers for any job and a restart loses none.

`document` is what a job says, `names` where everything of it lies, `documents` changes it by compare-and-swap; `store`
is what owners do, `queue` what dispatchers do, `outbox` what becomes of webhooks. Local storage is for one host, S3 for
many; it must have conditional writes. Calls block: asyncio programs make them in threads. Knows no HTTP and no Ray.
"""

from pia_ray.online.public_errors import PublicError, public_error
from pia_ray.online.video_jobs.document import Entry, Page, Revision, VideoJob, VideoResult
from pia_ray.online.video_jobs.queue import JobQueue
from pia_ray.online.video_jobs.store import JobStore
from pia_ray.online.video_jobs.webhook_outbox import Outbox

__all__ = [
    "Entry",
    "JobQueue",
    "JobStore",
    "Outbox",
    "Page",
    "PublicError",
    "Revision",
    "VideoJob",
    "VideoResult",
    "public_error",
]
