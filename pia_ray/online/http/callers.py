"""The address of a caller, who may come through proxies."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.types import Scope

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class CallerAddresses:
    """Tells the addresses of callers; `trusted_proxies` are the networks of proxies that append to X-Forwarded-For."""

    def __init__(self, trusted_proxies: Sequence[str]) -> None:
        self._trusted = tuple(ipaddress.ip_network(network) for network in trusted_proxies)

    def of(self, scope: Scope, headers: Headers) -> str:
        """The address of the connection; where a trusted proxy has it, the last one that no trusted proxy has.

        What stands further left in X-Forwarded-For is the caller's own word, and is not read. A part that is not an
        address ends the reading at the proxy that reported it.
        """
        client = scope.get("client")
        found = str(client[0]) if client else ""
        forwarded = [part.strip() for line in headers.getlist("x-forwarded-for") for part in line.split(",")]
        while self._is_trusted(found) and forwarded:
            reported = _parsed(forwarded.pop())
            if reported is None:
                break
            found = str(reported)
        return found

    def _is_trusted(self, text: str) -> bool:
        address = _parsed(text)
        return address is not None and any(address in network for network in self._trusted)


def _parsed(text: str) -> _Address | None:
    """The address that a text names, with or without a port; None for another text."""
    host = text[1:].partition("]")[0] if text.startswith("[") else text
    if host.count(":") == 1:  # IPv4 with a port
        host = host.partition(":")[0]
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address
