"""Webhooks of video jobs: signed by the Standard Webhooks scheme, sent to public https:// addresses only.

The outbox says which are due. Source: the Standard Webhooks specification.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import ssl
import time
from collections.abc import Sequence
from typing import Final

from pia_ray.errors import ConfigError, FetchError, FetchUnavailable
from pia_ray.online.video_jobs import VideoJob
from pia_ray.storage import https

TIMEOUT_S: Final = 5.0
RETRY_DELAYS_S: Final = (5.0, 60.0, 600.0, 3600.0)
"""Seconds between the tries of one webhook; after the last one it is given up."""
_GONE: Final = 410


class Webhooks:
    """Sends the events `video.completed` and `video.failed`, signed with `secret` (whsec_ and base64).

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
        resolve: https.Resolver = https.resolve_by_system,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        self._key = _key_of(secret)
        self.retry_delays_s = tuple(retry_delays_s)
        self._allowed_networks = allowed_networks
        self._resolve = resolve
        self._ssl_context = ssl_context

    def send(self, job: VideoJob) -> None:
        """Sends the event of the job's end to its webhook; every try has the same id. Blocks for 5 s at most.

        Raises:
            FetchUnavailable: it did not answer 2xx; another try can succeed.
            FetchError: no other try can succeed.
        """
        if job.webhook_url is None or job.completed_at is None:
            raise ValueError(f"{job.id} has no webhook, or has not ended")
        body = event(job)
        status = https.post(
            job.webhook_url,
            body,
            headers={"Content-Type": "application/json", "User-Agent": "pia-ray", **self.headers(event_id(job), body)},
            timeout_s=TIMEOUT_S,
            allowed_networks=self._allowed_networks,
            resolve=self._resolve,
            ssl_context=self._ssl_context,
        )
        if status == _GONE:
            raise FetchError("The webhook's server answered 410, which means no more events.")
        if not 200 <= status < 300:
            raise FetchUnavailable(f"The webhook's server answered {status}.")

    def headers(self, message_id: str, body: bytes) -> dict[str, str]:
        """The headers that sign the body and its time, by which the receiver refuses forged and old events."""
        timestamp = str(int(time.time()))
        signed = hmac.new(self._key, f"{message_id}.{timestamp}.".encode() + body, hashlib.sha256).digest()
        return {
            "webhook-id": message_id,
            "webhook-timestamp": timestamp,
            "webhook-signature": f"v1,{base64.b64encode(signed).decode()}",
        }


def event_id(job: VideoJob) -> str:
    """The id of the event of an ended job, by which receivers recognise a repeated delivery."""
    return f"evt_{job.id.removeprefix('video_')}"


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


def _key_of(secret: str) -> bytes:
    try:
        key = base64.b64decode(secret.removeprefix("whsec_"), validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if len(key) < 16:
        raise ConfigError("webhook_secret must be whsec_ and the base64 of at least 16 random bytes, better 32")
    return key
