"""Lists in settings, which flags, variables and files may write as one text with commas."""

from __future__ import annotations

import ipaddress
from typing import Annotated

from pydantic import BeforeValidator


def parts_of(value: object) -> object:
    """The parts of a text with commas, without empty ones; a value that is not text as it is."""
    return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value


def _networks(value: object) -> object:
    value = parts_of(value)
    for network in value if isinstance(value, tuple | list) else ():
        try:
            ipaddress.ip_network(network)
        except ValueError:
            raise ValueError(f'"{network}" is not a valid network: write it as 10.0.0.0/8') from None
    return value


Networks = Annotated[tuple[str, ...], BeforeValidator(_networks)]
"""Networks in CIDR notation, such as 10.0.0.0/8."""
