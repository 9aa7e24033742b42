"""Versions of pictures: right for each object, with few requests however the folders lie."""

from __future__ import annotations

import random
from collections.abc import Iterator
from datetime import UTC, datetime

import pytest

from pia_ray.errors import ManifestError, ManifestUnavailable, StorageDenied, StorageError, StorageUnavailable
from pia_ray.manifest.versions import PAGE, Versions
from pia_ray.storage import ObjectStat


class CountingStore:
    """Objects by name, each with an ETag of its own, and the number of requests."""

    def __init__(self, *names: str) -> None:
        self.etags = {f"s3://bucket/{name}": f'"{number}"' for number, name in enumerate(names)}
        self.num_heads = 0
        self.num_pages = 0
        self.denied = ""
        """The listings of folders that begin so are denied."""
        self.failure: StorageError | None = None

    @property
    def num_requests(self) -> int:
        return self.num_heads + self.num_pages

    def head(self, uri: str) -> ObjectStat | None:
        self.num_heads += 1
        if self.failure is not None:
            raise self.failure
        return self._found(uri) if uri in self.etags else None

    def list_objects(self, uri: str, *, suffix: str = "") -> Iterator[ObjectStat]:
        self.num_pages += 1
        if self.denied and uri.startswith(self.denied):
            raise StorageDenied("access denied")
        for number, found in enumerate(name for name in self.etags if name.startswith(f"{uri}/")):
            self.num_pages += number > 0 and number % PAGE == 0
            yield self._found(found)

    def _found(self, uri: str) -> ObjectStat:
        return ObjectStat(uri=uri, size_bytes=1, etag=self.etags[uri], last_modified=datetime(2026, 1, 1, tzinfo=UTC))

    def ask_all(self, *, every: int = 1) -> None:
        """Asks for the versions of the objects in a random order."""
        versions, uris = Versions(self), list(self.etags)[::every]
        random.Random(1).shuffle(uris)
        for uri in uris:
            number = self.etags[uri].strip('"')
            assert versions.of(uri) == f"#etag={number}"


@pytest.mark.parametrize(
    ("num_folders", "num_files", "most"),
    [(1, 3000, 10), (8, 300, 20), (9, 300, 20), (40, 100, 40), (3000, 1, 30)],
)
def test_folders_are_listed_and_not_their_objects_asked_for(num_folders: int, num_files: int, most: int) -> None:
    store = CountingStore(*(f"in/{a}/{b}.png" for a in range(num_folders) for b in range(num_files)))
    store.ask_all()
    assert store.num_requests <= most


def test_a_deep_tree_is_listed_from_above() -> None:
    store = CountingStore(*(f"in/{a}/{b}/{c}.png" for a in range(20) for b in range(20) for c in range(3)))
    store.ask_all()
    assert store.num_requests <= 30


def test_few_pictures_of_a_huge_folder_are_asked_for() -> None:
    store = CountingStore(*(f"in/{number}.png" for number in range(30 * PAGE)))
    store.ask_all(every=10 * PAGE)
    assert store.num_requests <= 6


def test_what_is_not_there_has_no_version_and_costs_no_request_once_its_folder_is_listed() -> None:
    store = CountingStore(*(f"in/{number}.png" for number in range(10)))
    versions = Versions(store)
    for number in range(20):
        assert bool(versions.of(f"s3://bucket/in/{number}.png")) == (number < 10)
    assert store.num_requests == 2


def test_listings_that_are_denied_are_done_without() -> None:
    store = CountingStore(*(f"in/{a}/{b}.png" for a in range(12) for b in range(4)))
    store.denied = "s3://bucket"
    store.ask_all()
    assert store.num_heads == 48


@pytest.mark.parametrize(
    ("failure", "kind"), [(StorageDenied("no"), ManifestError), (StorageUnavailable("away"), ManifestUnavailable)]
)
def test_pictures_that_cannot_be_asked_about_stop_the_run(failure: StorageError, kind: type[ManifestError]) -> None:
    store = CountingStore("in/a.png")
    store.failure = failure
    with pytest.raises(kind, match="changes cannot be detected"):
        Versions(store).of("s3://bucket/in/a.png")
