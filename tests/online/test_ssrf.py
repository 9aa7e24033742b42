"""URLs in requests to the endpoint that would lead inside: refused with a typed 4xx, and nothing inside is asked."""

from __future__ import annotations

import asyncio
import socket
import ssl
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx2
import pytest

from pia_ray.config.serve import ServeConfig
from pia_ray.online.rendering.local_renderer import LocalRenderer
from pia_ray.online.requests.request_reader import FormReader
from pia_ray.online.service import create_endpoint
from pia_ray.online.video_jobs import JobStore
from pia_ray.storage.https import fetch
from pia_ray.testing import FakeAnimator
from tests.online.video_server import QUICK, data_url, png
from tests.storage.test_https import certificate, close, serve

ROUTES = ("/v1/animations", "/v1/videos")


class Trap:
    """A port of this machine that must not be reached, on every loopback address there is."""

    def __init__(self) -> None:
        self.num_connections = 0
        self._sockets = [socket.create_server(("127.0.0.1", 0))]
        self.port: int = self._sockets[0].getsockname()[1]
        self._sockets.append(socket.create_server(("127.0.0.2", self.port)))
        if socket.has_ipv6:
            with suppress(OSError):  # a machine without IPv6 cannot be attacked over it
                self._sockets.append(socket.create_server(("::1", self.port), family=socket.AF_INET6))
        for each in self._sockets:
            threading.Thread(target=self._accept, args=(each,), daemon=True).start()

    def close(self) -> None:
        """Listens no more."""
        for each in self._sockets:
            each.shutdown(socket.SHUT_RDWR)
            each.close()

    def _accept(self, listening: socket.socket) -> None:
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            self.num_connections += 1
            connection.close()


@pytest.fixture(scope="module")
def trap() -> Iterator[Trap]:
    made = Trap()
    yield made
    made.close()


