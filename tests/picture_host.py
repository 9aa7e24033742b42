"""A picture host on this machine over plain HTTP, which answers as its `faults` say."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from pia_ray.testing.catalogs import draw_picture

Answer = tuple[int, dict[str, str]]
"""Status and fields."""


class PictureHost(ThreadingHTTPServer):
    """Answers each request with the next of `faults`, then with a picture of its own for each path."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.faults: deque[Answer] = deque()
        self.fields: dict[str, str] = {}
        """Of answers with a picture."""
        self.asked: list[tuple[float, str, dict[str, str]]] = []
        """Time, path and fields of each request."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: PictureHost

    def do_GET(self) -> None:
        self.server.asked.append((time.monotonic(), self.path, dict(self.headers.items())))
        try:
            status, fields = self.server.faults.popleft()
            body = b"no"
        except IndexError:
            status, fields = 200, self.server.fields
            body = draw_picture((64, 48), seed=sum(self.path.encode()), extension="png")
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **fields}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def picture_host() -> Iterator[PictureHost]:
    """A host that is up for the time of the block."""
    host = PictureHost()
    threading.Thread(target=host.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield host
    finally:
        host.shutdown()
        host.server_close()
