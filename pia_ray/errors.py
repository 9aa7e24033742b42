"""The error tree of pia-ray, in one place.

A `JobError` means that a run cannot start or go on (the command line exits with 2). A `RowError` belongs to one row
or request only: it becomes a failed row, or an HTTP status. Every class has a stable `code`, says whether trying
again can help (`retryable`), and names the HTTP status that fits.

    PiaRayError
    ├── JobError
    │   ├── ConfigError           a knob, flag or config file is wrong
    │   ├── ManifestError         the manifest as a whole cannot be used
    │   ├── OutputError           the output cannot be written
    │   ├── WeightsError          a model's weights are missing or unusable
    │   ├── LeaseHeld             another run is at work on this output
    │   ├── LedgerError           the ledger is damaged beyond what a rerun mends
    │   └── DeviceLost            the GPU is unusable for this process; a new one may work
    └── RowError
        ├── BadParameter          a knob of this row has no valid value
        ├── ImageError            ImageNotFound, UnsupportedImage, ImageTruncated, ImageTooLarge, ImageTooSmall
        ├── FetchError            AddressRefused, FetchDenied, FetchUnavailable
        ├── StorageError          StorageNotFound, StorageDenied, StorageThrottled, StorageUnavailable, StorageTooLarge
        ├── ModelUnavailable      the model of the row's style could not be loaded
        ├── OutOfMemory           the row does not fit, alone, on this device
        ├── NonFiniteFrames       the model produced NaN or infinite values
        ├── VideoError            frames could not be encoded, or the finished file did not verify
        ├── Timeout, Cancelled    the row's deadline passed; the caller took the request back
        ├── Busy                  too many requests wait already; RateLimited: too many calls of one caller
        ├── NotReady              no engine of the endpoint runs, or a process of it has to be replaced
        ├── RequestError          Unauthorized, Forbidden, NotAcceptable, SlowBody, BodyTooLarge, UnsupportedBody,
        │                         HeadersTooLarge: an HTTP request that the endpoint refuses, whatever its knobs say
        ├── NotFound              the endpoint has no such file or batch, or it is another key's; JobNotFound: video
        ├── Conflict              what is asked for contradicts what is there; JobConflict: a video job has moved on
        ├── WorkerDied            the process died each time this row was tried
        └── UnexpectedError       a bug or an unknown fault; the traceback is in the message
"""

from __future__ import annotations

from typing import ClassVar


class PiaRayError(Exception):
    """Base of all errors of this package. All state is in positional arguments, so errors survive pickling."""

    code: ClassVar[str] = "error"
    retryable: ClassVar[bool] = False
    http_status: ClassVar[int] = 500

    @property
    def message(self) -> str:
        """What happened and what to do, in one or two sentences."""
        return str(self.args[0]) if self.args else self.code

    def __str__(self) -> str:
        return self.message


class JobError(PiaRayError):
    """The run cannot start or go on; nothing (more) is animated."""

    code = "job_error"


class ConfigError(JobError):
    """A knob, flag or configuration file is wrong."""

    code = "bad_config"


class ManifestError(JobError):
    """The manifest as a whole cannot be used."""

    code = "bad_manifest"


class OutputError(JobError):
    """The output location cannot be written or read."""

    code = "bad_output"


class WeightsError(JobError):
    """A model's weights are missing, damaged or of a kind that is refused."""

    code = "bad_weights"


class LeaseHeld(JobError):
    """Another run holds this output."""

    code = "lease_held"


class LedgerError(JobError):
    """The ledger is damaged beyond what a rerun mends."""

    code = "bad_ledger"


class DeviceLost(JobError):
    """The GPU is in a state that only a new process mends."""

    code = "device_lost"


class RowError(PiaRayError):
    """This row or request only."""

    code = "row_error"


class BadParameter(RowError):
    """A knob has no valid value. Arguments: message, name of the field."""

    code = "bad_parameter"
    http_status = 400

    def __init__(self, message: str, field: str = "") -> None:
        super().__init__(message, field)

    @property
    def field(self) -> str:
        """The knob or column that is wrong, or an empty string."""
        return str(self.args[1])


class ImageError(RowError):
    """The input image cannot be used."""

    code = "bad_image"
    http_status = 400


class ImageNotFound(ImageError):
    """There is no image at the reference."""

    code = "image_not_found"


class UnsupportedImage(ImageError):
    """Not a picture, or of a format or mode that is not read."""

    code = "unsupported_image"


class ImageTruncated(ImageError):
    """The file is cut off or damaged."""

    code = "image_truncated"


class ImageTooLarge(ImageError):
    """Over the cap on bytes, pixels, side length or aspect ratio."""

    code = "image_too_large"
    http_status = 413


class ImageTooSmall(ImageError):
    """Under the smallest side that makes sense."""

    code = "image_too_small"


