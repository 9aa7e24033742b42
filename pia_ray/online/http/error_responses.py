"""The HTTP answers to errors: status, headers, and a body in the shape that the openai clients read.

They hold no traceback, path or bucket of the server. The log has those, under the request's id.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from pia_ray.config.faults import fault_text
from pia_ray.errors import (
    BadParameter,
    Busy,
    Cancelled,
    JobError,
    PiaRayError,
    Unauthorized,
    UnexpectedError,
)
from pia_ray.online.public_errors import shortened
from pia_ray.online.video_jobs import public_error

_UNAVAILABLE: Final = 503
_RETRIED: Final = (408, 409, 429)
"""Statuses below 500 after which the openai clients try again."""

_CODES: Final = {
    400: "bad_request",
    404: "not_found",
    405: "method_not_allowed",
    413: "body_too_large",
    422: "bad_parameter",
}


def body(message: str, *, code: str, kind: str, param: str | None = None) -> dict[str, Any]:
    """The JSON of an error."""
    # Messages quote the caller's text, which may hold lone surrogates. No answer can.
    message = message.encode("utf-8", "replace").decode()
    param = None if param is None else param.encode("utf-8", "replace").decode()
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def body_of(error: PiaRayError) -> dict[str, Any]:
    """The JSON of an error without the internals of the server."""
    status = status_of(error)
    param = error.field or None if isinstance(error, BadParameter) else None
    return body(public_error(error).message, code=error.code, kind=_kind(status), param=param)


def status_of(error: PiaRayError) -> int:
    """The HTTP status of an error. `Cancelled` means that the engine shut down: its own cancel has no answer."""
    return _UNAVAILABLE if isinstance(error, Cancelled | JobError) else error.http_status


def answer(error: PiaRayError) -> JSONResponse:
    """The HTTP answer to an error."""
    status = status_of(error)
    return JSONResponse(body_of(error), status_code=status, headers=_headers(error, status))


async def of_error(_: Request, error: Exception) -> JSONResponse:
    """Handler of this package's own errors."""
    assert isinstance(error, PiaRayError)
    return answer(error)


async def of_framework(request: Request, error: Exception) -> JSONResponse:
    """Handler of the errors of routing and of forms: 404, 405, a broken multipart body."""
    assert isinstance(error, HTTPException)
    status = error.status_code
    code = _CODES.get(status, "bad_request")
    text = "There is nothing at this address." if status == 404 else str(error.detail)
    given = {name.lower(): value for name, value in (error.headers or {}).items()}
    headers = {**given, **(_methods_of(request) if status == 405 else {})}
    return JSONResponse(body(text, code=code, kind=_kind(status)), status_code=status, headers=headers)


async def of_validation(_: Request, error: Exception) -> JSONResponse:
    """Handler of wrong parameters of the path and the query."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    param = str(first["loc"][-1])
    fault = fault_text(first)
    text = f"{param} {fault}" if fault.startswith(("must", "is ")) else f"{param}: {fault}"
    if first["type"] == "extra_forbidden":
        text = f'there is no parameter "{shortened(param)}" here'
    return JSONResponse(body(text, code="bad_parameter", kind=_kind(422), param=param), status_code=422)


async def of_bug(_: Request, __: Exception) -> JSONResponse:
    """Handler of every other exception, which is a bug. The server logs it with its traceback."""
    return answer(UnexpectedError(""))


SCHEMA: Final[Mapping[str, Any]] = {
    "type": "object",
    "title": "Error",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string", "description": "The reason, and the remedy."},
                "type": {
                    "type": "string",
                    "enum": ["invalid_request_error", "authentication_error", "rate_limit_error", "server_error"],
                },
                "param": {"type": ["string", "null"], "description": "Name of the wrong field."},
                "code": {"type": "string", "description": "Stable name of the error."},
            },
        }
    },
}
"""JSON schema of every error's body."""


def responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The errors of a route for its OpenAPI entry: these, and those of every route."""
    content = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    every = {*statuses, 400, 401, 403, 408, 413, 422, 429, 431, 500, 503}
    return {status: {"description": _MEANINGS[status], "content": content} for status in sorted(every)}


_MEANINGS: Final = {
    400: "The request, a knob or a picture cannot be used; `param` names the field.",
    401: "There is no API key, or an unknown one.",
    403: "Refused, because it comes from a page of another origin or under a wrong host name.",
    404: "There is no such object, or it belongs to another key.",
    406: "None of the accepted types is available.",
    408: "The request's body did not arrive in time.",
    409: "The request contradicts the state of the object.",
    413: "The body or a picture is too large.",
    415: "The body's content type is not supported.",
    422: "A parameter of the path or the query is wrong, or no take of the video is accepted.",
    429: "Too many requests; `retry-after` says when to try again.",
    431: "The headers are too many or too long.",
    500: "The server failed; its log has the reason under the request's id.",
    502: "A picture's server could not be reached.",
    503: "Not available at present.",
    504: "It took longer than the server allows.",
    507: "It does not fit into the GPU's memory even alone.",
}


def _methods_of(request: Request) -> dict[str, str]:
    """The `allow` header with the methods of all routes of an address; the framework names those of the first route."""
    path = getattr(request.scope.get("route"), "path", "")
    methods = request.app.openapi()["paths"].get(path, {})
    return {"allow": ", ".join(sorted(method.upper() for method in methods))} if methods else {}


def _kind(status: int) -> str:
    if status in (401, 403):
        return "authentication_error"
    if status == 429:
        return "rate_limit_error"
    return "invalid_request_error" if status < 500 else "server_error"


def _headers(error: PiaRayError, status: int) -> dict[str, str]:
    headers = {}
    if status >= 500 or status in _RETRIED:
        headers["x-should-retry"] = "true" if error.retryable else "false"
    if isinstance(error, Busy):
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after_s)))
    if isinstance(error, Unauthorized):
        headers["www-authenticate"] = "Bearer"
    return headers
