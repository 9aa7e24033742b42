"""Objects in S3-compatible stores: every call is retried within bounds, conditional where the store knows how."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import logging
import uuid
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from botocore import exceptions as aws

from pia_ray.errors import StorageDamaged, StorageError, StorageNotFound, StorageUnavailable
from pia_ray.storage import client
from pia_ray.storage.client import s3_client
from pia_ray.storage.errors import RETRY_ATTEMPTS, retried, status_of, too_large
from pia_ray.storage.patience import patience_s
from pia_ray.storage.uris import ObjectStat, bucket_and_key, join, object_address

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

_WRITE_ID: Final = "write-id"
"""Metadata by which a writer knows its own object again after the answer to its put was lost."""

_PAGE_KEYS: Final = 1000
"""Keys of a page of a list at most."""

_WITH_CHECKSUM: Final = {"ChecksumMode": "ENABLED"}
_MOST_DELETED: Final = 1000
"""Objects that one request may delete."""
_deletes_one_by_one: Final[set[str]] = set()
"""Buckets whose stores have refused to delete several objects in one request."""
ARROW_PAUSE_S: Final = 20.0
"""The longest pause of Arrow between two tries."""

_log = logging.getLogger(__name__)


def read_object(uri: str, *, max_bytes: int | None) -> tuple[bytes, str]:
    """The content and its ETag."""

    def read() -> tuple[bytes, str]:
        answer = s3_client().get_object(**object_address(uri), **_WITH_CHECKSUM)
        with contextlib.closing(answer["Body"]) as body:
            size_bytes = answer["ContentLength"]
            if max_bytes is not None and size_bytes > max_bytes:
                raise too_large(uri, size_bytes, max_bytes)
            content: bytes = body.read()
        if len(content) != size_bytes:
            raise StorageUnavailable(f"{uri}: {len(content)} of {size_bytes} bytes arrived")
        return content, answer.get("ETag", "")

    def read_twice() -> tuple[bytes, str]:
        with contextlib.suppress(aws.FlexibleChecksumError):
            return read()
        try:
            return read()  # the fault may have been the network's
        except aws.FlexibleChecksumError:
            raise StorageDamaged(f"{uri} is damaged: its bytes are not those of its checksum.") from None

    return retried(read_twice, "read", uri)


def pieces_of(uri: str) -> tuple[int, Iterator[bytes]]:
    """The length and the pieces. A content that breaks off on the way is not read again."""
    answer = retried(lambda: s3_client().get_object(**object_address(uri)), "read", uri)

    def pieces() -> Iterator[bytes]:
        with contextlib.closing(answer["Body"]) as body:
            yield from body.iter_chunks(2**20)

    return answer["ContentLength"], pieces()


def sha256_of(uri: str) -> str:
    """The hash of the bytes, which are streamed; the store's own checksum is not asked for."""

    def read() -> str:
        answer = s3_client().get_object(**object_address(uri))
        found, size_bytes = hashlib.sha256(), 0
        with contextlib.closing(answer["Body"]) as body:
            for chunk in body.iter_chunks(2**20):
                found.update(chunk)
                size_bytes += len(chunk)
        if size_bytes != answer["ContentLength"]:
            raise StorageUnavailable(f"{uri}: {size_bytes} of {answer['ContentLength']} bytes arrived")
        return found.hexdigest()

    return retried(read, "read", uri)


def write_bytes(uri: str, content: bytes, *, content_type: str, metadata: Mapping[str, str]) -> None:
    arguments = _put_arguments(uri, content, content_type, metadata)
    retried(lambda: s3_client().put_object(**arguments), "write", uri)


def create_bytes(uri: str, content: bytes, *, content_type: str, metadata: Mapping[str, str]) -> str | None:
    """The ETag of the new object; None if something was there."""
    write_id = uuid.uuid4().hex
    arguments = _put_arguments(uri, content, content_type, {**metadata, _WRITE_ID: write_id})

    def create() -> str | None:
        if not conditional_writes(uri):
            return _create_after_look(uri, arguments)
        try:
            return str(s3_client().put_object(**arguments, IfNoneMatch="*").get("ETag", ""))
        except aws.ClientError as error:
            if status_of(error) == 412:
                found = head(uri)
                if found is None:  # deleted since: the next try creates it
                    raise StorageUnavailable(f"{uri} was there and went away") from None
                return found.etag if found.metadata.get(_WRITE_ID) == write_id else None
            if status_of(error) != 501:
                raise
            remember_conditional_writes(uri, works=False)
            return _create_after_look(uri, arguments)

    return retried(create, "write", uri)


