"""Reads, writes and lists objects by URI: a local path, `file://`, or `s3://bucket/key` on any S3-compatible store.

Every write is atomic and every call is retried within bounds; failures are the `StorageError`s of the error tree.
Owns boto3, whose own configuration decides: `AWS_*` variables, profiles, roles, `AWS_ENDPOINT_URL`.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import random
import shutil
import stat
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar
from urllib.parse import quote, unquote, urlsplit

import boto3
from botocore import exceptions as aws
from botocore.config import Config

from pia_ray.errors import (
    OutputError,
    StorageDenied,
    StorageError,
    StorageNotFound,
    StorageThrottled,
    StorageTooLarge,
    StorageUnavailable,
)

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

RETRY_ATTEMPTS: Final = 10
"""Tries of one call, each of which is tried CLIENT_ATTEMPTS times inside botocore."""
RETRY_FIRST_WAIT_S: Final = 0.1
RETRY_LONGEST_WAIT_S: Final = 15.0
RETRY_BUDGET_S: Final = 180.0
"""No new try begins later than this after the first."""
CLIENT_ATTEMPTS: Final = 3
CONNECT_TIMEOUT_S: Final = 10.0
READ_TIMEOUT_S: Final = 60.0
POOL_CONNECTIONS: Final = 64
"""Connections kept open: as many as an actor may have threads."""
STALE_TEMPORARY_S: Final = 24 * 3600.0
"""Temporary files and unfinished uploads older than this belong to nobody."""

_CHUNK_BYTES: Final = 1 << 20
_TEMPORARY_PREFIX: Final = ".tmp-"
_WRITE_ID: Final = "write-id"
"""Metadata by which a writer knows its own object again after the answer to its put was lost."""

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


@dataclass(frozen=True)
class ObjectStat:
    """What a store says of one object without reading it."""

    uri: str
    size_bytes: int
    etag: str
    """Changes whenever the content is replaced."""
    last_modified: datetime
    """By the store's clock, in UTC."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """Empty for local files and in listings."""


def is_s3(uri: str) -> bool:
    """Whether the URI names an object or prefix in S3."""
    return uri[:5].lower() == "s3://"


def join(uri: str, *parts: str) -> str:
    """The URI of something below `uri`; slashes at the seams do not matter."""
    tail = "/".join(part.strip("/") for part in parts if part.strip("/"))
    if uri[:7].lower() == "file://":
        tail = quote(tail)
    if not tail:
        return uri
    return f"{uri}{tail}" if uri.endswith("/") or not uri else f"{uri}/{tail}"


def local_path(uri: str) -> Path:
    """The path of a local URI.

    Raises:
        StorageError: the URI is of another kind.
    """
    scheme, separator, _ = uri.partition("://")
    if separator and scheme.lower() == "file":
        parts = urlsplit(uri)
        if parts.netloc not in ("", "localhost"):
            raise StorageError(f"{uri} names another machine: a file:// URI has three slashes")
        uri = unquote(parts.path)
    elif separator and scheme.isalnum():
        raise StorageError(f"{scheme}:// is not read or written here: use a local path, file:// or s3://")
    if not uri or "\0" in uri:
        raise StorageError("the path is empty or holds a NUL character")
    return Path(uri)


def read_bytes(uri: str, *, max_bytes: int | None = None) -> bytes:
    """The whole content; a body that is cut off on the way is read again.

    Raises:
        StorageTooLarge: it is longer than `max_bytes`; nothing beyond that was read.
        StorageError: as everywhere in this module, the kind that fits.
    """
    if not is_s3(uri):
        with _local_errors("read", uri):
            return _read_local(uri, max_bytes)

    def read() -> bytes:
        answer = _client().get_object(**_address(uri))
        with contextlib.closing(answer["Body"]) as body:
            size_bytes = answer["ContentLength"]
            if max_bytes is not None and size_bytes > max_bytes:
                raise _too_large(uri, size_bytes, max_bytes)
            content: bytes = body.read()
        if len(content) != size_bytes:
            raise StorageUnavailable(f"{uri}: {len(content)} of {size_bytes} bytes arrived")
        return content

    return _retried(read, "read", uri)


