"""The address of a caller is what the last trusted proxy says, and never what a caller says of itself."""

from __future__ import annotations

import pytest
from starlette.datastructures import Headers

from pia_ray.online.http.callers import CallerAddresses

PROXIES = ("10.0.0.0/8", "fd00::/8")


def address_of(client: str, *forwarded: str, trusted: tuple[str, ...] = PROXIES) -> str:
    headers = Headers(raw=[(b"x-forwarded-for", line.encode()) for line in forwarded])
    return CallerAddresses(trusted).of({"client": (client, 5000)}, headers)


@pytest.mark.parametrize(
    ("client", "forwarded", "found"),
    [
        ("203.0.113.9", (), "203.0.113.9"),
        ("203.0.113.9", ("198.51.100.1",), "203.0.113.9"),
        ("10.0.0.2", ("198.51.100.1",), "198.51.100.1"),
        ("10.0.0.2", ("6.6.6.6, 198.51.100.1",), "198.51.100.1"),
        ("10.0.0.2", ("6.6.6.6", "198.51.100.1, 10.0.0.3"), "198.51.100.1"),
        ("10.0.0.2", ("10.9.9.9, 198.51.100.1",), "198.51.100.1"),
        ("10.0.0.2", ("6.6.6.6, unknown",), "10.0.0.2"),
        ("10.0.0.2", ("198.51.100.1:4711",), "198.51.100.1"),
        ("fd00::1", ("[2001:db8::5]:4711",), "2001:db8::5"),
        ("::ffff:10.0.0.2", ("2001:db8::5",), "2001:db8::5"),
        ("10.0.0.2", (), "10.0.0.2"),
    ],
)
def test_the_last_address_that_no_trusted_proxy_has_is_the_callers(client: str, forwarded: tuple[str, ...], found: str):
    assert address_of(client, *forwarded) == found


def test_without_trusted_proxies_the_header_is_not_read():
    assert address_of("10.0.0.2", "198.51.100.1", trusted=()) == "10.0.0.2"
