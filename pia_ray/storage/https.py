"""https:// inputs fetched, and webhooks sent, so that a URL in a manifest or request reaches public servers only.

Every hop's name is resolved once, refused if any answer is not public, and connected at just those addresses. Bytes and
time are capped in all. Trying again belongs to the caller: errors say whether it can help.
"""

from __future__ import annotations

import contextlib
import functools
import ipaddress
import queue
import re
import ssl
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Final

import httpcore2
import httpx2

from pia_ray.errors import AddressRefused, FetchDenied, FetchError, FetchUnavailable, ImageNotFound, ImageTooLarge
from pia_ray.storage.addresses import Network, Resolver, is_public, resolve_by_system
from pia_ray.storage.host_rates import pause_of
from pia_ray.storage.web import Web


def fetch(
    url: str,
    *,
    max_bytes: int = 50_000_000,
    timeout_s: float = 30.0,
    max_redirects: int = 5,
    allowed_networks: Sequence[str] = (),
    resolve: Resolver = resolve_by_system,
    ssl_context: ssl.SSLContext | None = None,
    web: Web | None = None,
) -> bytes:
    """The bytes at an https:// URL. Takes no proxy, cookie or credential from anywhere; safe in threads.

    `timeout_s` covers everything from the first name lookup to the last byte, over all redirects, but not the wait for
    a host's turn. `allowed_networks` such as "10.1.0.0/16" may be reached although they are not public; `resolve` and
    `ssl_context` take the place of the system's resolver and of the known certificate authorities. `web` says what a
    run allows and asks for.

    Raises:
        AddressRefused: not https, credentials in the URL, a port that is refused, or an address that is not public;
            also where a redirect leads there.
        ImageNotFound: 404 or 410.
        FetchDenied: 401 or 403.
        FetchOptedOut: the picture's owner refuses models, and `web` obeys that.
        FetchUnavailable: 408, 425, 429, 5xx, too slow, broken off, or no connection; trying again can help.
        ImageTooLarge: more than `max_bytes`.
        FetchError: not a URL, or any other answer.
    """
    web = web or Web()
    networks = [ipaddress.ip_network(network) for network in (*allowed_networks, *web.allowed_networks)]
    backend = _GuardedBackend(resolve, networks, time.monotonic() + timeout_s)
    first = target = _checked(url, allow_http=web.allow_http)
    location = ""
    for hop in range(max_redirects + 1):
        try:
            target = _checked(_joined(target, location), allow_http=web.allow_http) if hop else first
            private = (target.scheme, first.scheme) != ("http", "https")
            answer = _get(target, backend, ssl_context, max_bytes, web=web, private=private)
        except AddressRefused as error:
            if hop:
                raise AddressRefused(f"{_shown(first)} redirects to where it must not: {error}") from None
            raise
        if isinstance(answer, bytes):
            return answer
        location = answer
    raise FetchError(f"{_shown(first)} redirects more than {max_redirects} times.")


def post(
    url: str,
    content: bytes,
    *,
    headers: Mapping[str, str],
    before_body: Callable[[], None] = lambda: None,
    timeout_s: float = 5.0,
    allowed_networks: Sequence[str] = (),
    resolve: Resolver = resolve_by_system,
    ssl_context: ssl.SSLContext | None = None,
) -> int:
    """The status with which an https:// URL answers these bytes; guarded as `fetch`. Follows no redirect.

    `before_body` is called once the server is connected, and keeps the bytes from being sent by what it raises.

    Raises:
        AddressRefused, FetchUnavailable: as `fetch`.
        FetchError: not a URL, or no valid certificate.
    """
    deadline = time.monotonic() + timeout_s
    backend = _GuardedBackend(resolve, [ipaddress.ip_network(network) for network in allowed_networks], deadline)
    target = _checked(url)
    fields = [(name.encode("ascii"), value.encode("ascii")) for name, value in headers.items()]
    fields.append((b"Content-Length", str(len(content)).encode("ascii")))

    def body() -> Iterator[bytes]:
        before_body()
        yield content

    with _exchange("POST", target, backend, ssl_context, headers=fields, body=body()) as answer:
        return answer.status


def check_url(url: str) -> None:
    """Refuses a URL that `fetch` and `post` would refuse before they resolve its name.

    Raises:
        AddressRefused, FetchError: as they.
    """
    _checked(url)


_LABEL: Final = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?")
_FIRST_FREE_PORT: Final = 1024  # below it, but for 443, stand mail and shells, where no picture is


def _checked(url: str | httpx2.URL, *, allow_http: bool = False) -> httpx2.URL:
    """The URL, parsed once, after all checks that need no lookup."""
    try:
        parsed = httpx2.URL(url)
    except (httpx2.InvalidURL, ValueError):
        raise FetchError("That is not a valid URL.") from None
    if parsed.scheme != "https" and not (allow_http and parsed.scheme == "http"):
        what = f"{parsed.scheme}://" if parsed.scheme else "a URL without a scheme"
        raise AddressRefused(f"{what} is refused; only https:// is taken.")
    if parsed.userinfo:
        raise AddressRefused(f"{_shown(parsed)} carries credentials; use a presigned URL or s3:// instead.")
    if parsed.port not in (None, 443) and not _FIRST_FREE_PORT <= parsed.port <= 65_535:
        allowed = f"443 and {_FIRST_FREE_PORT} to 65535"
        raise AddressRefused(f"{_shown(parsed)} uses port {parsed.port}; allowed are {allowed}.")
    if not _is_host(_host(parsed)):
        raise FetchError("That is not a valid URL: its host name cannot be one.")
    return parsed


