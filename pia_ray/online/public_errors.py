"""Errors as callers of the endpoint may see them: a code, a message without internals, and whether to try again."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from pia_ray.errors import JobError, PiaRayError, StorageError, UnexpectedError


class Fault(BaseModel):
    """Why a job failed, as its owner is told."""

    model_config = ConfigDict(frozen=True)

    code: str
    message: str


def public_fault(error: PiaRayError) -> Fault:
    """What the maker of a request may be told of an error: no traceback, no path or bucket of this side."""
    match error:
        case UnexpectedError():
            message = "Something unexpected happened; the server's log says what, under this id."
        case StorageError():
            message = "The server could not read or write its storage."
        case JobError():
            message = "The server's engine cannot run at present; its log says why, under this id."
        case _:
            message = error.message
    return Fault(code=error.code, message=message)