@pytest.fixture(scope="module")
def pem(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return certificate(tmp_path_factory.mktemp("certificate"))


@pytest.fixture(scope="module")
def outside(pem: Path) -> Iterator[Any]:
    """A server that stands for one on the internet."""
    server = serve(pem, "127.0.0.1")
    yield server
    close(server)


class Endpoint:
    """The whole endpoint in this process; it works on no jobs."""

    def __init__(self, storage: Path, *, settings: Mapping[str, Any] | None = None, **how: Any) -> None:
        config = ServeConfig.model_validate({"storage": str(storage), **(settings or {})})
        self.jobs = JobStore(config.storage)
        self.animator = FakeAnimator(config.models["demo"], log=storage / "begun")
        self._begun = storage / "begun"
        forms = FormReader(config, **how)
        self._app = create_endpoint(LocalRenderer(self.animator, config), self.jobs, config, forms=forms)
        self._loop = asyncio.Runner()

    def __enter__(self) -> Endpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.close()
        self.animator.close()

    def ask(self, route: str, **fields: Any) -> httpx2.Response:
        """The answer to a request for a video."""

        async def post() -> httpx2.Response:
            transport = httpx2.ASGITransport(self._app)
            async with httpx2.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as client:
                return await client.post(route, json={"prompt": "waves", **QUICK, **fields})

        return self._loop.run(post())

    def assert_refused(self, route: str, url: str) -> None:
        field: dict[str, Any] = {"image": url}
        answer = self.ask(route, **(field if route == "/v1/animations" else {"input_reference": {"image_url": url}}))
        error = answer.json()["error"]
        assert (answer.status_code, error["type"]) == (400, "invalid_request_error"), error
        assert error["code"] in ("address_refused", "fetch_failed", "bad_parameter")
        assert "hush" not in answer.text
        assert not self._begun.exists()
        assert self.jobs.list("anonymous", after=None, limit=1, order="asc").documents == ()


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    with Endpoint(tmp_path_factory.mktemp("endpoint")) as made:
        yield made


DIRECT = [
    "https://127.0.0.1:{port}/a.png",
    "https://127.8.9.10:{port}/a.png",
    "https://127.1:{port}/a.png",
    "https://2130706433:{port}/a.png",
    "https://0x7f000001:{port}/a.png",
    "https://0x7f.0.0.1:{port}/a.png",
    "https://0177.0.0.1:{port}/a.png",
    "https://017700000001:{port}/a.png",
    "https://127.0.0.1.:{port}/a.png",
    "https://127。0。0。1:{port}/a.png",
    "https://localhost:{port}/a.png",
    "https://LOCALHOST.:{port}/a.png",
    "https://0.0.0.0:{port}/a.png",
    "https://[::1]:{port}/a.png",
    "https://[::]:{port}/a.png",
    "https://[::ffff:127.0.0.1]:{port}/a.png",
    "https://[0:0:0:0:0:ffff:7f00:1]:{port}/a.png",
    "https://[::127.0.0.1]:{port}/a.png",
    "https://[64:ff9b::127.0.0.1]:{port}/a.png",
    "https://[2002:7f00:1::1]:{port}/a.png",
    "https://[fe80::1%25lo]:{port}/a.png",
    "https://169.254.169.254/latest/meta-data/",
    "https://2852039166/latest/meta-data/",
    "https://100.100.100.200/latest/meta-data/",
    "https://192.0.0.192/opc/v2/instance/",
    "https://168.63.129.16/machine?comp=goalstate",
    "https://[fd00:ec2::254]/latest/meta-data/",
    "https://10.0.0.1/a.png",
    "https://user:hush@127.0.0.1:{port}/a.png",
    "https://example.com:443@127.0.0.1:{port}/a.png",
    "https://127.0.0.1:{port}\\@example.com/a.png",
    "http://127.0.0.1:{port}/a.png",
    "https://example.com:22/a.png",
    "https://example.com:{port}1/a.png",
    "file:///etc/passwd",
    " FILE:///etc/passwd",
    "s3://bucket/key.png",
    "ftp://127.0.0.1:{port}/a.png",
    "gopher://127.0.0.1:{port}/_INFO",
    "/etc/passwd",
    "../../etc/passwd",
]
"""Attacks that need no help from a server elsewhere."""


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("url", DIRECT)
def test_a_url_that_leads_inside_is_refused_without_a_request(endpoint: Endpoint, trap: Trap, route: str, url: str):
    before = trap.num_connections
    endpoint.assert_refused(route, url.format(port=trap.port))
    assert trap.num_connections == before


NAMES = {
    "private": ["10.0.0.1"],
    "loopback": ["127.0.0.1"],
    "mapped loopback": ["::ffff:127.0.0.1"],
    "6to4 loopback": ["2002:7f00:1::1"],
    "public first": ["8.8.8.8", "127.0.0.1"],
    "public last": ["127.0.0.1", "8.8.8.8"],
}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_leads_inside_is_refused_without_a_request(tmp_path: Path, trap: Trap, route: str, name: str):
    before = trap.num_connections

    def resolve(host: str, port: int) -> Sequence[str]:
        return NAMES[name]

    with Endpoint(tmp_path, fetch_url=lambda url, most: fetch(url, max_bytes=most, resolve=resolve)) as made:
        made.assert_refused(route, f"https://pictures.test:{trap.port}/a.png")
    assert trap.num_connections == before


REDIRECTS = [
    "https://127.0.0.2:{port}/a.png",
    "//127.0.0.2:{port}/a.png",
    "https://2130706434:{port}/a.png",
    "https://[::1]:{port}/a.png",
    "https://[::ffff:127.0.0.2]:{port}/a.png",
    "https://inside.test:{port}/a.png",
    "https://169.254.169.254/latest/meta-data/",
    "http://pictures.test:{port}/a.png",
    "https://user:hush@pictures.test:{port}/a.png",
    "https://pictures.test:22/a.png",
    "file:///etc/passwd",
    "gopher://127.0.0.2:{port}/_INFO",
]


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("target", REDIRECTS)
def test_a_redirect_that_leads_inside_is_refused_at_the_first_hop(
    tmp_path: Path, trap: Trap, outside: Any, pem: Path, route: str, target: str
):
    before, asked = trap.num_connections, len(outside.seen)
    place = f"/redirect?to={quote(target.format(port=trap.port), safe='')}"
    # 127.0.0.1 stands for the internet: the trap's other addresses are inside.
    with Endpoint(tmp_path, fetch_url=partial(_fetch, pem, {"pictures.test": ["127.0.0.1"]})) as made:
        made.assert_refused(route, f"https://pictures.test:{outside.port}{place}")
    assert trap.num_connections == before
    assert len(outside.seen) == asked + 1


@pytest.mark.parametrize("route", ROUTES)
def test_a_name_that_changes_its_address_is_looked_up_once_for_each_hop_and_judged_each_time(
    tmp_path: Path, trap: Trap, outside: Any, pem: Path, route: str
):
    before, asked = trap.num_connections, len(outside.seen)
    answers = [["127.0.0.1"], ["127.0.0.2"]]  # first what a guard may see, then what the name server would like asked
    place = f"/redirect?to={quote(f'https://pictures.test:{trap.port}/a.png', safe='')}"
    with Endpoint(tmp_path, fetch_url=partial(_fetch, pem, {"pictures.test": answers})) as made:
        made.assert_refused(route, f"https://pictures.test:{outside.port}{place}")
    assert answers == []
    assert trap.num_connections == before
    assert len(outside.seen) == asked + 1


@pytest.mark.parametrize(
    "url",
    [
        "http://example.com/hook",
        "file:///etc/passwd",
        "https://user:hush@example.com/hook",
        "https://example.com:22/hook",
        "https://[::1/hook",
        "https://example.com/" + "x" * 2000,
        7,
    ],
)
def test_a_webhook_that_could_never_be_sent_is_refused_at_once(tmp_path: Path, url: object):
    with Endpoint(tmp_path, settings={"webhook_secret": "whsec_" + "QUJD" * 8}) as made:
        answer = made.ask("/v1/videos", image=data_url(png()), webhook_url=url)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "webhook_url")
        assert "hush" not in answer.text
        assert made.jobs.list("anonymous", after=None, limit=1, order="asc").documents == ()
        taken = made.ask("/v1/videos", image=data_url(png()), webhook_url="https://example.com/hook")
        assert taken.status_code == 200


def test_the_trap_is_one_that_a_fetch_could_reach(trap: Trap):
    before = trap.num_connections
    for host in ("127.0.0.1", "127.0.0.2"):
        with socket.create_connection((host, trap.port), timeout=20) as connection:
            assert connection.recv(1) == b""  # closed by the trap, which has counted it
    assert trap.num_connections == before + 2


def _fetch(pem: Path, names: dict[str, list[Any]], url: str, max_bytes: int) -> bytes:
    """Fetches with 127.0.0.1 as the internet; a list of lists is answered one by one."""

    def resolve(host: str, port: int) -> Sequence[str]:
        if host in names:
            answer = names[host]
            return answer.pop(0) if isinstance(answer[0], list) else answer
        return [str(found[4][0]) for found in socket.getaddrinfo(host, port)] if "test" not in host else ["127.0.0.2"]

    trusted = ssl.create_default_context(cafile=str(pem))
    return fetch(url, max_bytes=max_bytes, resolve=resolve, allowed_networks=("127.0.0.1/32",), ssl_context=trusted)