class FetchError(RowError):
    """An https:// input could not be fetched."""

    code = "fetch_failed"
    http_status = 400


class AddressRefused(FetchError):
    """The URL leads to an address that is not public, or uses a scheme, port or credentials that are refused."""

    code = "address_refused"


class FetchDenied(FetchError):
    """The server answered 401 or 403."""

    code = "fetch_denied"


class FetchUnavailable(FetchError):
    """The server was unreachable, too slow, or answered 429 or 5xx."""

    code = "fetch_unavailable"
    retryable = True
    http_status = 502


class StorageError(RowError):
    """A read or write of local disk or S3 failed."""

    code = "storage_failed"


class StorageNotFound(StorageError):
    """No such file, object or bucket."""

    code = "storage_not_found"
    http_status = 404


class StorageDenied(StorageError):
    """The credentials or file permissions do not allow it."""

    code = "storage_denied"


class StorageThrottled(StorageError):
    """The store kept saying that it is asked too often."""

    code = "storage_throttled"
    retryable = True
    http_status = 503


class StorageUnavailable(StorageError):
    """The store was unreachable, answered 5xx, or the disk is full."""

    code = "storage_unavailable"
    retryable = True
    http_status = 503


class StorageTooLarge(StorageError):
    """The file or object is larger than the reader accepts."""

    code = "storage_too_large"
    http_status = 413


class ModelUnavailable(RowError):
    """The model of the row's style could not be loaded."""

    code = "model_unavailable"
    http_status = 503


class OutOfMemory(RowError):
    """The row does not fit on this device even alone."""

    code = "out_of_memory"
    retryable = True
    http_status = 507


class NonFiniteFrames(RowError):
    """The model produced NaN or infinite values for this row."""

    code = "nan_frames"


class VideoError(RowError):
    """Frames could not be encoded, or the finished file did not verify."""

    code = "bad_video"


class Timeout(RowError):
    """The row's deadline passed."""

    code = "timeout"
    retryable = True
    http_status = 504


class Cancelled(RowError):
    """The caller took the request back, or the engine is shutting down."""

    code = "cancelled"
    retryable = True
    http_status = 499


class Busy(RowError):
    """So many requests wait already that this one is refused. Arguments: message, seconds after which to try again."""

    code = "busy"
    retryable = True
    http_status = 429

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message, retry_after_s)

    @property
    def retry_after_s(self) -> float:
        """About when a place falls free, in seconds from now."""
        return float(self.args[1])


class NotReady(RowError):
    """Nothing takes up requests now: engines start, or this process is to be replaced."""

    code = "not_ready"
    retryable = True
    http_status = 503


class NotFound(RowError):
    """The endpoint has no such video, file or batch; also what others than its owner hear."""

    code = "not_found"
    http_status = 404


class Conflict(RowError):
    """What is asked for contradicts what is there: an Idempotency-Key used twice, a video not ready yet."""

    code = "conflict"
    http_status = 409


class RateLimited(Busy):
    """One caller calls more often than it may."""

    code = "rate_limited"


class RequestError(RowError):
    """An HTTP request that the endpoint refuses, whatever its knobs say, or whose body cannot be read."""

    code = "bad_request"
    http_status = 400


class Unauthorized(RequestError):
    """No API key, or one that is not known."""

    code = "invalid_api_key"
    http_status = 401


class Forbidden(RequestError):
    """This caller may not do this: a web page of another origin, a name that does not lead here."""

    code = "forbidden"
    http_status = 403


class NotAcceptable(RequestError):
    """No kind of answer that the caller accepts can be given."""

    code = "not_acceptable"
    http_status = 406


class SlowBody(RequestError):
    """The request's body did not arrive in time."""

    code = "slow_body"
    retryable = True
    http_status = 408


class BodyTooLarge(RequestError):
    """The request's body is larger than the endpoint takes."""

    code = "body_too_large"
    http_status = 413


class UnsupportedBody(RequestError):
    """The request's body is of a type that is not read."""

    code = "unsupported_body"
    http_status = 415


class HeadersTooLarge(RequestError):
    """The request's headers are more or longer than any client of ours needs."""

    code = "headers_too_large"
    http_status = 431


class JobNotFound(NotFound):
    """The caller has no video job of that id."""

    code = "job_not_found"
    http_status = 404


class JobConflict(Conflict):
    """The video job has moved on, is in other hands, or its idempotency key was used for another request."""

    code = "job_conflict"
    http_status = 409


class WorkerDied(RowError):
    """The worker process died on every attempt at this row."""

    code = "worker_died"
    retryable = True


class UnexpectedError(RowError):
    """A bug or an unknown fault; the traceback is in the message."""

    code = "unexpected"
    retryable = True
