"""The error tree of pia-ray.

A `JobError` means that a run cannot start or go on (the command line exits with 2). A `RowError` belongs to one row
or request only: it becomes a failed row, or an HTTP status. Every class has a stable `code`, says whether trying
again can help (`retryable`), names the HTTP status that fits, and says whose fault it is: the row's (final, until
`--retry`), the world's (the same command tries the row again), or the run's (no row is failed for it).

    PiaRayError
    ├── JobError
    │   ├── ConfigError           a knob, flag or config file is wrong
    │   ├── ManifestError         the manifest as a whole cannot be used; ManifestUnavailable: its store stayed away
    │   ├── OutputError           the output cannot be written; OutputUnavailable: its store stayed away
    │   ├── TooManyFailures       so many rows failed, or so many in a row alike, that the run stopped
    │   ├── WeightsError          a model's weights are missing or unusable; HubUnavailable: the hub stayed away
    │   ├── LeaseHeld             another run is at work on this output
    │   ├── LedgerError           the ledger is damaged beyond what a rerun mends
    │   └── DeviceLost            the GPU is unusable for this process; a new one may work
    └── RowError
        ├── BadManifestRow        the row of the manifest could not be read at all
        ├── BadParameter          a knob of this row has no valid value
        ├── ImageError            ImageNotFound, UnsupportedImage, ImageTruncated, ImageTooLarge, ImageTooSmall
        ├── InputChanged          a file of the row is not the one that was planned
        ├── FetchError            AddressRefused, FetchDenied, FetchOptedOut, FetchUnavailable
        ├── StorageError          StorageNotFound, StorageDenied, StorageDamaged, StorageThrottled, StorageUnavailable,
        │                         StorageTooLarge
        ├── ModelUnavailable      the model of the row's style could not be loaded
        ├── OutOfMemory           the row does not fit, alone, on this device
        ├── NonFiniteFrames       the model produced NaN or infinite values
        ├── NotAccepted           every take misses a bound of `accept`
        ├── UnsafeContent         the safety checker found a frame that is not safe, and `safety` is fail
        ├── VideoError            frames could not be encoded, or the finished file did not verify
        ├── Timeout, Cancelled    the row's deadline passed; the caller took the request back
        ├── Busy                  too many requests wait already; RateLimited: too many calls of one caller;
        │                         QuotaExceeded: a quota of the day is used up
        ├── NotReady              no engine of the endpoint runs, or a process of it has to be replaced
        ├── RequestError          Unauthorized, Forbidden, NotAcceptable, SlowBody, BodyTooLarge, UnsupportedBody,
        │                         HeadersTooLarge, Unsupported: an HTTP request that the endpoint refuses before it
        │                         reads knobs
        ├── NotFound              the endpoint has no such file or batch, or it is another key's; JobNotFound: video
        ├── Conflict              what is asked for contradicts what is there; JobConflict: a video job has moved on
        ├── WorkerDied            the process died each time this row was tried
        └── UnexpectedError       a bug or an unknown fault; the traceback is in the message
"""

from __future__ import annotations

from typing import ClassVar, Literal

Fault = Literal["row", "world", "run"]
"""Whose fault an error is: the row's, that of something around it which may be well again later, or the run's."""


class PiaRayError(Exception):
    """Base of all errors of this package. All state is in positional arguments, so errors survive pickling."""

    code: ClassVar[str] = "error"
    retryable: ClassVar[bool] = False
    http_status: ClassVar[int] = 500
    fault: ClassVar[Fault] = "row"

    @property
    def message(self) -> str:
        """The error in one or two sentences: what happened and what to do."""
        return str(self.args[0]) if self.args else self.code

    def __str__(self) -> str:
        return self.message


class JobError(PiaRayError):
    """The run cannot start or go on; nothing (more) is animated. What is committed stays; the same command resumes."""

    code = "job_error"
    fault = "run"
    exit_code: ClassVar[int] = 2
    """Of the command line; 4 where the same command goes on later without any correction."""


