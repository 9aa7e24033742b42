"""An HTTP proxy that stands between a client and a server and injects the faults of real networks and stores.

`chaos` is a fixture to import, beside `s3_server`: the proxy before the S3 server, with the environment pointed at it.
"""

from __future__ import annotations

import http.client
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

import pytest

from pia_ray import storage
from tests.s3_server import S3Server, point_at

ERRORS = {
    503: "SlowDown",
    500: "InternalError",
    501: "NotImplemented",
    409: "ConditionalRequestConflict",
    403: "ExpiredToken",
    404: "NoSuchBucket",
    412: "PreconditionFailed",
}
LOSE_ANSWER = "lose answer"
"""The request reaches the server; the connection breaks before its answer arrives."""
CUT_BODY = "cut body"
"""Half of the answer's body arrives, then the connection breaks."""
RESET = "reset"
"""The connection breaks before the request is passed on."""


class ChaosProxy:
    """Passes requests on, and applies the planned faults, one per request that `matches`, then none.

    A fault is one of the names above or a status that is answered in the server's stead.
    """

    def __init__(self, server_url: str) -> None:
        self.faults: deque[str | int] = deque()
        self.matches: Callable[[str, str], bool] = lambda method, path: True
        """Takes method and path of a request."""
        self.bucket = ""
        """For tests to note what they use through this proxy."""
        self.requests: list[tuple[str, str, str | int | None]] = []
        """Method, path and fault of each request so far."""
        self.headers: list[dict[str, str]] = []
        """The fields of each request, in lower case."""
        self.ignored = {"expect"}
        """Fields that are not passed on, in lower case."""
        self.answered_bytes = 0
        """Bytes of all bodies that were answered."""
        self._server = _Server(("127.0.0.1", 0), _handler(self, urlsplit(server_url)))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def next_fault(self, method: str, path: str) -> str | int | None:
        """The fault for this request, which is noted."""
        fault = self.faults.popleft() if self.faults and self.matches(method, path) else None
        self.requests.append((method, path, fault))
        return fault


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that went away are part of the game; everything else is printed."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


def _handler(proxy: ChaosProxy, upstream: object) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def pass_on(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            fault = proxy.next_fault(self.command, self.path)
            proxy.headers.append({name.lower(): value for name, value in self.headers.items()})
            if fault == RESET:
                return self.hang_up()
            if isinstance(fault, int):
                text = f"<Error><Code>{ERRORS[fault]}</Code><Message>chaos</Message></Error>".encode()
                return self.answer(fault, {"Content-Type": "application/xml"}, b"" if self.command == "HEAD" else text)
            connection = http.client.HTTPConnection(upstream.hostname, upstream.port, timeout=60)
            try:
                kept = {name: value for name, value in self.headers.items() if name.lower() not in proxy.ignored}
                connection.request(self.command, self.path, body=body, headers=kept)
                response = connection.getresponse()
                content = response.read()
            finally:
                connection.close()
            if fault == LOSE_ANSWER:
                return self.hang_up()
            headers = {
                name: value
                for name, value in response.getheaders()
                if name.lower() not in ("connection", "transfer-encoding", "content-length", "server")
            }
            if self.command == "HEAD":
                headers["Content-Length"] = response.headers.get("Content-Length", "0")
            self.answer(response.status, headers, content, cut=fault == CUT_BODY)
            return None

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = pass_on  # noqa: N815

        def answer(self, status: int, headers: dict[str, str], content: bytes, *, cut: bool = False) -> None:
            self.send_response_only(status)
            for name, value in headers.items():
                self.send_header(name, value)
            if "Content-Length" not in headers:
                self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            proxy.answered_bytes += len(content)
            self.wfile.write(content[: len(content) // 2] if cut else content)
            if cut:
                self.hang_up()

        def hang_up(self) -> None:
            with suppress(OSError):
                self.wfile.flush()
            self.close_connection = True

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            pass

    return Handler


@pytest.fixture
def chaos(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ChaosProxy]:
    """A proxy before the S3 server, which this process uses; `chaos.bucket` is the URI of a new bucket."""
    with ChaosProxy(s3_server.url) as proxy:
        point_at(monkeypatch, {**s3_server.environment, "AWS_ENDPOINT_URL": proxy.url}, tmp_path)
        proxy.bucket = f"s3://{s3_server.new_bucket()}"
        yield proxy
        storage.forget_clients()