def replace_bytes(uri: str, content: bytes, *, etag: str, content_type: str) -> str | None:
    write_id = uuid.uuid4().hex
    arguments = _put_arguments(uri, content, content_type, {_WRITE_ID: write_id})

    def replace() -> str | None:
        condition = {"IfMatch": etag} if conditional_writes(uri) else {}
        try:
            return str(s3_client().put_object(**arguments, **condition)["ETag"])
        except aws.ClientError as error:
            if status_of(error) in (404, 501):  # gone, or of a store that does not know the condition
                return None
            if status_of(error) != 412:
                raise
            found = head(uri)
            return found.etag if found is not None and found.metadata.get(_WRITE_ID) == write_id else None

    return retried(replace, "write", uri)


def head(uri: str) -> ObjectStat | None:
    def ask() -> ObjectStat | None:
        try:
            answer = s3_client().head_object(**object_address(uri), **_WITH_CHECKSUM)
        except aws.ClientError as error:
            if status_of(error) == 404:
                return None
            raise _explained(error, uri) from None
        checksum = answer.get("ChecksumSHA256", "")
        return ObjectStat(
            uri=uri,
            size_bytes=answer["ContentLength"],
            etag=answer.get("ETag", ""),
            last_modified=answer["LastModified"],
            metadata=answer.get("Metadata", {}),
            # That of an upload in parts is of the parts' checksums, and ends with their number.
            sha256=base64.b64decode(checksum).hex() if checksum and "-" not in checksum else "",
        )

    return retried(ask, "read", uri)


def clock(uri: str) -> datetime:
    def ask() -> datetime:
        try:
            headers = s3_client().head_object(**object_address(join(uri, "clock")))["ResponseMetadata"]["HTTPHeaders"]
        except aws.ClientError as error:
            if status_of(error) not in (403, 404):
                raise _explained(error, uri) from None
            headers = error.response["ResponseMetadata"]["HTTPHeaders"]
        return datetime.strptime(headers["date"], "%a, %d %b %Y %H:%M:%S %Z").replace(tzinfo=UTC)

    return retried(ask, "read", uri)


def list_objects(uri: str, *, suffix: str, after: str, before: str, limit: int | None) -> Iterator[ObjectStat]:
    """The objects in pages of at most `limit` keys, as far as they are asked for."""
    bucket, prefix = _bucket_and_folder(uri)
    asked: dict[str, Any] = {} if limit is None else {"MaxKeys": min(max(limit, 1), _PAGE_KEYS)}
    for page in _pages(uri, asked, {"StartAfter": f"{prefix}{after}"} if after else {}):
        for found in _stats(page, bucket):
            if before and found.uri.removeprefix(f"s3://{bucket}/{prefix}") >= before:
                return
            if found.uri.endswith(suffix):
                yield found


def list_folder(uri: str) -> tuple[list[str], list[ObjectStat]]:
    bucket, prefix = _bucket_and_folder(uri)
    folders: list[str] = []
    objects: list[ObjectStat] = []
    for page in _pages(uri, {"Delimiter": "/"}, {}):
        folders += [each["Prefix"].removeprefix(prefix).rstrip("/") for each in page.get("CommonPrefixes", ())]
        objects += _stats(page, bucket)
    return folders, objects


def delete(uri: str) -> None:
    retried(lambda: s3_client().delete_object(**object_address(uri)), "delete", uri)


def delete_all(uris: Sequence[str]) -> None:
    """Removes the objects in one request for each thousand of a bucket, or one by one where the store has no such."""
    by_bucket: dict[str, list[str]] = {}
    for uri in uris:
        by_bucket.setdefault(bucket_and_key(uri)[0], []).append(uri)
    for bucket, found in by_bucket.items():
        for begin in range(0, len(found), _MOST_DELETED):
            _delete_some(bucket, found[begin : begin + _MOST_DELETED])


