"""Errors as callers of the endpoint may see them: a code, a message without internals, retryable or not."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from pia_ray.errors import JobError, PiaRayError, StorageError, UnexpectedError


class PublicError(BaseModel):
    """An error without traceback, path or bucket of the server."""

    model_config = ConfigDict(frozen=True)

    code: str
    message: str
    retryable: bool = False
    """Whether the same request may succeed later. Documents of 0.1.0 do not say it."""


def public_error(error: PiaRayError) -> PublicError:
    """The error as the maker of a request may see it."""
    match error:
        case UnexpectedError():
            message = "Something unexpected happened; the server's log says what, under this id."
        case StorageError():
            message = "The server could not read or write its storage."
        case JobError():
            message = "The server's engine cannot run at present; its log says why, under this id."
        case _:
            message = error.message
    return PublicError(code=error.code, message=message, retryable=error.retryable)


def shortened(text: str) -> str:
    """The caller's text, shortened for a message."""
    return text if len(text) <= 80 else f"{text[:77]}..."
