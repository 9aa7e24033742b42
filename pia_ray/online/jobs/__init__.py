"""Video jobs: one JSON document per job in storage, so that any replica answers for any job and a restart loses none.

`document` is what a job says, `names` where everything of it lies, `documents` changes it by compare-and-swap; `store`
is what owners do, `queue` what dispatchers do, `outbox` what becomes of webhooks. Local storage is for one host, S3 for
many; it must have conditional writes. Calls block: asyncio programs make them in threads. Knows no HTTP and no Ray.
"""

from pia_ray.online.jobs.document import Entry, Fault, Page, Revision, VideoJob, VideoResult, public_fault
from pia_ray.online.jobs.outbox import Outbox
from pia_ray.online.jobs.queue import JobQueue
from pia_ray.online.jobs.store import JobStore

__all__ = [
    "Entry",
    "Fault",
    "JobQueue",
    "JobStore",
    "Outbox",
    "Page",
    "Revision",
    "VideoJob",
    "VideoResult",
    "public_fault",
]