def _delete_some(bucket: str, uris: Sequence[str]) -> None:
    keys = [{"Key": bucket_and_key(uri)[1]} for uri in uris]

    def ask() -> list[str]:
        """The objects that are left."""
        try:
            answer = s3_client().delete_objects(Bucket=bucket, Delete={"Objects": keys, "Quiet": True})
        except aws.ClientError as error:
            if status_of(error) not in (400, 405, 411, 501):
                raise
            _deletes_one_by_one.add(bucket)  # such as for want of a checksum that the store knows
            return list(uris)
        return [f"s3://{bucket}/{failed['Key']}" for failed in answer.get("Errors", ())]

    several = len(uris) > 1 and bucket not in _deletes_one_by_one
    for uri in retried(ask, "delete", uris[0]) if several else uris:
        delete(uri)


def copy(uri: str, target: str) -> None:
    retried(lambda: s3_client().copy_object(**object_address(target), CopySource=object_address(uri)), "copy", uri)


def presign(uri: str, *, expires_s: int) -> str:
    def sign() -> str:
        # Without this, some regions still get the old signature, which stores and newer regions refuse.
        signer = s3_client(signature_version="s3v4")
        return str(signer.generate_presigned_url("get_object", Params=object_address(uri), ExpiresIn=expires_s))

    return retried(sign, "sign", uri)


def download_file(uri: str, path: Path) -> None:
    """Streams the object over the file at `path`, which may stay half written."""
    address = object_address(uri)
    retried(lambda: s3_client().download_file(address["Bucket"], address["Key"], str(path)), "read", uri)


def upload_file(path: Path, uri: str, *, content_type: str) -> None:
    address = object_address(uri)
    settings = {"ContentType": content_type}
    retried(
        lambda: s3_client().upload_file(str(path), address["Bucket"], address["Key"], ExtraArgs=settings), "write", uri
    )


def arrow_filesystem(uri: str) -> tuple[FileSystem, str]:
    from pyarrow import fs

    bucket, key = bucket_and_key(uri)
    arguments: dict[str, Any] = {"region": _region(bucket)}
    endpoint = urlsplit(s3_client().meta.endpoint_url)
    if not (endpoint.hostname or "").endswith((".amazonaws.com", ".amazonaws.com.cn")):
        arguments |= {"endpoint_override": endpoint.netloc, "scheme": endpoint.scheme}
    # Arrow gives up after three tries in as many seconds.
    tries = RETRY_ATTEMPTS + int(patience_s() / ARROW_PAUSE_S)
    arguments["retry_strategy"] = fs.AwsStandardS3RetryStrategy(max_attempts=tries)
    if client.is_anonymous(bucket):
        return fs.S3FileSystem(**arguments, anonymous=True), f"{bucket}/{key}".rstrip("/")
    credentials = client.aws_session().get_credentials()
    # Credentials that a machine's role hands out expire: there Arrow's own provider renews them, as boto3 does.
    if credentials is not None and credentials.method not in ("iam-role", "container-role"):
        frozen = credentials.get_frozen_credentials()
        arguments |= {"access_key": frozen.access_key, "secret_key": frozen.secret_key}
        if frozen.token:
            arguments["session_token"] = frozen.token
    return fs.S3FileSystem(**arguments), f"{bucket}/{key}".rstrip("/")


def conditional_writes(uri: str) -> bool:
    return client.conditional_writes.get(bucket_and_key(uri)[0], True)


def remember_conditional_writes(uri: str, *, works: bool) -> None:
    client.conditional_writes[bucket_and_key(uri)[0]] = works


def greet(uri: str) -> None:
    """Asks for the bucket with few tries: at the start, a wrong endpoint is likelier than a store that is down."""
    bucket, _ = bucket_and_key(uri)

    def ask() -> None:
        try:
            s3_client().head_bucket(Bucket=bucket)
        except aws.ClientError as error:
            if status_of(error) == 404:
                raise StorageNotFound(f"there is no bucket {bucket}.") from None
            if status_of(error) not in (301, 400, 403):  # these say that it is there, or nothing for want of a body
                raise

    retried(ask, "reach", f"s3://{bucket}", attempts=2)


