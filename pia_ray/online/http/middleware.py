"""The middleware around all routes: request ids, API keys, rate and body limits, headers, the log line, the metrics.

It sees every request before any of it is parsed, and every answer. No route can be reached without it.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import re
import secrets
import time
from contextlib import ExitStack
from typing import Annotated, Final
from urllib.parse import quote, urlsplit

from fastapi import Depends, Request, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import SecretStr
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pia_ray import logs
from pia_ray.config.serve import ServeConfig, is_loopback
from pia_ray.errors import BadParameter, Forbidden, PiaRayError, Unauthorized, UnsupportedBody
from pia_ray.online.http import bodies, error_responses, limits
from pia_ray.online.http.api_keys import ANONYMOUS, KeyRing
from pia_ray.online.http.callers import CallerAddresses
from pia_ray.online.http.metrics import Metrics
from pia_ray.online.http.queries import check_query
from pia_ray.online.usage import Amounts, Usage

logger = logging.getLogger(__name__)

HEALTH: Final = ("/healthz", "/readyz")
"""Paths that are open to everybody who reaches the port: probes have no keys, and use any host name."""

METRICS: Final = "/metrics"

_OPERATOR: Final = "/operator"
_PUBLIC: Final = ("/", "/favicon.ico", _OPERATOR)
_PUBLIC_FOLDER: Final = "/page/"

SERVE_HEADERS: Final = ("x-request-timeout-seconds", "x-request-disconnect-disabled")
"""Headers by which a client of Serve may switch off its timeout, and that hanging up cancels (ray 2.60)."""

_STATUS: Final = re.compile("/v1/(videos|batches)/[^/]+")
"""Paths of jobs and batches, which clients poll."""

_MAKES_NOTHING: Final = ("/cancel", "/webhook/redeliver")
"""Ends of the paths of POST calls that quotas do not count."""

_HUNG_UP: Final = 499

_RESPONSE_HEADERS: Final = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
}
"""Headers of answers that do not set them."""

_bearer = HTTPBearer(auto_error=False, scheme_name="api_key", description="An API key of this endpoint.")


def _owner(request: Request, _: Annotated[HTTPAuthorizationCredentials | None, Security(_bearer)]) -> str:
    check_query(request)
    return str(request.state.owner)


Owner = Annotated[str, Depends(_owner)]
"""In a route's parameters: the owner of the caller's objects. The middleware has checked the key, this the query."""


def caller(request: Request) -> str:
    """The owner of the caller's key; the address of a caller without one."""
    return str(request.state.caller)


def request_id(request: Request) -> str:
    """The id of this request in the log."""
    return str(request.state.request_id)