def write_bytes(
    uri: str,
    content: bytes,
    *,
    content_type: str = "application/octet-stream",
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Puts `content` there in one atomic step, in place of what may be there."""
    if not is_s3(uri):
        with _local_errors("write", uri), _temporary(local_path(uri), content) as temporary:
            temporary.replace(local_path(uri))
        return
    arguments = _put_arguments(uri, content, content_type, dict(metadata or {}))
    _retried(lambda: _client().put_object(**arguments), "write", uri)


def create_bytes(
    uri: str,
    content: bytes,
    *,
    content_type: str = "application/octet-stream",
    metadata: Mapping[str, str] | None = None,
) -> bool:
    """Puts `content` there if nothing is there; False if something was, which is left alone.

    A put whose answer was lost is recognised as this call's own. On a store without conditional writes it is a plain
    put after a look.
    """
    if not is_s3(uri):
        with _local_errors("write", uri), _temporary(local_path(uri), content) as temporary:
            return _link(temporary, local_path(uri))
    write_id = uuid.uuid4().hex
    arguments = _put_arguments(uri, content, content_type, {**(metadata or {}), _WRITE_ID: write_id})

    def create() -> bool:
        if not conditional_writes(uri):
            return _create_after_look(uri, arguments)
        try:
            _client().put_object(**arguments, IfNoneMatch="*")
        except aws.ClientError as error:
            if _status(error) == 412:
                found = head(uri)
                if found is None:  # deleted since: the next try creates it
                    raise StorageUnavailable(f"{uri} was there and went away") from None
                return found.metadata.get(_WRITE_ID) == write_id
            if _status(error) != 501:
                raise
            _remember_conditional_writes(uri, works=False)
            return _create_after_look(uri, arguments)
        return True

    return _retried(create, "write", uri)


def replace_bytes(uri: str, content: bytes, *, etag: str, content_type: str = "application/json") -> str | None:
    """Replaces the object whose ETag is `etag` and gives the new ETag; None if it has changed or gone.

    On a store without conditional writes, and on local file systems without locks, the comparison is not atomic.
    """
    if not is_s3(uri):
        with _local_errors("write", uri), _folder_lock(local_path(uri).parent):
            now = head(uri)
            if now is None or now.etag != etag:
                return None
            write_bytes(uri, content)
            now = head(uri)
            return now.etag if now is not None else None
    write_id = uuid.uuid4().hex
    arguments = _put_arguments(uri, content, content_type, {_WRITE_ID: write_id})

    def replace() -> str | None:
        condition = {"IfMatch": etag} if conditional_writes(uri) else {}
        try:
            return str(_client().put_object(**arguments, **condition)["ETag"])
        except aws.ClientError as error:
            if _status(error) == 404:
                return None
            if _status(error) != 412:
                raise
            found = head(uri)
            return found.etag if found is not None and found.metadata.get(_WRITE_ID) == write_id else None

    return _retried(replace, "write", uri)


def head(uri: str) -> ObjectStat | None:
    """What is there, or None if nothing is."""
    if not is_s3(uri):
        with _local_errors("look at", uri):
            try:
                facts = local_path(uri).stat()
            except (FileNotFoundError, NotADirectoryError):
                return None
            return None if stat.S_ISDIR(facts.st_mode) else _local_stat(uri, facts)

    def look() -> ObjectStat | None:
        try:
            answer = _client().head_object(**_address(uri))
        except aws.ClientError as error:
            if _status(error) == 404:
                return None
            raise
        return ObjectStat(
            uri=uri,
            size_bytes=answer["ContentLength"],
            etag=answer.get("ETag", ""),
            last_modified=answer["LastModified"],
            metadata=answer.get("Metadata", {}),
        )

    return _retried(look, "look at", uri)


def exists(uri: str) -> bool:
    """Whether an object (not a mere folder) is there."""
    return head(uri) is not None


def clock(uri: str) -> datetime:
    """The time at the store that holds `uri`, in UTC: two machines that ask agree, whatever their own clocks say."""
    if not is_s3(uri):
        folder = local_path(uri)
        with _local_errors("write", uri), _temporary(folder / "clock", b"") as temporary:
            return datetime.fromtimestamp(temporary.stat().st_mtime, UTC)

    def look() -> datetime:
        try:
            headers = _client().head_object(**_address(join(uri, "clock")))["ResponseMetadata"]["HTTPHeaders"]
        except aws.ClientError as error:
            if _status(error) not in (403, 404):
                raise
            headers = error.response["ResponseMetadata"]["HTTPHeaders"]
        return datetime.strptime(headers["date"], "%a, %d %b %Y %H:%M:%S %Z").replace(tzinfo=UTC)

    return _retried(look, "look at", uri)


def list_objects(uri: str, *, suffix: str = "") -> Iterator[ObjectStat]:
    """Every object below the folder or prefix `uri`, at any depth, in the order of their names.

    A folder that is not there has no objects; temporary files of writers at work are left out.
    """
    if not is_s3(uri):
        yield from _list_local(uri, suffix)
        return
    bucket, prefix = _split(uri)
    prefix = f"{prefix.rstrip('/')}/" if prefix else ""
    token: dict[str, str] = {}
    while True:
        arguments: dict[str, Any] = {"Bucket": bucket, "Prefix": prefix, **token}
        page = _retried(partial(_client().list_objects_v2, **arguments), "list", uri)
        for entry in page.get("Contents", ()):
            if entry["Key"].endswith(suffix) and not entry["Key"].endswith("/"):
                yield ObjectStat(
                    uri=f"s3://{bucket}/{entry['Key']}",
                    size_bytes=entry["Size"],
                    etag=entry.get("ETag", ""),
                    last_modified=entry["LastModified"],
                )
        if not page.get("IsTruncated"):
            return
        token = {"ContinuationToken": page["NextContinuationToken"]}


def delete(uri: str) -> None:
    """Removes the object; that it is not there is fine."""
    if not is_s3(uri):
        with _local_errors("delete", uri), contextlib.suppress(FileNotFoundError, NotADirectoryError):
            local_path(uri).unlink()
        return
    _retried(lambda: _client().delete_object(**_address(uri)), "delete", uri)


def presign(uri: str, *, expires_s: int) -> str:
    """An https:// link by which anybody can read the object for so long; for a local file its file:// URI."""
    if not is_s3(uri):
        return local_path(uri).resolve().as_uri()

    def sign() -> str:
        # Without this, some regions still get the old signature, which stores and newer regions refuse.
        return str(
            _client(signature_version="s3v4").generate_presigned_url(
                "get_object", Params=_address(uri), ExpiresIn=expires_s
            )
        )

    return _retried(sign, "sign", uri)


def copy_to_file(uri: str, path: str | Path) -> None:
    """Streams the object into a local file, in parts where it is large; the file appears whole or not at all."""
    path = Path(path)
    with _local_errors("write", str(path)), _temporary(path, b"") as temporary:
        if is_s3(uri):
            address = _address(uri)
            _retried(lambda: _client().download_file(address["Bucket"], address["Key"], str(temporary)), "read", uri)
        else:
            with _local_errors("read", uri):
                shutil.copyfile(local_path(uri), temporary)
        temporary.replace(path)


def upload_file(path: str | Path, uri: str, *, content_type: str = "application/octet-stream") -> None:
    """Streams a local file to `uri`, in parts where it is large; it appears whole or not at all."""
    if not is_s3(uri):
        target = local_path(uri)
        with _local_errors("write", uri), _temporary(target, b"") as temporary:
            shutil.copyfile(path, temporary)
            _sync(temporary)
            temporary.replace(target)
        return
    address = _address(uri)
    with _local_errors("read", str(path)):
        _retried(
            lambda: _client().upload_file(
                str(path), address["Bucket"], address["Key"], ExtraArgs={"ContentType": content_type}
            ),
            "write",
            uri,
        )


def arrow_filesystem(uri: str) -> tuple[FileSystem, str]:
    """A pyarrow file system and the path in it, for reading Parquet in columns and by Ray Data.

    It asks the endpoint, with the credentials and in the region, that boto3 would use. Not for writing: it cannot
    write conditionally.
    """
    from pyarrow import fs

    if not is_s3(uri):
        return fs.LocalFileSystem(), str(local_path(uri))
    bucket, key = _split(uri)
    client = _client()
    arguments: dict[str, Any] = {"region": _region(bucket)}
    endpoint = urlsplit(client.meta.endpoint_url)
    if not (endpoint.hostname or "").endswith((".amazonaws.com", ".amazonaws.com.cn")):
        arguments |= {"endpoint_override": endpoint.netloc, "scheme": endpoint.scheme}
    credentials = _session().get_credentials()
    # Credentials that a machine's role hands out expire: there Arrow's own provider renews them, as boto3 does.
    if credentials is not None and credentials.method not in ("iam-role", "container-role"):
        frozen = credentials.get_frozen_credentials()
        arguments |= {"access_key": frozen.access_key, "secret_key": frozen.secret_key}
        if frozen.token:
            arguments["session_token"] = frozen.token
    return fs.S3FileSystem(**arguments), f"{bucket}/{key}".rstrip("/")


def conditional_writes(uri: str) -> bool:
    """Whether the store refuses to overwrite when asked to; true until `probe` or a write has found otherwise."""
    return not is_s3(uri) or _conditional.get(_split(uri)[0], True)


def probe(output_uri: str) -> None:
    """Writes, reads and deletes a small object, and learns whether the store has conditional writes.

    Raises:
        OutputError: says what is refused and what to do about it.
    """
    uri = join(output_uri, "_ledger", f"probe-{uuid.uuid4().hex}")
    content = b"pia-ray was here to see whether it can write"
    try:
        if is_s3(uri):
            _greet(uri)
        create_bytes(uri, content)
        if is_s3(uri):
            works = conditional_writes(uri) and not create_bytes(uri, content)
            _remember_conditional_writes(uri, works=works)
            if not works:
                _log.warning(
                    "%s has no conditional writes: results stay right, but two runs at once are not kept apart",
                    output_uri,
                )
        if read_bytes(uri) != content:
            raise OutputError(f"{output_uri}: what was written is not what is read back")
        delete(uri)
    except StorageNotFound as error:
        raise OutputError(f"{error.message} Create it, or choose another --output.") from None
    except StorageError as error:
        raise OutputError(f"the output {output_uri} cannot be used: {error.message}") from None


def sweep(uri: str, *, older_than_s: float = STALE_TEMPORARY_S) -> int:
    """Removes temporary files, and unfinished multipart uploads, that dead writers left below `uri`; how many."""
    if is_s3(uri):
        return _sweep_uploads(uri, older_than_s)
    folder = local_path(uri)
    removed = 0
    with _local_errors("sweep", uri):
        if not folder.is_dir():
            return 0
        oldest = clock(uri).timestamp() - older_than_s
        for path in folder.rglob(f"{_TEMPORARY_PREFIX}*"):
            with contextlib.suppress(FileNotFoundError):
                if path.is_file() and path.stat().st_mtime < oldest:
                    path.unlink()
                    removed += 1
    return removed


def forget_clients() -> None:
    """Drops this process's connections; the next call reads boto3's configuration anew."""
    with _lock:
        for client in _clients.values():
            client.close()
        _clients.clear()
        _sessions.clear()
        _conditional.clear()


# The S3 client. Module state, so that whatever is pickled to another process finds or makes a client there.

_lock = threading.Lock()
_sessions: list[Any] = []
_clients: dict[str, Any] = {}
_conditional: dict[str, bool] = {}


def _after_fork() -> None:
    global _lock
    _lock = threading.Lock()  # the parent may have held it at the fork
    _clients.clear()  # sockets are not shared between processes
    _sessions.clear()


os.register_at_fork(after_in_child=_after_fork)


def _session() -> Any:
    with _lock:
        if not _sessions:
            _sessions.append(boto3.Session())
        return _sessions[0]


def _client(signature_version: str | None = None) -> Any:
    name = signature_version or ""
    client = _clients.get(name)
    if client is not None:
        return client
    session = _session()
    with _lock:
        if name not in _clients:
            _clients[name] = session.client(
                "s3",
                config=Config(
                    # Not adaptive: its rate limit is per client and holds back every thread of a worker for one
                    # throttled prefix, while the jittered waits outside already spread the load.
                    retries={"mode": "standard", "total_max_attempts": CLIENT_ATTEMPTS},
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
        return _clients[name]


def _split(uri: str) -> tuple[str, str]:
    bucket, _, key = uri[5:].partition("/")
    if not bucket:
        raise StorageError(f'"{uri}" names no bucket: write s3://bucket/prefix')
    return bucket, key


def _address(uri: str) -> dict[str, str]:
    bucket, key = _split(uri)
    if not key:
        raise StorageNotFound(f'"{uri}" is a bucket, not an object.')
    return {"Bucket": bucket, "Key": key}


def _put_arguments(uri: str, content: bytes, content_type: str, metadata: dict[str, str]) -> dict[str, Any]:
    # Content-MD5 is the one checksum that every S3-compatible store verifies.
    digest = hashlib.md5(content, usedforsecurity=False).digest()
    return {
        **_address(uri),
        "Body": content,
        "ContentMD5": base64.b64encode(digest).decode("ascii"),
        "ContentType": content_type,
        "Metadata": metadata,
    }


def _create_after_look(uri: str, arguments: dict[str, Any]) -> bool:
    found = head(uri)
    if found is not None:
        return bool(found.metadata.get(_WRITE_ID) == arguments["Metadata"][_WRITE_ID])
    _client().put_object(**arguments)
    return True


def _remember_conditional_writes(uri: str, *, works: bool) -> None:
    _conditional[_split(uri)[0]] = works


def _greet(uri: str) -> None:
    """Asks for the bucket with few tries: at the start, a wrong endpoint is likelier than a store that is down."""
    bucket, _ = _split(uri)

    def ask() -> None:
        try:
            _client().head_bucket(Bucket=bucket)
        except aws.ClientError as error:
            if _status(error) == 404:
                raise StorageNotFound(f"there is no bucket {bucket}.") from None
            if _status(error) not in (301, 400, 403):  # these say that it is there, or nothing for want of a body
                raise

    _retried(ask, "reach", f"s3://{bucket}", attempts=2)


def _region(bucket: str) -> str:
    def look() -> str:
        try:
            answer = _client().head_bucket(Bucket=bucket)
        except aws.ClientError as error:
            answer = error.response
        headers = answer["ResponseMetadata"]["HTTPHeaders"]
        return str(headers.get("x-amz-bucket-region") or _client().meta.region_name or "us-east-1")

    return _retried(look, "look at", f"s3://{bucket}")


def _sweep_uploads(uri: str, older_than_s: float) -> int:
    bucket, prefix = _split(uri)
    prefix = f"{prefix.rstrip('/')}/" if prefix else ""
    removed = 0
    try:
        oldest = clock(uri).timestamp() - older_than_s
        page = _retried(lambda: _client().list_multipart_uploads(Bucket=bucket, Prefix=prefix), "list", uri)
        for upload in page.get("Uploads", ()):
            if upload["Initiated"].timestamp() < oldest:
                arguments = {"Bucket": bucket, "Key": upload["Key"], "UploadId": upload["UploadId"]}
                _retried(partial(_client().abort_multipart_upload, **arguments), "sweep", uri)
                removed += 1
    except StorageError as error:  # tidying needs permissions that a run does not
        _log.info("unfinished uploads below %s were not swept: %s", uri, error.message)
    return removed


def _retried(call: Callable[[], _T], verb: str, uri: str, *, attempts: int = RETRY_ATTEMPTS) -> _T:
    """Runs `call` until it succeeds, the fault is one that stays, or attempts or time are spent."""
    begin = time.monotonic()
    for attempt in range(1, attempts + 1):
        try:
            return call()
        except (aws.BotoCoreError, aws.ClientError, boto3.exceptions.Boto3Error, OSError) as error:
            failure = _s3_error(error, verb, uri)
        except (StorageThrottled, StorageUnavailable) as error:
            failure = error
        wait_s = random.uniform(0.5, 1) * min(RETRY_LONGEST_WAIT_S, RETRY_FIRST_WAIT_S * 2 ** (attempt - 1))  # noqa: S311
        late = time.monotonic() - begin + wait_s > RETRY_BUDGET_S
        if not failure.retryable or attempt == attempts or late:
            raise failure from None
        _log.debug("%s; try %d follows in %.1f s", failure.message, attempt + 1, wait_s)
        time.sleep(wait_s)
    raise AssertionError("unreachable")


_THROTTLED: Final = frozenset(
    {"SlowDown", "ServiceUnavailable", "RequestLimitExceeded", "Throttling", "ThrottlingException", "TooManyRequests"}
)
_EXPIRED: Final = frozenset({"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "InvalidToken"})


def _status(error: aws.ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _s3_error(error: Exception, verb: str, uri: str) -> StorageError:
    """The storage error that fits. Texts name codes and our own URI only: messages of the store may quote secrets."""
    cause = error.__cause__ or error.__context__
    if isinstance(error, boto3.exceptions.Boto3Error) and isinstance(cause, aws.ClientError | aws.BotoCoreError):
        error = cause  # the transfer manager wraps what happened
    start = f"cannot {verb} {uri}: "
    kind = type(error).__name__
    if isinstance(error, aws.ClientError):
        return _answer_error(error, start, uri)
    if isinstance(error, aws.NoCredentialsError | aws.PartialCredentialsError | aws.CredentialRetrievalError):
        return StorageDenied(
            f"{start}there are no usable AWS credentials ({kind}). Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
            "AWS_PROFILE, or run with a role."
        )
    if isinstance(error, aws.SSOError | aws.TokenRetrievalError | aws.ProfileNotFound | aws.ConfigParseError):
        return StorageDenied(f"{start}the AWS profile or its login does not work ({kind}): run `aws sso login`.")
    if isinstance(error, aws.ParamValidationError | aws.InvalidEndpointConfigurationError):
        return StorageError(f"{start}the bucket name, key or endpoint is not valid ({kind}).")
    if isinstance(error, ValueError):
        return StorageError(f"{start}the endpoint is not a URL (AWS_ENDPOINT_URL).")
    if isinstance(error, OSError) and not isinstance(error, ConnectionError | TimeoutError):
        return _local_error(error, verb, uri)
    endpoint = ""
    if _clients and isinstance(error, aws.ConnectionError | aws.HTTPClientError | aws.ConnectTimeoutError):
        parts = urlsplit(next(iter(_clients.values())).meta.endpoint_url)
        endpoint = f" at {parts.scheme}://{parts.hostname}{f':{parts.port}' if parts.port else ''}"
    return StorageUnavailable(f"{start}the store{endpoint} did not answer in full ({kind}).")


def _answer_error(error: aws.ClientError, start: str, uri: str) -> StorageError:
    code = str(error.response.get("Error", {}).get("Code", ""))
    status = _status(error)
    if code == "NoSuchBucket":
        return StorageNotFound(f"{start}there is no bucket {_split(uri)[0]}.")
    if code in _THROTTLED or status in (429, 503):
        return StorageThrottled(f"{start}the store says that it is asked too often ({code or status}).")
    if status == 404:
        return StorageNotFound(f"{start}there is no such object.")
    if code in _EXPIRED:
        return StorageDenied(f"{start}the AWS credentials have expired ({code}). Renew them and run again.")
    if code == "RequestTimeTooSkewed":
        return StorageDenied(f"{start}this machine's clock is wrong ({code}). Set it and run again.")
    if status in (401, 403):
        return StorageDenied(
            f"{start}access denied ({code or status}). Check the credentials and the bucket's policy: reading needs "
            "s3:GetObject and s3:ListBucket, writing s3:PutObject and s3:DeleteObject."
        )
    if status >= 500 or status in (0, 408, 409) or code in ("RequestTimeout", "BadDigest"):
        return StorageUnavailable(f"{start}the store answered {status or 'nothing'} {code}.")
    return StorageError(f"{start}the store answered {status} {code}.")


# Local files.


def _read_local(uri: str, max_bytes: int | None) -> bytes:
    with local_path(uri).open("rb") as file:
        if max_bytes is None:
            return file.read()
        content = file.read(max_bytes + 1)
        if len(content) > max_bytes:
            raise _too_large(uri, max(os.fstat(file.fileno()).st_size, len(content)), max_bytes)
        return content


def _too_large(uri: str, size_bytes: int, max_bytes: int) -> StorageTooLarge:
    return StorageTooLarge(f"{uri} has {size_bytes} bytes; at most {max_bytes} are read")


def _local_stat(uri: str, facts: os.stat_result) -> ObjectStat:
    return ObjectStat(
        uri=uri,
        size_bytes=facts.st_size,
        etag=f"{facts.st_ino:x}-{facts.st_mtime_ns:x}-{facts.st_size:x}",
        last_modified=datetime.fromtimestamp(facts.st_mtime, UTC),
    )


def _list_local(uri: str, suffix: str) -> Iterator[ObjectStat]:
    folder = local_path(uri)
    with _local_errors("list", uri):
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except (FileNotFoundError, NotADirectoryError):
            return
    for entry in entries:
        below = join(uri, entry.name)
        if entry.is_dir():
            yield from _list_local(below, suffix)
        elif below.endswith(suffix) and not entry.name.startswith(_TEMPORARY_PREFIX):
            with _local_errors("list", below):
                try:
                    facts = entry.stat()
                except FileNotFoundError:  # deleted since the listing
                    continue
            yield _local_stat(below, facts)


@contextlib.contextmanager
def _temporary(target: Path, content: bytes) -> Iterator[Path]:
    """A synced temporary file beside `target` for the body to link or rename; afterwards the folder is synced."""
    _make_folder(target.parent)
    # A fixed name would let two writers take each other's file.
    temporary = target.parent / f"{_TEMPORARY_PREFIX}{uuid.uuid4().hex}"
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
        _sync(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _link(temporary: Path, target: Path) -> bool:
    try:
        os.link(temporary, target)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV):
            raise
        with _folder_lock(target.parent):  # file systems without links: vfat, some network mounts
            if target.exists():
                return False
            temporary.replace(target)
    return True


def _make_folder(folder: Path) -> None:
    missing = []
    while not folder.is_dir():
        missing.append(folder)
        folder = folder.parent
    for path in reversed(missing):
        path.mkdir(exist_ok=True)
        _sync(path.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network mounts cannot sync folders
            raise
    finally:
        os.close(handle)


@contextlib.contextmanager
def _folder_lock(folder: Path) -> Iterator[None]:
    _make_folder(folder)
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a mount without locks: the comparison is then not atomic
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def _local_errors(verb: str, uri: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _local_error(error, verb, uri) from None


def _local_error(error: OSError, verb: str, uri: str) -> StorageError:
    start = f"cannot {verb} {uri}: "
    text = error.strerror or type(error).__name__
    match error.errno:
        case errno.ENOENT | errno.ENOTDIR | errno.EISDIR:
            return StorageNotFound(f"{start}{text}.")
        case errno.EACCES | errno.EPERM | errno.EROFS:
            return StorageDenied(f"{start}{text}. Check the owner and permissions.")
        case errno.ENOSPC | errno.EDQUOT:
            return StorageUnavailable(f"{start}{text}. Free some space and run again.")
        case errno.ENAMETOOLONG | errno.ELOOP | errno.EINVAL | errno.EEXIST:
            return StorageError(f"{start}{text}.")
        case _:
            return StorageUnavailable(f"{start}{text}.")