def _joined(url: httpx2.URL, location: str) -> httpx2.URL:
    try:
        return url.join(location)
    except (httpx2.InvalidURL, ValueError):
        raise FetchError(f"{_shown(url)} redirects to something that is not a URL.") from None


def _is_host(host: str) -> bool:
    if ":" in host:
        try:
            return ipaddress.IPv6Address(host).scope_id is None
        except ValueError:
            return False
    return len(host) <= 253 and all(_LABEL.fullmatch(label) for label in host.split("."))


def _host(url: httpx2.URL) -> str:
    """The host as it is resolved and certified: ASCII, lower case, without the dot that marks a full name."""
    return url.raw_host.decode("ascii").removesuffix(".")


def _shown(url: httpx2.URL) -> str:
    """The URL for messages: without query and credentials, which may be signatures and secrets."""
    path = url.raw_path.partition(b"?")[0]  # still percent-encoded, so that no line break gets into a log
    shown = f"{url.scheme}://{(url.netloc + path).decode('ascii')}"
    return shown if len(shown) <= 200 else f"{shown[:197]}..."


@functools.cache
def _known_authorities() -> ssl.SSLContext:
    return httpcore2.default_ssl_context()


class _GuardedBackend(httpcore2.NetworkBackend):
    """Connects to public addresses only, and not beyond the deadline.

    The lookup, the check and the connection are one function, so that no name is resolved a second time between
    them (DNS rebinding).
    """

    def __init__(self, resolve: Resolver, allowed: Sequence[Network], deadline: float) -> None:
        self._resolve = resolve
        self._allowed = allowed
        self._deadline = deadline
        self._sockets = httpcore2.SyncBackend()

    def postpone(self, seconds: float) -> None:
        """Moves the deadline of what connects from now on."""
        self._deadline += seconds

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore2.SOCKET_OPTION] | None = None,
    ) -> httpcore2.NetworkStream:
        addresses = self._addresses(host, port)
        for index, address in enumerate(addresses):
            share = _left(self._deadline) / (len(addresses) - index)  # so that one dead address leaves time for others
            try:
                stream = self._sockets.connect_tcp(address, port, timeout=share)
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout):
                if index + 1 == len(addresses):
                    raise
            else:
                return _DeadlineStream(stream, self._deadline)
        raise httpcore2.ConnectError("the name has no addresses")

    def _addresses(self, host: str, port: int) -> list[str]:
        addresses = []
        for text in _within(self._deadline, lambda: self._resolve(host, port)):
            address = ipaddress.ip_address(text)
            if not (is_public(address) or any(address in network for network in self._allowed)):
                raise AddressRefused(f"{host} leads to an address that is not public ({address}).")
            addresses.append(str(address))
        return addresses


class _DeadlineStream(httpcore2.NetworkStream):
    """A stream whose reads and writes share one deadline, so that a server cannot stretch time by single bytes."""

    def __init__(self, stream: httpcore2.NetworkStream, deadline: float) -> None:
        self._stream = stream
        self._deadline = deadline

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._stream.read(max_bytes, timeout=_left(self._deadline))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._stream.write(buffer, timeout=_left(self._deadline))

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore2.NetworkStream:
        secured = self._stream.start_tls(ssl_context, server_hostname, timeout=_left(self._deadline))
        return _DeadlineStream(secured, self._deadline)

    def get_extra_info(self, info: str) -> object:
        return self._stream.get_extra_info(info)


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise httpcore2.ReadTimeout("out of time")
    return left


def _within(deadline: float, lookup: Callable[[], Sequence[str]]) -> Sequence[str]:
    """The answer of `lookup` before the deadline. System lookups take no timeout, and a name server may stay silent."""
    answers: queue.SimpleQueue[Sequence[str] | OSError | UnicodeError] = queue.SimpleQueue()

    def look_up() -> None:
        try:
            answers.put(lookup())
        except (OSError, UnicodeError) as error:  # handed over to the waiting thread
            answers.put(error)

    threading.Thread(target=look_up, name="pia-ray-lookup", daemon=True).start()
    try:
        answer = answers.get(timeout=_left(deadline))
    except queue.Empty:
        raise httpcore2.ConnectTimeout("the name lookup took too long") from None
    if isinstance(answer, (OSError, UnicodeError)):
        raise httpcore2.ConnectError(f"the name does not resolve: {answer}") from answer
    return answer


_REDIRECTS: Final = (301, 302, 303, 307, 308)
_THROTTLED: Final = (429, 503)
"""Statuses of a host that is asked too often; 503 only where it names a time."""
_PASSING: Final = (408, 425)
"""Statuses below 500 after which trying again can help."""


