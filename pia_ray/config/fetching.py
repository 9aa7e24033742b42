"""`FetchConfig`, the settings by which a run fetches pictures from web servers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from pydantic import Field, SecretStr, field_validator

from pia_ray.config.lists import Networks, parts_of
from pia_ray.config.settings import Settings

_HOST: Final = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?")
_FIELD_NAME: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_FIELD_VALUE: Final = re.compile(r"[\x21-\x7e]([\x20-\x7e]*[\x21-\x7e])?")
_HEADER_FORM: Final = 'each is HOST:NAME:VALUE, such as "cdn.example.com:Authorization:Bearer ..."'
_RESERVED: Final = {
    "accept-encoding",
    "connection",
    "content-length",
    "expect",
    "host",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
}
"""Fields that say how a request is sent."""


class FetchConfig(Settings):
    """The web as a run sees it: hosts that it may reach, the pace at which it asks them, and how it names itself."""

    per_host_rate: float | None = Field(
        None,
        gt=0,
        description="Requests per second to one picture host by all workers together. Left out: without pause, until "
        "the host answers 429.",
    )
    allow_http: bool = Field(False, description="Fetch pictures from http:// too, which anyone on the way can change.")
    allowed_networks: Networks = Field(
        (), description="Networks such as 10.1.0.0/16 whose picture hosts may be reached though they are not public."
    )
    header: tuple[SecretStr, ...] = Field(
        (), description="HOST:NAME:VALUE, a header for requests to that host alone. Repeatable; never recorded."
    )
    user_agent: str = Field("pia-ray", description="The name that picture hosts are given.")
    ignore_opt_outs: bool = Field(
        False, description="Fetch pictures although their X-Robots-Tag says noai or noimageai."
    )

    s3_anonymous: tuple[str, ...] = Field((), description="Buckets that are read without credentials.")
    s3_requester_pays: tuple[str, ...] = Field(
        (), description="Buckets whose reads are charged to the AWS account of this run."
    )

    @property
    def headers_by_host(self) -> dict[str, Mapping[str, str]]:
        """The fields of `header` by host, in lower case."""
        found: dict[str, dict[str, str]] = {}
        for each in self.header:
            host, name, value = _split(each.get_secret_value())
            found.setdefault(host, {})[name] = value
        return dict(found)

    @field_validator("s3_anonymous", "s3_requester_pays", mode="before")
    @classmethod
    def _buckets(cls, value: object) -> object:
        value = parts_of(value)
        if isinstance(value, tuple | list) and any("/" in str(bucket) for bucket in value):
            raise ValueError("must be names of buckets, without s3:// and without keys")
        return value

    @field_validator("header", mode="before")
    @classmethod
    def _one_header(cls, value: object) -> object:
        headers = (value,) if isinstance(value, str) else value
        if not isinstance(headers, tuple | list) or not all(isinstance(each, str | SecretStr) for each in headers):
            raise ValueError(_HEADER_FORM)
        return headers

    @field_validator("header", mode="after")
    @classmethod
    def _known_headers(cls, value: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
        for header in value:
            _split(header.get_secret_value())
        return value

    @field_validator("user_agent")
    @classmethod
    def _printable(cls, value: str) -> str:
        if not _FIELD_VALUE.fullmatch(value):
            raise ValueError("must be printable ASCII")
        return value


def _split(header: str) -> tuple[str, str, str]:
    """Host, name and value of a header. No error begins with "must", to which `build` adds the value, a secret."""
    host, _, rest = header.partition(":")
    name, _, value = rest.partition(":")
    host, name, value = host.strip().lower(), name.strip(), value.strip()
    if not _HOST.fullmatch(host) or not _FIELD_NAME.fullmatch(name) or not _FIELD_VALUE.fullmatch(value):
        raise ValueError(_HEADER_FORM)
    if name.lower() in _RESERVED:
        raise ValueError(f"{name} cannot be set, because it says how the request is sent")
    return host, name, value
