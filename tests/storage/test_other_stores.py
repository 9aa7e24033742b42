"""What fsspec reads: objects of its own store in memory, faults of its packages, and schemes that are refused."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from pia_ray import storage
from pia_ray.errors import (
    StorageDenied,
    StorageError,
    StorageNotFound,
    StorageThrottled,
    StorageTooLarge,
    StorageUnavailable,
)
from pia_ray.storage import sources


@pytest.fixture
def memory() -> Iterator[str]:
    """A folder of fsspec's store in memory."""
    name = uuid.uuid4().hex
    yield f"memory://{name}"
    fsspec.filesystem("memory").rm(f"/{name}", recursive=True)


def put(uri: str, content: bytes) -> None:
    fsspec.filesystem("memory").pipe(uri.removeprefix("memory:/"), content)


class Answer(Exception):
    """An error as clients of HTTP raise them."""

    def __init__(self, status: int) -> None:
        super().__init__("secret")
        self.status = status


class DefaultCredentialsError(Exception):
    """An error as Google's login raises it."""


class FailingStore(MemoryFileSystem):
    """A store whose objects cannot be read, with the error that is set."""

    protocol = "failing"
    error: Exception = OSError()

    def info(self, path, **how):
        raise self.error


class StoreWithEtags(MemoryFileSystem):
    """A store with ETags and times, as Google's package gives them."""

    protocol = "withetags"

    def info(self, path, **how):
        return {"name": path, "type": "file", "size": 1, "etag": "CJ+1", "mtime": "2026-01-02T03:04:05+00:00"}


fsspec.register_implementation("failing", FailingStore, clobber=True)
fsspec.register_implementation("withetags", StoreWithEtags, clobber=True)


def test_an_object_is_read_with_its_facts(memory: str, tmp_path: Path) -> None:
    put(f"{memory}/a/b.txt", b"words")
    found = sources.head(f"{memory}/a/b.txt")
    assert found is not None
    assert (found.uri, found.size_bytes) == (f"{memory}/a/b.txt", 5)
    assert sources.read_object(f"{memory}/a/b.txt") == (b"words", found.etag)
    before = storage.usage()
    sources.copy_to_file(f"{memory}/a/b.txt", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b"words"
    assert storage.usage().read_bytes - before.read_bytes == 5


def test_what_is_no_object_is_not_found(memory: str) -> None:
    put(f"{memory}/a/b.txt", b"words")
    for name in ("c", "a"):
        assert sources.head(f"{memory}/{name}") is None
        with pytest.raises(StorageNotFound):
            sources.read_bytes(f"{memory}/{name}")
    assert list(sources.list_objects(f"{memory}/c/")) == []


def test_a_folder_is_listed_in_order_and_anew(memory: str) -> None:
    for name in ("b.txt", "a/c.txt", "a.png"):
        put(f"{memory}/{name}", b"-")
    uris = [f"{memory}/{name}" for name in ("a.png", "a/c.txt", "b.txt")]
    assert [found.uri for found in sources.list_objects(f"{memory}/")] == uris
    assert [found.uri for found in sources.list_objects(memory, suffix=".txt")] == uris[1:]
    put(f"{memory}/d.txt", b"-")
    assert len(list(sources.list_objects(memory))) == 4


def test_a_rewritten_object_has_another_etag(memory: str) -> None:
    put(f"{memory}/a", b"one")
    before = sources.read_object(f"{memory}/a")[1]
    put(f"{memory}/a", b"two")
    assert sources.read_object(f"{memory}/a")[1] != before


def test_the_etag_of_a_store_is_taken_as_it_is() -> None:
    found = sources.head("withetags://bucket/a")
    assert found is not None
    assert (found.etag, found.last_modified.isoformat()) == ("CJ+1", "2026-01-02T03:04:05+00:00")


def test_more_bytes_than_allowed_are_refused(memory: str) -> None:
    put(f"{memory}/a", b"words")
    assert sources.read_bytes(f"{memory}/a", max_bytes=5) == b"words"
    with pytest.raises(StorageTooLarge):
        sources.read_bytes(f"{memory}/a", max_bytes=4)


def test_parquet_is_read_by_arrow(memory: str, tmp_path: Path) -> None:
    table = pa.table({"a": [1, 2, 3]})
    pq.write_table(table, tmp_path / "a.parquet")
    put(f"{memory}/a.parquet", (tmp_path / "a.parquet").read_bytes())
    filesystem, path = sources.arrow_filesystem(f"{memory}/a.parquet")
    assert pq.read_table(path, filesystem=filesystem).equals(table)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (Answer(401), StorageDenied),
        (Answer(404), StorageNotFound),
        (Answer(429), StorageThrottled),
        (Answer(503), StorageUnavailable),
        (Answer(418), StorageError),
        (PermissionError("secret"), StorageDenied),
        (DefaultCredentialsError("secret"), StorageDenied),
        (TimeoutError("secret"), StorageUnavailable),
        (ValueError("secret"), StorageError),
    ],
)
def test_a_fault_of_a_package_becomes_the_error_that_fits_without_its_text(error: Exception, kind: type) -> None:
    FailingStore.error = error
    with pytest.raises(StorageError) as raised:
        sources.read_bytes("failing://bucket/a")
    assert type(raised.value) is kind
    assert "secret" not in raised.value.message


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        ("nosuchstore://a/b", "nosuchstore:// is not read"),
        ("ftp://host/a", "ftp:// is not read"),
        ("local://etc/passwd", "local:// is not read"),
        ("simplecache::file:///etc/passwd", "no such"),
        ("zip://a.txt", "zip:// is not read"),
        ("oci://bucket/a", "oci:// is not read without the package ocifs: pip install ocifs"),
        ("memory://user:secret@host/a", "must hold no password"),
    ],
)
def test_what_is_not_a_store_is_refused(uri: str, reason: str) -> None:
    with pytest.raises(StorageError) as raised:
        sources.read_bytes(uri)
    assert reason.lower() in raised.value.message.lower()
    assert "secret" not in raised.value.message


def test_a_name_with_two_colons_is_a_name(memory: str, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    put(f"{memory}/a", b"-")
    with pytest.raises(StorageNotFound):
        sources.read_bytes(f"{memory}/x::file://{tmp_path}/secret")


def test_nothing_but_manifests_and_pictures_is_read_or_written_there(memory: str) -> None:
    put(f"{memory}/a", b"-")
    for use in (storage.read_bytes, storage.head, storage.delete, storage.probe):
        with pytest.raises(Exception, match="use a local path, file:// or s3://"):
            use(f"{memory}/a")
    with pytest.raises(StorageError, match="use a local path, file:// or s3://"):
        storage.write_bytes(f"{memory}/a", b"-")