def sweep(uri: str, *, older_than_s: float) -> int:
    """The number of unfinished multipart uploads of dead writers, which are aborted."""
    bucket, prefix = _bucket_and_folder(uri)
    removed = 0
    try:
        oldest = clock(uri).timestamp() - older_than_s
        page = retried(lambda: s3_client().list_multipart_uploads(Bucket=bucket, Prefix=prefix), "list", uri)
        for upload in page.get("Uploads", ()):
            if upload["Initiated"].timestamp() < oldest:
                arguments = {"Bucket": bucket, "Key": upload["Key"], "UploadId": upload["UploadId"]}
                retried(partial(s3_client().abort_multipart_upload, **arguments), "sweep", uri)
                removed += 1
    except StorageError as error:  # tidying needs permissions that a run does not
        _log.info("unfinished uploads below %s were not swept: %s", uri, error.message)
    return removed


def _explained(error: aws.ClientError, uri: str) -> aws.ClientError:
    """The refusal of a HEAD with the store's own code, which only an answer with a body holds: asks once more."""
    if status_of(error) not in (400, 403):
        return error
    try:
        s3_client().get_object(**object_address(uri), Range="bytes=0-0")["Body"].close()
    except aws.ClientError as told:
        return told if status_of(told) == status_of(error) else error
    return error


def _bucket_and_folder(uri: str) -> tuple[str, str]:
    bucket, prefix = bucket_and_key(uri)
    return bucket, f"{prefix.rstrip('/')}/" if prefix else ""


def _pages(uri: str, asked: Mapping[str, Any], start: dict[str, str]) -> Iterator[dict[str, Any]]:
    """The pages of a list, each asked for when the one before has been taken."""
    bucket, prefix = _bucket_and_folder(uri)
    while True:
        arguments = {"Bucket": bucket, "Prefix": prefix, **asked, **start}
        page = retried(partial(s3_client().list_objects_v2, **arguments), "list", uri)
        yield page
        if not page.get("IsTruncated"):
            return
        start = {"ContinuationToken": page["NextContinuationToken"]}


def _stats(page: Mapping[str, Any], bucket: str) -> Iterator[ObjectStat]:
    for entry in page.get("Contents", ()):
        if not entry["Key"].endswith("/"):
            yield ObjectStat(
                uri=f"s3://{bucket}/{entry['Key']}",
                size_bytes=entry["Size"],
                etag=entry.get("ETag", ""),
                last_modified=entry["LastModified"],
            )


def _put_arguments(uri: str, content: bytes, content_type: str, metadata: Mapping[str, str]) -> dict[str, Any]:
    # Content-MD5 is the one checksum that every S3-compatible store verifies; SHA-256 is the one that is kept.
    digest = hashlib.md5(content, usedforsecurity=False).digest()
    sha256 = hashlib.sha256(content).digest()
    return {
        **object_address(uri),
        "Body": content,
        "ContentMD5": base64.b64encode(digest).decode("ascii"),
        "ChecksumAlgorithm": "SHA256",
        "ChecksumSHA256": base64.b64encode(sha256).decode("ascii"),
        "ContentType": content_type,
        "Metadata": dict(metadata),
    }


def _create_after_look(uri: str, arguments: dict[str, Any]) -> str | None:
    found = head(uri)
    if found is not None:
        return found.etag if found.metadata.get(_WRITE_ID) == arguments["Metadata"][_WRITE_ID] else None
    return str(s3_client().put_object(**arguments).get("ETag", ""))


def _region(bucket: str) -> str:
    def ask() -> str:
        try:
            answer = s3_client().head_bucket(Bucket=bucket)
        except aws.ClientError as error:
            answer = error.response
        headers = answer["ResponseMetadata"]["HTTPHeaders"]
        return str(headers.get("x-amz-bucket-region") or s3_client().meta.region_name or "us-east-1")

    return retried(ask, "read", f"s3://{bucket}")
