"""URIs of objects, what is in them, and what a store says of the object that one names."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Final
from urllib.parse import quote, unquote, urlsplit

from pia_ray.errors import StorageError, StorageNotFound

_SCHEME: Final = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]*)://")
_PASSWORD: Final = re.compile(r"^(\s*[a-zA-Z][a-zA-Z0-9+.-]*://[^/?#:@]*):[^/?#]*(?=@)")
_TOO_FEW_SLASHES: Final = re.compile(r"(s3|file):(?!//)", re.IGNORECASE)
_OURS: Final = frozenset({"file", "s3", "http", "https"})
"""Schemes that are read without fsspec."""
READ_SCHEMES: Final = "use a path or s3://, for a picture also https:// or data:"
"""The advice for a URI of a scheme that is not read."""


@dataclass(frozen=True)
class ObjectStat:
    """The facts of one object that a store gives without reading it."""

    uri: str
    size_bytes: int
    etag: str
    """Changes whenever the content is replaced."""
    last_modified: datetime
    """By the store's clock, in UTC."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """Empty for local files and in listings."""
    sha256: str = ""
    """Of the whole content, in hex, as the store has computed it; empty where it has not, and in listings."""


def is_s3(uri: str) -> bool:
    """Whether the URI names an object or prefix in S3."""
    return uri[:5].lower() == "s3://"


def other_scheme(uri: str) -> str:
    """The scheme of a store other than S3, in lower case, such as "gs"; empty for paths and the usual schemes."""
    match = _SCHEME.match(uri)
    scheme = match[1].lower() if match else ""
    return "" if scheme in _OURS else scheme


def in_store(uri: str) -> bool:
    """Whether the URI names an object or prefix in S3 or another store, and not a local file or a URL of the web."""
    return is_s3(uri) or bool(other_scheme(uri))


def without_password(uri: str) -> str:
    """The URI without the password that its authority may hold, as in `ftp://user:password@host/`."""
    return _PASSWORD.sub(r"\1", uri, count=1)


def join(uri: str, *parts: str) -> str:
    """The URI of something below `uri`; slashes at the seams do not matter.

    Raises:
        StorageError: `uri` is of S3 and names no bucket, as which the first part would count.
    """
    if is_s3(uri):
        bucket_and_key(uri)
    tail = "/".join(part.strip("/") for part in parts if part.strip("/"))
    if uri[:7].lower() == "file://":
        tail = quote(tail)
    if not tail:
        return uri
    return f"{uri}{tail}" if uri.endswith("/") or not uri else f"{uri}/{tail}"


def local_path(uri: str) -> Path:
    """The path of a local URI, with `~` as the home folder also where no shell has seen it.

    Raises:
        StorageError: the URI is of another kind, or has too few slashes.
    """
    if match := _TOO_FEW_SLASHES.match(uri):
        right = "s3://bucket/prefix" if match[1].lower() == "s3" else "file:///path"
        raise StorageError(f'"{uri}" is not a path, and a URI of {match[1]} is written {right}')
    scheme, separator, _ = uri.partition("://")
    if separator and scheme.lower() == "file":
        parts = urlsplit(uri)
        if parts.netloc not in ("", "localhost"):
            raise StorageError(f"{uri} names another machine: a file:// URI has three slashes")
        uri = unquote(parts.path)
    elif separator and scheme.isalnum():
        raise StorageError(f"{scheme}:// is not read or written here: use a local path, file:// or s3://")
    if not uri or "\0" in uri:
        raise StorageError("the path is empty or holds a NUL character")
    return expanded(uri)


def expanded(path: str) -> Path:
    """The path with `~` and `~NAME` as home folders; as it is where there is no such folder or user."""
    return Path(os.path.expanduser(path))  # noqa: PTH111 - Path's own raises there


def bucket_and_key(uri: str) -> tuple[str, str]:
    """The bucket of an S3 URI, and the key or prefix in it, which may be empty."""
    bucket, _, key = uri[5:].partition("/")
    if not bucket:
        raise StorageError(f'"{uri}" names no bucket: write s3://bucket/prefix')
    return bucket, key


def object_address(uri: str) -> dict[str, str]:
    """The bucket and key of an S3 object, as boto3's calls name them."""
    bucket, key = bucket_and_key(uri)
    if not key:
        raise StorageNotFound(f'"{uri}" is a bucket, not an object.')
    return {"Bucket": bucket, "Key": key}
