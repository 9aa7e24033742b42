"""Faults of disks and stores: each becomes the `StorageError` that fits, and those that pass are tried again."""

from __future__ import annotations

import contextlib
import errno
import logging
import random
import time
from collections.abc import Callable, Iterator
from typing import Final, TypeVar

from botocore import exceptions as aws

from pia_ray.errors import (
    StorageDenied,
    StorageError,
    StorageNotFound,
    StorageThrottled,
    StorageTooLarge,
    StorageUnavailable,
)
from pia_ray.storage import client, counts
from pia_ray.storage.patience import hurried, waited_out
from pia_ray.storage.uris import bucket_and_key

RETRY_ATTEMPTS: Final = 10
"""Tries of one call, each of which is tried three times inside botocore, or AWS_MAX_ATTEMPTS times."""
HURRIED_ATTEMPTS: Final = 2
"""Tries of one call in a block that is in a hurry."""
RETRY_FIRST_WAIT_S: Final = 0.1
RETRY_LONGEST_WAIT_S: Final = 15.0
RETRY_BUDGET_S: Final = 180.0
"""No new try begins later than this after the first."""

_THROTTLED: Final = frozenset(
    {"SlowDown", "ServiceUnavailable", "RequestLimitExceeded", "Throttling", "ThrottlingException", "TooManyRequests"}
)
_EXPIRED: Final = frozenset({"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "InvalidToken"})

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


def retried(call: Callable[[], _T], verb: str, uri: str, *, attempts: int = RETRY_ATTEMPTS) -> _T:
    """The value of `call`, which is tried while its fault may pass and attempts, time or patience are left."""
    return waited_out(lambda: _tried(call, verb, uri, attempts=attempts), has_answered=client.has_answered)


@contextlib.contextmanager
def local_errors(verb: str, uri: str) -> Iterator[None]:
    """Turns an OSError of the block into the storage error that fits."""
    try:
        yield
    except OSError as error:
        raise local_error(error, verb, uri) from None


def local_error(error: OSError, verb: str, uri: str) -> StorageError:
    """The storage error that fits a refusal of the system."""
    start = f"cannot {verb} {uri}: "
    text = error.strerror or type(error).__name__
    match error.errno:
        case errno.ENOENT | errno.ENOTDIR | errno.EISDIR:
            return StorageNotFound(f"{start}{text}.")
        case errno.EACCES | errno.EPERM | errno.EROFS:
            return StorageDenied(f"{start}{text}. Check the owner and permissions.")
        case errno.ENOSPC | errno.EDQUOT:
            return StorageUnavailable(f"{start}{text}. Free some space and run again.")
        case errno.ENAMETOOLONG | errno.ELOOP | errno.EINVAL | errno.EEXIST | errno.ENXIO:  # ENXIO: of a socket
            return StorageError(f"{start}{text}.")
        case _:
            return StorageUnavailable(f"{start}{text}.")


def too_large(uri: str, size_bytes: int, max_bytes: int) -> StorageTooLarge:
    """The error for an object that is larger than its reader accepts."""
    return StorageTooLarge(f"{uri} has {size_bytes} bytes; at most {max_bytes} are read")


def status_of(error: aws.ClientError) -> int:
    """The HTTP status of the store's answer; 0 if it had none."""
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _tried(call: Callable[[], _T], verb: str, uri: str, *, attempts: int) -> _T:
    attempts = min(attempts, HURRIED_ATTEMPTS) if hurried() else attempts
    begin = time.monotonic()
    for attempt in range(1, attempts + 1):
        counts.note_try(again=attempt > 1)
        try:
            result = call()
        except (aws.BotoCoreError, aws.ClientError, client.transfer_error(), OSError) as error:
            if isinstance(error, aws.ClientError) and status_of(error):
                client.note_answer()
            failure = _s3_error(error, verb, uri)
        except (StorageThrottled, StorageUnavailable) as error:
            failure = error
        else:
            client.note_answer()
            return result
        wait_s = random.uniform(0.5, 1) * min(RETRY_LONGEST_WAIT_S, RETRY_FIRST_WAIT_S * 2 ** (attempt - 1))  # noqa: S311
        late = time.monotonic() - begin + wait_s > RETRY_BUDGET_S
        if not failure.retryable or attempt == attempts or late:
            raise failure from None
        _log.debug("%s; try %d follows in %.1f s", failure.message, attempt + 1, wait_s)
        time.sleep(wait_s)
    raise AssertionError("unreachable")


def _s3_error(error: Exception, verb: str, uri: str) -> StorageError:
    """The storage error that fits. Texts name codes and our own URI only: messages of the store may quote secrets."""
    cause = error.__cause__ or error.__context__
    if isinstance(error, client.transfer_error()) and isinstance(cause, aws.ClientError | aws.BotoCoreError):
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
    if isinstance(error, aws.InvalidRegionError):
        return StorageError(f"{start}the region is not a valid name (AWS_DEFAULT_REGION, or region of the profile).")
    if isinstance(error, OSError) and not isinstance(error, ConnectionError | TimeoutError):
        return local_error(error, verb, uri)
    at = ""
    if isinstance(error, aws.ConnectionError | aws.HTTPClientError | aws.ConnectTimeoutError):
        at = f" at {client.endpoint()}" if client.endpoint() else ""
    return StorageUnavailable(f"{start}the store{at} did not answer in full ({kind}).")


def _answer_error(error: aws.ClientError, start: str, uri: str) -> StorageError:
    code = str(error.response.get("Error", {}).get("Code", ""))
    status = status_of(error)
    if code == "NoSuchBucket":
        return StorageNotFound(f"{start}there is no bucket {bucket_and_key(uri)[0]}.")
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
    if code == str(status):  # an answer without a body
        return StorageError(f"{start}the store answered {status} and gives no reason.")
    return StorageError(f"{start}the store answered {status} {code}.")
