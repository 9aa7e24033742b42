"""An endpoint with one place, which nobody waits for: who hangs up, is slow or sends rubbish leaves it to others."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import httpx2
import pytest
from ray import serve

from tests.online.serve.test_http import KNOBS, animate, begun, deploy, noise, until

pytestmark = [
    pytest.mark.heavy,
    # Ray's client code of 2.60 leaves sockets and event loops to the garbage collector.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the endpoint's fakes leave what they did."""
    return tmp_path_factory.mktemp("endpoint")


@pytest.fixture(scope="module")
def client(address: str, folder: Path) -> Iterator[httpx2.Client]:
    deploy(folder, step_s=0.3, batch_size=1, max_waiting=0, max_steps=1000, body_timeout_s=6)
    with httpx2.Client(base_url=address, timeout=100) as found:
        yield found
    serve.delete("test")


def test_a_client_that_hangs_up_frees_the_engine_whatever_its_headers(client: httpx2.Client, folder: Path):
    fields = {**KNOBS, "num_inference_steps": "1000"}
    headers_of_serve = {"x-request-disconnect-disabled": "?1", "x-request-timeout-seconds": "-1"}
    for headers in ({}, headers_of_serve):
        before = len(begun(folder))
        call = client.build_request("POST", "/v1/animations", data=fields, files={"image": noise()}, headers=headers)
        head = "".join(f"{name}: {value}\r\n" for name, value in call.headers.items())
        with socket.create_connection((client.base_url.host, client.base_url.port), timeout=60) as connection:
            connection.sendall(f"POST /v1/animations HTTP/1.1\r\n{head}\r\n".encode() + call.read())
            until(lambda before=before: len(begun(folder)) > before, seconds=100)
        until(lambda: animate(client).status_code == 200, seconds=100)  # of the other's 300 s


def half_a_call(client: httpx2.Client, *, announced: int, sent: bytes) -> socket.socket:
    """A connection on which a call for a video has begun, with that much of its body."""
    connection = socket.create_connection((client.base_url.host, client.base_url.port), timeout=60)
    head = (
        f"POST /v1/animations HTTP/1.1\r\nHost: 127.0.0.1:{client.base_url.port}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {announced}\r\n\r\n"
    )
    connection.sendall(head.encode() + sent)
    return connection


def answer_on(connection: socket.socket) -> bytes:
    """All that comes until the server is silent for a second after an answer, or hangs up."""
    content = b""
    while b"}}" not in content and (chunk := connection.recv(65536)):
        content += chunk
    return content


def test_slow_and_broken_clients_are_given_up_and_delay_no_others(client: httpx2.Client, folder: Path):
    port, before = client.base_url.port, len(begun(folder))
    with ExitStack() as open_ones:
        slow = [open_ones.enter_context(half_a_call(client, announced=10_000, sent=b'{"prompt": "')) for _ in range(20)]
        headless = open_ones.enter_context(socket.create_connection(("127.0.0.1", port), timeout=60))
        headless.sendall(b"POST /v1/animations HTTP/1.1\r\nHost: 127")
        for _ in range(20):
            half_a_call(client, announced=10_000, sent=b'{"prompt": "').close()
        assert animate(client).status_code == 200  # the one place of the engine is free
        for each in slow:
            answer = answer_on(each)
            assert answer.startswith(b"HTTP/1.1 408 ")
            assert b'"slow_body"' in answer
        flood = open_ones.enter_context(socket.create_connection(("127.0.0.1", port), timeout=60))
        flood.sendall(b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n")
        with suppress(ConnectionError):  # the server hangs up in the midst of it
            for number in range(2_000):
                flood.sendall(b"x-flood-%d: %s\r\n" % (number, b"y" * 1000))
            flood.sendall(b"\r\n")
        with suppress(ConnectionError):
            answer = flood.recv(65536)
            assert not answer or answer.startswith((b"HTTP/1.1 431 ", b"HTTP/1.1 400 "))
        assert animate(client).status_code == 200
    assert len(begun(folder)) == before + 2
    assert client.get("/readyz").status_code == 200
