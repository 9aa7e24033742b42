"""The S3 clients of this process and what they have learnt of the stores; boto3's own configuration decides.

Module state, so that objects pickled to another process find or make a client there.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from typing import Any, Final
from urllib.parse import urlsplit

from botocore import UNSIGNED
from botocore import exceptions as aws

from pia_ray.errors import StorageError
from pia_ray.storage import counts

CONNECT_TIMEOUT_S: Final = 10.0
READ_TIMEOUT_S: Final = 60.0
POOL_CONNECTIONS: Final = 64
"""Connections kept open: as many as an actor may have threads."""

conditional_writes: Final[dict[str, bool]] = {}
"""By bucket, whether the store refuses to overwrite when asked to, as far as it has been found out."""

_anonymous: Final[set[str]] = set()
_requester_pays: Final[set[str]] = set()
_UNSIGNED: Final = "pia-ray-unsigned"
"""Names what `_note_bucket` leaves for `_signer` in the context of a call."""
_READS: Final = frozenset({"GetObject", "HeadObject", "ListObjectsV2"})
_answered = threading.Event()
_lock = threading.Lock()
_sessions: list[Any] = []
_clients: dict[str, Any] = {}


def s3_client(signature_version: str | None = None) -> Any:
    """The boto3 client of this process, made at the first call; threads share it."""
    name = signature_version or ""
    client = _clients.get(name)
    if client is not None:
        return client
    session = aws_session()
    with _lock:
        if name not in _clients:
            _clients[name] = _new_client(session, signature_version)
        return _clients[name]


def aws_session() -> Any:
    """The boto3 session of this process."""
    import boto3  # 0.15 s of CPU time in each process of a run, which one without S3 does without

    with _lock:
        if not _sessions:
            _sessions.append(boto3.Session())
        return _sessions[0]


def transfer_error() -> type[Exception]:
    """The base class of what boto3 raises beside botocore's errors."""
    from boto3.exceptions import Boto3Error

    base: type[Exception] = Boto3Error
    return base


def endpoint() -> str:
    """The address that this process's clients ask, without what may be secret in it; empty before there is one."""
    if not _clients:
        return ""
    parts = urlsplit(next(iter(_clients.values())).meta.endpoint_url)
    return f"{parts.scheme}://{parts.hostname}{f':{parts.port}' if parts.port else ''}"


def declare_buckets(*, anonymous: Iterable[str], requester_pays: Iterable[str]) -> None:
    """Has this process read these buckets without credentials, or at its own cost."""
    _anonymous.update(anonymous)
    _requester_pays.update(requester_pays)


def is_anonymous(bucket: str) -> bool:
    """Whether the bucket is read without credentials."""
    return bucket in _anonymous


def note_answer() -> None:
    """Notes that the store has answered this process."""
    _answered.set()


def has_answered() -> bool:
    """Whether the store has ever answered this process, so that its address is not wrong."""
    return _answered.is_set()


def forget_clients() -> None:
    """Drops this process's connections; the next call reads boto3's configuration anew."""
    with _lock:
        for client in _clients.values():
            client.close()
        _clients.clear()
        _sessions.clear()
        conditional_writes.clear()
        _answered.clear()


def _new_client(session: Any, signature_version: str | None) -> Any:
    from botocore.config import Config

    try:
        made = session.client(
            "s3",
            config=Config(
                # Not adaptive: its rate limit is per client and holds back every thread of a worker for one
                # throttled prefix, while the jittered waits outside already spread the load.
                # Three tries, unless AWS_MAX_ATTEMPTS or the profile says otherwise.
                retries={"mode": "standard"},
                connect_timeout=CONNECT_TIMEOUT_S,
                read_timeout=READ_TIMEOUT_S,
                max_pool_connections=POOL_CONNECTIONS,
                tcp_keepalive=True,
                # Other makers' stores refuse the trailing checksums that are boto3's default since 1.36.
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
                signature_version=signature_version,
            ),
        )
        made.meta.events.register("request-created.s3", counts.count_request)
        made.meta.events.register("before-parameter-build.s3", _note_bucket)
        made.meta.events.register("choose-signer.s3", _signer)
        return made
    except ValueError as error:
        if isinstance(error, aws.BotoCoreError):
            raise
        raise StorageError(
            "the S3 endpoint is not a URL: AWS_ENDPOINT_URL, or endpoint_url of the profile, begins with http:// or "
            "https://."
        ) from None


def _note_bucket(params: dict[str, Any], model: Any, context: dict[str, Any], **others: Any) -> None:
    bucket = params.get("Bucket")
    context[_UNSIGNED] = bucket in _anonymous
    if bucket in _requester_pays and model.name in _READS:
        params["RequestPayer"] = "requester"


def _signer(context: dict[str, Any], **others: Any) -> Any:
    """No signature for a bucket that is read without credentials; else None, which leaves the choice to botocore."""
    return UNSIGNED if context.get(_UNSIGNED) else None


def _after_fork() -> None:
    global _answered, _lock
    _answered, _lock = threading.Event(), threading.Lock()  # the parent may have held them at the fork
    _clients.clear()  # sockets are not shared between processes
    _sessions.clear()


os.register_at_fork(after_in_child=_after_fork)