def _get(
    url: httpx2.URL,
    backend: _GuardedBackend,
    ssl_context: ssl.SSLContext | None,
    max_bytes: int,
    *,
    web: Web,
    private: bool,
) -> bytes | str:
    """The bytes at the URL, or the Location of a redirect; asked for at the host's turn."""
    host = _host(url)
    backend.postpone(web.wait(host))
    with _exchange("GET", url, backend, ssl_context, headers=web.fields(host, private=private)) as response:
        fields = {name.lower(): value for name, value in response.headers}
        if response.status in _THROTTLED and (response.status == 429 or b"retry-after" in fields):
            pause_s = pause_of(fields.get(b"retry-after", b""))
            web.rates.refused(host, pause_s=pause_s)
            raise FetchUnavailable(f"{_shown(url)} answered {response.status}: it is asked too often.", pause_s)
        web.rates.answered(host)
        if response.status in _REDIRECTS and b"location" in fields:
            try:
                return fields[b"location"].decode()  # as browsers read it
            except UnicodeDecodeError:
                return fields[b"location"].decode("latin-1")
        _check_status(response.status, url)
        tags = [value for name, value in response.headers if name.lower() == b"x-robots-tag"]
        web.check_opt_out(tags, _shown(url))
        return _body(response.iter_stream(), fields, url, max_bytes)


@contextlib.contextmanager
def _exchange(
    method: str,
    url: httpx2.URL,
    backend: httpcore2.NetworkBackend,
    ssl_context: ssl.SSLContext | None,
    *,
    headers: Iterable[tuple[bytes, bytes]],
    body: Iterator[bytes] | None = None,
) -> Iterator[httpcore2.Response]:
    """One request and its answer, unread. What goes wrong with it, also while the body reads it, is a `FetchError`."""
    port = url.port or (443 if url.scheme == "https" else 80)
    target = httpcore2.URL(scheme=url.scheme, host=_host(url), port=port, target=url.raw_path)
    authorities = ssl_context or _known_authorities()
    try:
        with (
            httpcore2.ConnectionPool(ssl_context=authorities, max_connections=1, network_backend=backend) as pool,
            pool.stream(method, target, headers=[(b"Host", url.netloc), *headers], content=body) as response,
        ):
            yield response
    except httpcore2.TimeoutException as error:
        raise FetchUnavailable(f"{_shown(url)} took too long ({error}).") from None
    except (httpcore2.NetworkError, httpcore2.ProtocolError) as error:
        if _is_certificate_fault(error):
            raise FetchError(f"{_shown(url)} has no valid certificate for its name.") from None
        raise FetchUnavailable(f"{_shown(url)} could not be read ({error or type(error).__name__}).") from None


def _check_status(status: int, url: httpx2.URL) -> None:
    shown = _shown(url)
    if status in (404, 410):
        raise ImageNotFound(f"{shown} answered {status}: there is no such file.")
    if status in (401, 403):
        raise FetchDenied(f"{shown} answered {status}: it may need a login, a browser, or a newer signature.")
    if status in _PASSING or status >= 500:
        raise FetchUnavailable(f"{shown} answered {status}.")
    if status != 200:
        raise FetchError(f"{shown} answered {status}, which is not a picture.")


def _body(chunks: Iterable[bytes], fields: dict[bytes, bytes], url: httpx2.URL, max_bytes: int) -> bytes:
    """The body, decompressed if need be, and given up as soon as it passes `max_bytes`."""
    declared = fields.get(b"content-length", b"")
    if declared.isdigit() and int(declared) > max_bytes:
        raise ImageTooLarge(f"{_shown(url)} has {int(declared):,} bytes; the limit is {max_bytes:,}.")
    encoding = fields.get(b"content-encoding", b"identity").strip().lower()
    # Some stores send gzip although identity was asked for. 32 takes both zlib and gzip headers.
    inflate = zlib.decompressobj(zlib.MAX_WBITS | 32) if encoding in (b"gzip", b"x-gzip", b"deflate") else None
    if inflate is None and encoding not in (b"identity", b""):
        raise FetchError(f"{_shown(url)} is sent in an encoding that was not asked for.")
    body = bytearray()
    try:
        for chunk in chunks:
            # One byte over the limit is enough to know; more is never unpacked.
            body += chunk if inflate is None else inflate.decompress(chunk, max_bytes + 1 - len(body))
            if len(body) > max_bytes:
                raise ImageTooLarge(f"{_shown(url)} has more than {max_bytes:,} bytes.")
            if inflate is not None and inflate.eof:
                break  # what follows would pile up unread
    except zlib.error:
        raise FetchError(f"{_shown(url)} says that it is compressed and is not.") from None
    if inflate is not None and not inflate.eof:
        raise FetchUnavailable(f"{_shown(url)} broke off in the middle.")
    return bytes(body)


def _is_certificate_fault(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, ssl.SSLCertVerificationError):
            return True
        error = error.__cause__ or error.__context__
    return False