class ConfigError(JobError):
    """A knob, flag or configuration file is wrong. Correct what the message names."""

    code = "bad_config"


class ManifestError(JobError):
    """The manifest as a whole cannot be used. Correct the file; `pia-ray validate MANIFEST` reads it without a GPU."""

    code = "bad_manifest"


class ManifestUnavailable(ManifestError):
    """The manifest's store stayed away for longer than `patience`. The same command reads it when it answers again."""

    code = "manifest_unavailable"
    retryable = True
    exit_code = 4


class OutputError(JobError):
    """The output location cannot be written or read. Check path, credentials and free space, then run again."""

    code = "bad_output"


class OutputUnavailable(OutputError):
    """The output's store stayed away for longer than `patience`. No row failed; the same command goes on."""

    code = "output_unavailable"
    retryable = True
    exit_code = 4


class TooManyFailures(JobError):
    """More rows failed than `max_failures`, or many in a row alike. Mend what the message names, then run again."""

    code = "too_many_failures"


class WeightsError(JobError):
    """A model's weights are missing, damaged or of a kind that is refused. `pia-ray models pull NAME` verifies them."""

    code = "bad_weights"


class HubUnavailable(WeightsError):
    """The hub stayed away for longer than `patience`. The same command goes on when it answers again."""

    code = "hub_unavailable"
    retryable = True
    exit_code = 4


class LeaseHeld(JobError):
    """Another run holds this output. Wait for it or stop it; the lease of a run that died is taken over."""

    code = "lease_held"


class LedgerError(JobError):
    """The ledger is damaged beyond what a rerun mends. `pia-ray ledger rebuild OUTPUT` restores it from the videos."""

    code = "bad_ledger"


class DeviceLost(JobError):
    """The GPU is in a state that only a new process mends. Run again; if it returns, check GPU and driver."""

    code = "device_lost"


class RowError(PiaRayError):
    """This row or request only."""

    code = "row_error"


class BadManifestRow(RowError):
    """A line of the manifest cannot be read as a row: too many cells, not JSON, not text. Correct the line."""

    code = "bad_manifest_row"
    http_status = 400


class BadParameter(RowError):
    """A knob has no valid value. Correct the field that the message names. Arguments: message, name of the field."""

    code = "bad_parameter"
    http_status = 400

    def __init__(self, message: str, field: str = "") -> None:
        super().__init__(message, field)

    @property
    def field(self) -> str:
        """The knob or column that is wrong, or an empty string."""
        return str(self.args[1])


class ImageError(RowError):
    """The input image cannot be used. Replace the picture, then use `--retry`."""

    code = "bad_image"
    http_status = 400


class ImageNotFound(ImageError):
    """There is no image at the reference. Correct the reference, or put the picture there and use `--retry`."""

    code = "image_not_found"


class UnsupportedImage(ImageError):
    """Not a picture, or of a format or mode that is not read. Save it as JPEG, PNG or WebP."""

    code = "unsupported_image"


class ImageTruncated(ImageError):
    """The file is cut off or damaged. Replace the picture, then use `--retry`."""

    code = "image_truncated"


class ImageTooLarge(ImageError):
    """Over the cap on bytes, pixels, side length or aspect ratio. Scale it down, or raise `max_image_pixels`."""

    code = "image_too_large"
    http_status = 413


class ImageTooSmall(ImageError):
    """Under the smallest side that makes sense. Give a larger picture."""

    code = "image_too_small"


class InputChanged(RowError):
    """A file of this row changed after the run had planned it. Run again, which plans the row anew."""

    code = "input_changed"
    fault = "world"
    retryable = True
    http_status = 409


class FetchError(RowError):
    """An https:// input could not be fetched. Open the URL, correct it, then use `--retry`."""

    code = "fetch_failed"
    http_status = 400

    @property
    def answered(self) -> int | None:
        """The status that the server answered, where that is known."""
        return int(self.args[2]) if len(self.args) > 2 else None


