"""Reads manifests and pictures by URI from wherever they may lie: local disks, S3, and what fsspec reads.

Outputs, weights and the endpoint use the functions of `pia_ray.storage`, which refuse the last.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from pia_ray.storage import counts, objects, other_stores
from pia_ray.storage.other_stores import refusal
from pia_ray.storage.uris import READ_SCHEMES, ObjectStat, in_store, is_s3, other_scheme, without_password

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

__all__ = [
    "READ_SCHEMES",
    "arrow_filesystem",
    "copy_to_file",
    "exists",
    "head",
    "in_store",
    "is_s3",
    "list_objects",
    "other_scheme",
    "read_bytes",
    "read_object",
    "refusal",
    "without_password",
]


def read_bytes(uri: str, *, max_bytes: int | None = None) -> bytes:
    """As `storage.read_bytes`."""
    return read_object(uri, max_bytes=max_bytes)[0]


def read_object(uri: str, *, max_bytes: int | None = None) -> tuple[bytes, str]:
    """As `storage.read_object`."""
    if not other_scheme(uri):
        return objects.read_object(uri, max_bytes=max_bytes)
    found = other_stores.read_object(uri, max_bytes=max_bytes)
    counts.count_read(len(found[0]))
    return found


def head(uri: str) -> ObjectStat | None:
    """As `storage.head`."""
    return other_stores.head(uri) if other_scheme(uri) else objects.head(uri)


def exists(uri: str) -> bool:
    """As `storage.exists`."""
    return head(uri) is not None


def list_objects(uri: str, *, suffix: str = "") -> Iterator[ObjectStat]:
    """As `storage.list_objects`."""
    lists = other_stores.list_objects if other_scheme(uri) else objects.list_objects
    return lists(uri, suffix=suffix)


def copy_to_file(uri: str, path: Path) -> None:
    """As `storage.copy_to_file`; from a store of fsspec, the file may stay half written."""
    if not other_scheme(uri):
        objects.copy_to_file(uri, path)
        return
    other_stores.download_file(uri, path)
    counts.count_read(path.stat().st_size)


def arrow_filesystem(uri: str) -> tuple[FileSystem, str]:
    """As `storage.arrow_filesystem`."""
    return other_stores.arrow_filesystem(uri) if other_scheme(uri) else objects.arrow_filesystem(uri)
