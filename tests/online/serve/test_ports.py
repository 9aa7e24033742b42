"""The endpoint's port before Serve has bound it."""

from __future__ import annotations

import socket

import pytest

from pia_ray.errors import ConfigError
from pia_ray.online.serve.ports import held_port


def bind(port: int, *, shared: bool = False) -> socket.socket:
    bound = socket.socket()
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        bound.bind(("127.0.0.1", port))
    except OSError:
        bound.close()
        raise
    return bound


def test_another_process_cannot_take_the_port_and_connections_reach_the_proxy_that_shares_it() -> None:
    with held_port("127.0.0.1", 0) as port:
        with pytest.raises(OSError, match="in use"):
            bind(port)
        with bind(port, shared=True) as proxy:
            proxy.listen()
            for _ in range(10):
                with socket.create_connection(("127.0.0.1", port), timeout=5):
                    proxy.accept()[0].close()
    bind(port).close()


def test_the_port_of_a_second_server_is_refused_from_the_start_of_the_first() -> None:
    with (
        held_port("127.0.0.1", 0) as port,
        pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1 port {port}: Address already in use"),
        held_port("127.0.0.1", port),
    ):
        pass