class AddressRefused(FetchError):
    """The URL leads to a private address, or has a refused scheme, port or password. Give a public https:// URL."""

    code = "address_refused"


class FetchDenied(FetchError):
    """The server answered 401 or 403. Give a URL that needs no login, or one that is signed."""

    code = "fetch_denied"


class FetchOptedOut(FetchError):
    """The picture's owner refuses models by X-Robots-Tag. Leave it out; `--ignore-opt-outs` fetches what you own."""

    code = "fetch_opted_out"
    http_status = 403


class FetchUnavailable(FetchError):
    """The server was unreachable, too slow, or answered 408, 425, 429 or 5xx. The same command tries the row again."""

    code = "fetch_unavailable"
    fault = "world"
    retryable = True
    http_status = 502

    @property
    def retry_after_s(self) -> float | None:
        """The pause that the server asks for, 0 where it names no time; None where it is not asked too often."""
        return float(self.args[1]) if len(self.args) > 1 and self.args[1] is not None else None


class StorageError(RowError):
    """A read or write of local disk or S3 failed. The message holds the store's own reason."""

    code = "storage_failed"


class StorageNotFound(StorageError):
    """No such file, object or bucket. Correct the path or URI."""

    code = "storage_not_found"
    http_status = 404


class StorageDenied(StorageError):
    """The credentials or file permissions do not allow it. Check the AWS variables, the role or the file's owner."""

    code = "storage_denied"
    fault = "world"


class StorageDamaged(StorageError):
    """An object's bytes are not those of its checksum. Restore it, or make its video again with `--remake`."""

    code = "storage_damaged"


class StorageThrottled(StorageError):
    """The store kept saying that it is asked too often. Run again later, or with fewer actors."""

    code = "storage_throttled"
    fault = "world"
    retryable = True
    http_status = 503


class StorageUnavailable(StorageError):
    """The store was unreachable, answered 5xx, or the disk is full. Run again when it is well again."""

    code = "storage_unavailable"
    fault = "world"
    retryable = True
    http_status = 503


class StorageTooLarge(StorageError):
    """The file or object is larger than the reader accepts. Give a smaller file."""

    code = "storage_too_large"
    http_status = 413


class ModelUnavailable(RowError):
    """The model of the row's style could not be loaded. Correct the style's settings, then run again."""

    code = "model_unavailable"
    fault = "world"
    http_status = 503


class OutOfMemory(RowError):
    """The row does not fit on this device even alone. Ask for fewer frames or pixels, or set `offload`."""

    code = "out_of_memory"
    retryable = True
    http_status = 507


class NonFiniteFrames(RowError):
    """The model produced NaN or infinite values for this row. Set `vae_dtype: float32` or `dtype: float32`."""

    code = "nan_frames"


class NotAccepted(RowError):
    """Every take misses a bound of `accept`, and `unaccepted` is fail. Raise `retakes`, or ease the bounds."""

    code = "not_accepted"
    http_status = 422


class UnsafeContent(RowError):
    """The safety checker found a frame that is not safe. Change picture, prompt or seed; `safety: flag` keeps it."""

    code = "content_policy_violation"
    http_status = 400


class VideoError(RowError):
    """Frames could not be encoded, or the finished file did not verify. Try another format."""

    code = "bad_video"


class Timeout(RowError):
    """The row's deadline passed. Raise `row_timeout_s` or `sync_timeout_s`, or ask for less work."""

    code = "timeout"
    retryable = True
    http_status = 504


class Cancelled(RowError):
    """The caller took the request back, or the engine is shutting down. Send it again if it is still wanted."""

    code = "cancelled"
    fault = "world"
    retryable = True
    http_status = 499


class Busy(RowError):
    """So many requests wait already that this one is refused. Arguments: message, seconds after which to try again."""

    code = "busy"
    fault = "world"
    retryable = True
    http_status = 429

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message, retry_after_s)

    @property
    def retry_after_s(self) -> float:
        """Seconds after which a queued request will probably have gone."""
        return float(self.args[1])


