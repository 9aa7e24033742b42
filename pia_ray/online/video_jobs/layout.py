"""Where everything of a video job lies below the storage prefix. Pure functions.

Jobs and queue entries sort by time of creation. Nothing that a caller chooses enters a path: owners and keys are
hashed, ids are checked.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from typing import Final

from pia_ray import storage
from pia_ray.errors import JobNotFound
from pia_ray.online.video_jobs.document import Entry
from pia_ray.storage import ObjectStat

_ID: Final = re.compile(r"video_[0-9a-f]{14}[0-9a-f]{32}")
_ENTRY: Final = re.compile(r"(?:(?P<rank>\d+)-)?(?P<id>video_[0-9a-f]{46})-(?P<folder>[0-9a-f]{16})")


def new_id(created_us: int) -> str:
    """An id that sorts by the time, in microseconds since 1970, and holds 128 random bits."""
    return f"video_{created_us:014x}{secrets.token_hex(16)}"


def checked_id(job_id: str) -> str:
    """The id itself.

    Raises:
        JobNotFound: it cannot be one.
    """
    if _ID.fullmatch(job_id) is None:
        raise JobNotFound("there is no such video")
    return job_id


def owner_folder(owner: str) -> str:
    """The owner in paths: 16 hex digits."""
    return _digest(owner)[:16]


def documents_uri(prefix: str, folder: str) -> str:
    """Folder of an owner's job documents, in order of creation."""
    return storage.join(prefix, "jobs", folder)


def document_uri(prefix: str, folder: str, job_id: str) -> str:
    """The document of a job."""
    return storage.join(documents_uri(prefix, folder), f"{job_id}.json")


def inputs_uri(prefix: str, job_id: str) -> str:
    """Folder of the files that came with a job."""
    return storage.join(prefix, "inputs", job_id)


def content_uri(prefix: str, job_id: str) -> str:
    """Folder of what a job's attempts made."""
    return storage.join(prefix, "content", job_id)


def queue_uri(prefix: str) -> str:
    """Folder of the entries of open jobs, in the order in which they go."""
    return storage.join(prefix, "queue")


def queue_entry_uri(prefix: str, folder: str, job_id: str, *, priority: int) -> str:
    """The entry of an open job."""
    return storage.join(queue_uri(prefix), f"{priority}-{job_id}-{folder}")


def webhooks_uri(prefix: str) -> str:
    """Folder of the entries of ended jobs whose webhook is not delivered."""
    return storage.join(prefix, "webhooks")


def webhook_entry_uri(prefix: str, folder: str, job_id: str) -> str:
    """The entry of one of them."""
    return storage.join(webhooks_uri(prefix), f"{job_id}-{folder}")


def expiring_uri(prefix: str) -> str:
    """Folder of the entries of ended jobs, in the order in which they expire."""
    return storage.join(prefix, "expiring")


def expiring_entry_uri(prefix: str, folder: str, job_id: str, *, expires_at: float) -> str:
    """The entry of one of them."""
    return storage.join(expiring_uri(prefix), f"{int(expires_at):012d}-{job_id}-{folder}")


def record_name(body_sha256: str, idempotency_key: str | None) -> str:
    """Name of the record that a request leaves of the job it made: by its key, or by its content if it has none."""
    return f"body-{body_sha256}" if idempotency_key is None else f"key-{_digest(idempotency_key)}"


def record_uri(prefix: str, folder: str, record: str) -> str:
    """One of these records of an owner."""
    return storage.join(prefix, "requests", folder, f"{record}.json")


def entry_of(stat: ObjectStat) -> Entry | None:
    """What an entry's name says; None where the name is none of ours."""
    match = _ENTRY.fullmatch(stat.uri.rpartition("/")[2])
    if match is None:
        return None
    return Entry(
        id=match["id"],
        rank=int(match["rank"] or 0),
        owner_folder=match["folder"],
        written_at=stat.last_modified,
        uri=stat.uri,
    )


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
