"""The endpoint's TCP port, which is its own from the first moment: Serve binds it seconds later, in another process."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager

from pia_ray.errors import ConfigError


@contextmanager
def held_port(host: str, port: int) -> Iterator[int]:
    """The port, or a free one for 0, which no process but Serve's proxies can bind in the block.

    The socket that holds it does not listen, so connections go to the proxies alone, which bind with SO_REUSEPORT as
    well (ray 2.60).

    Raises:
        ConfigError: another process has the port, or there is no such address.
    """
    try:
        if port:
            _bound(host, port, socket.SO_REUSEADDR).close()  # SO_REUSEPORT alone would share it with another server
        held = _held(host, port)
    except OSError as error:
        raise ConfigError(f"cannot listen on {host} port {port}: {error.strerror or error}") from None
    with held:
        yield held.getsockname()[1]


def _held(host: str, port: int) -> socket.socket:
    try:
        return _bound(host, port, socket.SO_REUSEPORT)
    except OSError:
        # Connections of a server that has just ended are in the way. With SO_REUSEADDR they are not, and neither is
        # this socket for others that set it.
        return _bound(host, port, socket.SO_REUSEPORT, socket.SO_REUSEADDR)


def _bound(host: str, port: int, *options: int) -> socket.socket:
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        for option in options:
            bound.setsockopt(socket.SOL_SOCKET, option, 1)
        bound.bind((host.strip("[]"), port))
    except BaseException:
        bound.close()
        raise
    return bound