class EndpointMiddleware:
    """The ASGI middleware around all routes."""

    def __init__(self, app: ASGIApp, config: ServeConfig, keys: KeyRing, metrics: Metrics, usage: Usage) -> None:
        self._app = app
        self._config = config
        self._keys = keys
        self._metrics = metrics
        self._usage = usage
        self._rate = limits.RateLimit(config.requests_per_minute)
        self._wrong_keys = limits.RateLimit(config.requests_per_minute)
        self._open = limits.OpenRequests(config.max_requests_per_key)
        self._memory = bodies.BodyMemory(
            bodies.LARGEST_BODIES * config.max_body_bytes, caller_bytes=bodies.LARGEST_OF_CALLER * config.max_body_bytes
        )
        self._body_limits = bodies.BodyLimits(
            config.max_body_bytes, timeout_s=config.body_timeout_s, bytes_per_s=config.min_body_bytes_per_s
        )
        self._addresses = CallerAddresses(config.trusted_proxies)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        headers = Headers(scope=scope)
        state = scope.setdefault("state", {})
        state["request_id"] = identity = _request_id(headers.get("x-request-id"))
        state["owner"] = ANONYMOUS
        logs.add_fields(request_id=identity)
        exchange = _Exchange(receive, send, identity)
        scope["headers"] = [pair for pair in scope["headers"] if pair[0].decode("latin-1") not in SERVE_HEADERS]
        try:
            with ExitStack() as held:
                try:
                    limits.check_headers(scope["headers"])
                    state["owner"] = self._admit(scope, headers, exchange)
                    announced = bodies.announced_bytes(
                        headers.get("content-length"),
                        chunked="transfer-encoding" in headers,
                        max_bytes=self._config.max_body_bytes,
                    )
                    if exchange.caller:
                        held.enter_context(self._open.hold(exchange.caller))
                    add_bytes = held.enter_context(self._memory.hold(exchange.caller, announced))
                except PiaRayError as error:
                    await error_responses.answer(error)(scope, receive, exchange.send)
                    return
                body = bodies.limited(exchange.receive, self._body_limits, add_bytes)
                await self._app(scope, body, exchange.send)
        except asyncio.CancelledError:  # Ray Serve cancels the request of a caller that hangs up
            exchange.note_hang_up()
            raise
        finally:
            seconds = time.perf_counter() - started
            route = getattr(scope.get("route"), "path", "unmatched")
            status = exchange.status
            self._metrics.answered(route, scope["method"], status, seconds)
            method, path = quote(scope["method"]), quote(scope["path"])[:200]
            logger.info("%s %s %s %d %.3f s %s", identity, method, path, status, seconds, state["owner"])

    def _admit(self, scope: Scope, headers: Headers, exchange: _Exchange) -> str:
        """The owner of the request's key. The exchange learns the caller.

        Raises:
            PiaRayError: the request is refused.
        """
        path = scope["path"]
        if path in HEALTH:
            return ANONYMOUS
        if path == METRICS:
            self._check_metrics(scope, headers)
            return ANONYMOUS
        _check_serve_headers(headers)
        if headers.get("content-encoding", "identity").strip().lower() not in ("", "identity"):
            raise UnsupportedBody("Compressed bodies are not read: send the body without content-encoding.")
        if not self._keys.open or self._config.allow_anonymous:
            pass
        elif not is_loopback(_host(headers)):
            # A page of another site could resolve its own name to 127.0.0.1 (DNS rebinding) and read every answer.
            raise Forbidden("This endpoint answers on localhost only; give it api_keys to reach it by other names.")
        if path in _PUBLIC or path.startswith(_PUBLIC_FOLDER):
            return ANONYMOUS
        address = f"address {self._addresses.of(scope, headers)}"
        if path.startswith(f"{_OPERATOR}/") and self._config.operator_key is not None:
            self._check_operator(self._config.operator_key, headers, address)
            exchange.caller = "operator"
            return ANONYMOUS
        try:
            owner = self._keys.owner_of(_key(headers))
        except Unauthorized:
            self._wrong_keys.take(address)
            raise
        if owner == ANONYMOUS:
            _check_origin(headers)
        exchange.caller = scope["state"]["caller"] = owner if owner != ANONYMOUS else address
        try:
            is_status = scope["method"] in ("GET", "HEAD") and _STATUS.fullmatch(path) is not None
            self._rate.take(exchange.caller, cost=limits.STATUS_COST if is_status else 1.0)
        finally:
            exchange.headers = self._rate.allowance(exchange.caller).headers
        if scope["method"] == "POST" and not path.endswith(_MAKES_NOTHING):
            self._usage.check(owner)
            self._usage.add(owner, Amounts(num_requests=1))
        return owner

    def _check_operator(self, key: SecretStr, headers: Headers, address: str) -> None:
        given = _key(headers)
        if given is None or not secrets.compare_digest(given.encode(), key.get_secret_value().encode()):
            self._wrong_keys.take(address)
            raise Unauthorized("The operator's key is needed: send it as `Authorization: Bearer <operator_key>`.")

    def _check_metrics(self, scope: Scope, headers: Headers) -> None:
        token = self._config.metrics_token
        if token is not None:
            given = _key(headers)
            if given is None or not secrets.compare_digest(given.encode(), token.get_secret_value().encode()):
                raise Forbidden("/metrics needs its token: `Authorization: Bearer <metrics_token>`.")
            return
        client = scope.get("client")
        forwarded = any(name in headers for name in ("forwarded", "x-forwarded-for", "x-real-ip"))
        if client is None or forwarded or not _is_this_machine(client[0]):
            raise Forbidden("/metrics is for this machine only; set metrics_token to read it from elsewhere.")


