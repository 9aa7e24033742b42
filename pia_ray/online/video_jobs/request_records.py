"""The records that requests leave of the jobs they made, so that a request that is sent again makes no second job."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Final

from pia_ray import storage
from pia_ray.errors import JobConflict, StorageError, StorageNotFound
from pia_ray.online.rendering.renderer import RenderRequest

RETRY_WINDOW_S: Final = 900.0
"""A client's own retry of an equal request gets the first try's job for so long; the openai client waits 600 s for an
answer."""
_TRIES: Final = 20


class RequestRecords:
    """The records of all owners below a prefix."""

    def __init__(self, prefix: str) -> None:
        self._prefix = storage.join(prefix, "requests")

    def id_of_key(self, owner_folder: str, record: str, *, new_id: str, body_sha256: str) -> str:
        """The id that goes with an idempotency key: the new one, if the key is new.

        Raises:
            JobConflict: the key was used for another request.
        """
        content = json.dumps({"id": new_id, "body_sha256": body_sha256}).encode()
        for _ in range(_TRIES):
            if storage.create_bytes(self._uri(owner_folder, record), content, content_type="application/json"):
                return new_id
            found = self._read(owner_folder, record)
            if not found:  # its job was deleted just now
                continue
            if found["body_sha256"] != body_sha256:
                raise JobConflict("this Idempotency-Key was used for another request; take a new key for a new request")
            return str(found["id"])
        raise JobConflict("this Idempotency-Key is in use; try again")

    def id_of_body(self, owner_folder: str, record: str, *, new_id: str, now: float, is_retry: bool) -> str:
        """The id for a request without a key: the new one, but for a client's own retry that of the first try."""
        if is_retry:
            found = self._read(owner_folder, record)
            if found and now - float(found["at"]) <= RETRY_WINDOW_S:
                return str(found["id"])
        content = json.dumps({"id": new_id, "at": now}).encode()
        storage.write_bytes(self._uri(owner_folder, record), content, content_type="application/json")
        return new_id

    def remove(self, owner_folder: str, record: str, *, job_id: str) -> None:
        """Removes the record if it is about that job."""
        if self._read(owner_folder, record).get("id") == job_id:
            storage.delete(self._uri(owner_folder, record))

    def _read(self, owner_folder: str, record: str) -> Mapping[str, Any]:
        uri = self._uri(owner_folder, record)
        try:
            found = json.loads(storage.read_bytes(uri))
        except StorageNotFound:
            return {}
        except ValueError:
            raise StorageError(f"{uri} is damaged: it is not JSON") from None
        return found if isinstance(found, dict) else {}

    def _uri(self, owner_folder: str, record: str) -> str:
        return storage.join(self._prefix, owner_folder, f"{record}.json")


def record_name(body_sha256: str, idempotency_key: str | None) -> str:
    """Name of the record of a request: by its key, or by its content if it has none."""
    if idempotency_key is None:
        return f"body-{body_sha256}"
    return f"key-{hashlib.sha256(idempotency_key.encode('utf-8', 'surrogatepass')).hexdigest()}"


def body_digest(request: RenderRequest, more: Any) -> str:
    """sha256 in hex of a request with its files; equal for equal requests."""
    files = {"image": request.image, **request.inputs}
    parts = {
        "params": request.params.model_dump(mode="json", exclude_unset=True),
        "format": request.format,
        "files": {name: hashlib.sha256(content).hexdigest() for name, content in files.items()},
        "more": more,
        **({"policy": asdict(request.policy)} if request.policy.bounds else {}),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
