"""Webhooks of video jobs, sent to public https:// addresses only. The outbox says which are due."""

from __future__ import annotations

import json
import ssl
import time
from collections.abc import Callable, Sequence
from typing import Final

from pia_ray.online.video_jobs import VideoJob
from pia_ray.storage.addresses import Resolver, resolve_by_system
from pia_ray.webhooks import Poster

RETRY_DELAYS_S: Final = (5.0, 60.0, 600.0, 3600.0)
"""Seconds between the tries of one webhook; after the last one it is given up."""


class Webhooks:
    """Sends the events of video jobs, signed with `secret` (whsec_ and base64).

    `retry_delays_s` are the waits between tries. `allowed_networks`, `resolve` and `ssl_context` are as for `fetch`.

    Raises:
        ConfigError: the secret is not valid.
    """

    def __init__(
        self,
        secret: str,
        *,
        retry_delays_s: Sequence[float] = RETRY_DELAYS_S,
        allowed_networks: Sequence[str] = (),
        resolve: Resolver = resolve_by_system,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        self._poster = Poster(secret, allowed_networks=allowed_networks, resolve=resolve, ssl_context=ssl_context)
        self.retry_delays_s = tuple(retry_delays_s)

    def send(self, job: VideoJob) -> int:
        """The status of the answer to the event of the job's end; every try has the same id. Blocks for 5 s at most.

        Raises:
            FetchUnavailable: it did not answer 2xx; another try can succeed.
            FetchError: no other try can succeed.
        """
        if job.webhook_url is None or job.completed_at is None:
            raise ValueError(f"{job.id} has no webhook, or has not ended")
        return self._poster.post(job.webhook_url, event(job), message_id=event_id(job))

    def send_progress(self, job: VideoJob, *, before_body: Callable[[], None]) -> None:
        """Sends the event of a job in progress, once. Blocks for 5 s at most. `before_body` is as for `https.post`.

        Raises:
            FetchError: it was not delivered.
        """
        if job.webhook_url is None:
            raise ValueError(f"{job.id} has no webhook")
        message_id = f"{event_id(job)}_{job.revision}"
        content = {
            "id": message_id,
            "object": "event",
            "created_at": int(time.time()),
            "type": "video.in_progress",
            "data": {"id": job.id, "progress": job.progress},
        }
        self._poster.post(job.webhook_url, json.dumps(content).encode(), message_id=message_id, before_body=before_body)


def event_id(job: VideoJob) -> str:
    """The id of the event of an ended job, by which receivers recognise a repeated delivery.

    A job that was queued again has a new id for each end.
    """
    retry = f"_{job.retries}" if job.retries else ""
    return f"evt_{job.id.removeprefix('video_')}{retry}"


def event(job: VideoJob) -> bytes:
    """The body of the event in the format of the openai client."""
    content = {
        "id": event_id(job),
        "object": "event",
        "created_at": int(job.completed_at or 0),
        "type": f"video.{job.status}",
        "data": {"id": job.id},
    }
    return json.dumps(content).encode()