class _Exchange:
    """The messages of one request: notes the status, and sets the headers of every answer."""

    def __init__(self, receive: Receive, send: Send, identity: str) -> None:
        self._receive = receive
        self._send = send
        self._identity = identity
        self._began = False
        self.caller = ""
        """The owner, or the address of a caller without a key; empty for public paths and refused callers."""
        self.headers: dict[str, str] = {}
        """More headers of the answer."""
        self.status = 500
        """Of ServerErrorMiddleware, which is outside of this one, if an exception gets that far; 499 for a caller that
        hung up before the answer began: no one reads that answer, and its own status would count as a fault."""

    async def receive(self) -> Message:
        """The next message of the caller."""
        message = await self._receive()
        if message["type"] == "http.disconnect":
            self.note_hang_up()
        return message

    async def send(self, message: Message) -> None:
        """Sends a message of the answer."""
        if message["type"] == "http.response.start":
            if self.status != _HUNG_UP:
                self.status = message["status"]
            self._began = True
            headers = MutableHeaders(scope=message)
            headers.update(self.headers)
            mark(headers, self._identity)
        await self._send(message)

    def note_hang_up(self) -> None:
        """Notes that the caller has hung up."""
        if not self._began:
            self.status = _HUNG_UP


def mark(headers: MutableHeaders, identity: str) -> None:
    """Sets the headers of every answer."""
    headers["x-request-id"] = identity
    for name, value in _RESPONSE_HEADERS.items():
        headers.setdefault(name, value)


def _request_id(given: str | None) -> str:
    """The caller's own id if it is fit for a log, so that a call can be followed through servers; else a new one."""
    if given is not None and re.fullmatch(r"[A-Za-z0-9._:-]{1,64}", given):
        return given
    return f"req_{secrets.token_hex(12)}"


def _key(headers: Headers) -> str | None:
    scheme, _, key = headers.get("authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" and key.strip() else None


def _host(headers: Headers) -> str:
    try:
        return urlsplit(f"//{headers.get('host', '')}").hostname or ""
    except ValueError:
        return ""


def _check_origin(headers: Headers) -> None:
    """Refuses forms of other sites' pages: a browser posts them anywhere, and without a key nothing else marks them."""
    origin = headers.get("origin")
    if origin is not None and _netloc(origin) != headers.get("host", "").lower():
        raise Forbidden("Pages of other origins may not call this endpoint without an API key.")


def _netloc(origin: str) -> str:
    """Host and port of an Origin header; an empty string for "null" and for an invalid one."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""


def _check_serve_headers(headers: Headers) -> None:
    """Refuses values that switch something off: Serve's proxy obeys these headers before an application sees them."""
    timeout, goes_on = (headers.get(name) for name in SERVE_HEADERS)
    if timeout is not None and re.fullmatch(r"0*[1-9][0-9]{0,4}(\.[0-9]+)?", timeout) is None:
        raise BadParameter(f"{SERVE_HEADERS[0]} must be a number of seconds of 1 or more", SERVE_HEADERS[0])
    if goes_on not in (None, "?0"):
        raise BadParameter(f"{SERVE_HEADERS[1]} must be ?0: hanging up cancels a request", SERVE_HEADERS[1])


def _is_this_machine(address: str) -> bool:
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return False
    mapped = getattr(found, "ipv4_mapped", None)
    return (mapped or found).is_loopback
