"""Middlewares of Serve's HTTP proxies: they drop headers that are not for clients, and give refusals their shape.

They run in the processes of the proxies, where the endpoint's config is not known.
"""

from __future__ import annotations

import json
import logging
import secrets
from typing import Final

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pia_ray.errors import HeadersTooLarge
from pia_ray.online.http import error_responses, limits
from pia_ray.online.http.middleware import SERVE_HEADERS

log = logging.getLogger(__name__)

PROXY_CALLBACK: Final = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
"""Environment variable of Serve's proxies that names a function which returns middlewares."""


def proxy_middlewares() -> list[Middleware]:
    """The middlewares that Serve's HTTP proxies put around every application.

    The proxies start with `RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=pia_ray.online.serve:proxy_middlewares` in their
    environment.
    """
    return [Middleware(StripOverrides), Middleware(ShapeRefusals)]


class StripOverrides:
    """Drops the headers of `SERVE_HEADERS` from requests, before Serve reads them, and refuses floods of headers,
    before they travel on to a replica."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request, as ASGI has it."""
        if scope["type"] == "http":
            try:
                limits.check_headers(scope["headers"])
            except HeadersTooLarge as error:
                refusal = error_responses.answer(error)
                refusal.headers["x-request-id"] = _new_id()
                await refusal(scope, receive, send)
                return
            headers = [
                (name, value) for name, value in scope["headers"] if name.decode("latin-1").lower() not in SERVE_HEADERS
            ]
            scope = {**scope, "headers": headers}
        await self._app(scope, receive, send)


class ShapeRefusals:
    """Gives what Serve itself refuses the shape of the endpoint's errors: its own answers are plain text.

    They are told by their lack of a length, which every application's answers have that are not streamed. Where a
    replica dies before it answers Serve says nothing at all.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request, as ASGI has it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = shaped = gone = False

        async def receive_noting() -> Message:
            nonlocal gone
            message = await receive()
            gone = gone or message["type"] == "http.disconnect"
            return message

        async def send_shaped(message: Message) -> None:
            nonlocal started, shaped
            if message["type"] == "http.response.start":
                started = True
                headers = Headers(raw=message["headers"])
                if message["status"] in _REFUSALS and _is_serves_own(headers):
                    shaped = True
                    await _refuse(send, message["status"], headers)
            if not shaped:
                await send(message)

        await self._app(scope, receive_noting, send_shaped)
        if not started and not gone:
            await _refuse(send, 500, Headers())


_REFUSALS: Final = {
    404: ("not_found", "invalid_request_error", "There is nothing at this address."),
    408: ("timeout", "invalid_request_error", "It took longer than Serve's request_timeout_s allows."),
    429: ("busy", "rate_limit_error", "Too many requests wait already: try again after `retry-after` seconds."),
    500: ("worker_died", "server_error", "The process that had the request died: try again."),
    503: ("not_ready", "server_error", "Nothing takes up requests now: try again in some seconds."),
}


def _is_serves_own(headers: Headers) -> bool:
    return headers.get("content-type", "").startswith("text/plain") and "content-length" not in headers


async def _refuse(send: Send, status: int, serves: Headers) -> None:
    """Says it in our shape; of Serve's own headers the wait and the request's id are kept."""
    code, kind, message = _REFUSALS[status]
    content = json.dumps(error_responses.body(message, code=code, kind=kind)).encode()
    identity = serves.get("x-request-id") or _new_id()
    log.warning("%s: Serve answers %d", identity, status)
    headers = {
        "content-type": "application/json",
        "content-length": str(len(content)),
        "cache-control": "no-store",
        "x-request-id": identity,
        "x-should-retry": "false" if status == 404 else "true",
    }
    if status == 429:
        headers["retry-after"] = serves.get("retry-after") or "1"
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": content})


def _new_id() -> str:
    return f"req_{secrets.token_hex(12)}"