class NotReady(RowError):
    """Nothing takes up requests now: engines start, or this process is to be replaced. Send it again soon."""

    code = "not_ready"
    fault = "world"
    retryable = True
    http_status = 503


class NotFound(RowError):
    """The endpoint has no such video, file or batch, or another key owns it. Check id and key."""

    code = "not_found"
    http_status = 404


class Conflict(RowError):
    """The request contradicts the state of its object, as a video that is not ready yet. Read the state first."""

    code = "conflict"
    http_status = 409


class RateLimited(Busy):
    """One caller calls more often than it may. Send it again after Retry-After seconds."""

    code = "rate_limited"


class QuotaExceeded(Busy):
    """The key has used up a quota of the endpoint for today. Wait for the next day (UTC), or raise the quota."""

    code = "insufficient_quota"


class RequestError(RowError):
    """An HTTP request that the endpoint refuses before it reads knobs, or whose body cannot be read. Correct it."""

    code = "bad_request"
    http_status = 400


class Unauthorized(RequestError):
    """No API key, or one that is not known. Send `Authorization: Bearer KEY`."""

    code = "invalid_api_key"
    http_status = 401


class Forbidden(RequestError):
    """This caller may not do this, as a web page of another origin. Call by the endpoint's own name."""

    code = "forbidden"
    http_status = 403


class NotAcceptable(RequestError):
    """No kind of answer that the caller accepts can be given. Accept `video/mp4` or `application/json`."""

    code = "not_acceptable"
    http_status = 406


class SlowBody(RequestError):
    """The request's body did not arrive in time. Send it again over a faster connection, or raise `body_timeout_s`."""

    code = "slow_body"
    retryable = True
    http_status = 408


class BodyTooLarge(RequestError):
    """The request's body is larger than the endpoint takes. Send less, or raise `max_body_bytes`."""

    code = "body_too_large"
    http_status = 413


class UnsupportedBody(RequestError):
    """The request's body is of a type that is not read. Send JSON or multipart/form-data."""

    code = "unsupported_body"
    http_status = 415


class Unsupported(RequestError):
    """A call of OpenAI's videos API for which the endpoint has nothing. The message names the way that there is."""

    code = "unsupported"
    http_status = 400


class HeadersTooLarge(RequestError):
    """The request's headers are more or longer than any client of ours needs. Send fewer."""

    code = "headers_too_large"
    http_status = 431


class JobNotFound(NotFound):
    """The caller has no video job of that id. Check id and key; a completed job is removed after `job_ttl_s`, and a
    failed one after `failed_job_ttl_s`."""

    code = "job_not_found"
    http_status = 404


class JobConflict(Conflict):
    """The video job has moved on, or its idempotency key was used for another request. Read the job first."""

    code = "job_conflict"
    http_status = 409


class WorkerDied(RowError):
    """The worker process died on every attempt at this row. Read its node's log; then use `--retry worker_died`."""

    code = "worker_died"
    retryable = True


class UnexpectedError(RowError):
    """A bug or an unknown fault; the traceback is in the message. Report it; `--retry unexpected` tries again."""

    code = "unexpected"
    retryable = True


def row_errors() -> dict[str, type[RowError]]:
    """`RowError` and every class below it, by code, parents first."""
    found: dict[str, type[RowError]] = {}
    waiting = [RowError]
    while waiting:
        kind = waiting.pop(0)
        found[kind.code] = kind
        waiting = [*kind.__subclasses__(), *waiting]
    return found


def run_errors() -> dict[str, type[JobError]]:
    """`JobError` and every class below it, by code."""
    found: dict[str, type[JobError]] = {}
    waiting = [JobError]
    while waiting:
        kind = waiting.pop()
        found[kind.code] = kind
        waiting += kind.__subclasses__()
    return found
