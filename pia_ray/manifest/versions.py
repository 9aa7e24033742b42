"""The versions of pictures, by which a changed one has another work key: ETags of objects, size and time of files.

Objects are asked for one by one until a listing of their folder, or of one above it, costs no more.
"""

from __future__ import annotations

import itertools
import math
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final, Protocol

from pia_ray import storage
from pia_ray.errors import ManifestError, ManifestUnavailable, StorageDenied, StorageError
from pia_ray.manifest.spellings import other_spellings
from pia_ray.storage import sources

PAGE: Final = 1000
"""Objects in one answer to a listing."""

MOST_OBJECTS: Final = 1_000_000
"""Listed objects in memory, about 300 bytes each; a single folder may have more."""

MOST_FOLDERS: Final = 100_000
"""Folders that are remembered, about 500 bytes each."""

FEW_FOLDERS: Final = 8
"""So many folders of one parent are asked about before the parent is listed."""


class Store(Protocol):
    """As much of `pia_ray.storage` as versions need."""

    def head(self, uri: str) -> storage.ObjectStat | None:
        """The facts of the object, or None if there is nothing."""

    def list_objects(self, uri: str, *, suffix: str = "") -> Iterator[storage.ObjectStat]:
        """Every object below the folder, `PAGE` of them per request."""


class Versions:
    """The versions of a manifest's pictures, with few requests: at most about two for each page of a listing."""

    def __init__(self, store: Store = sources) -> None:
        self._store = store
        self._folders: OrderedDict[str, _Folder] = OrderedDict()  # those used last at the end
        self._num_objects = 0

    def of(self, uri: str) -> str:
        """`#etag=...` or `#size=...&mtime=...`; empty for what is not there, and for https:// and data: URLs.

        Raises:
            ManifestError: the store does not allow it, or stayed away.
        """
        if version := self._of_one(uri):
            return version
        others = other_spellings(uri) if uri.startswith("/") or sources.in_store(uri) else []
        return next(filter(None, map(self._of_one, others)), "")

    def _of_one(self, uri: str) -> str:
        if uri.startswith("/"):
            return file_version(uri)
        if not sources.in_store(uri):
            return ""
        try:
            etag = self._etag(uri)
        except StorageError as error:  # keys without versions would differ from those of the next run
            kind = ManifestUnavailable if error.retryable else ManifestError
            raise kind(f"changes cannot be detected: {error.message}") from None
        return object_version(etag) if etag else ""

    def _etag(self, uri: str) -> str:
        own, *above = _above(uri)
        is_new = own not in self._folders
        for prefix in (own, *above):
            folder = self._used(prefix)
            if (etag := folder.etag(uri)) is not None:
                return etag
            folder.num_below += is_new
        folder = self._used(own)
        due = [self._folders[prefix] for prefix in above if self._folders[prefix].is_due] if is_new else []
        if due or folder.num_pages < folder.num_heads:
            listed = due[0] if due else folder
            self._read_page(listed)
            if (etag := listed.etag(uri)) is not None:
                return etag
        folder.num_heads += 1
        found = self._store.head(uri)
        return "" if found is None else found.etag

    def _used(self, prefix: str) -> _Folder:
        folder = self._folders.setdefault(prefix, _Folder(prefix))
        self._folders.move_to_end(prefix)
        if len(self._folders) > MOST_FOLDERS:
            self._forget_first()
        return folder

    def _read_page(self, folder: _Folder) -> None:
        try:
            self._num_objects += folder.read_page(self._store)
        except StorageDenied:  # rights may end at the pictures' own folders, or at reading
            self._num_objects -= folder.give_up()
        while self._num_objects > MOST_OBJECTS and len(self._folders) > 1:
            if next(iter(self._folders.values())) is folder:
                self._folders.move_to_end(folder.prefix)
            self._forget_first()
        if len(folder.etags) > MOST_OBJECTS and folder.num_below > 1:
            self._num_objects -= folder.give_up()

    def _forget_first(self) -> None:
        self._num_objects -= len(self._folders.popitem(last=False)[1].etags)


@dataclass
class _Folder:
    """The objects of a prefix, at any depth, as far as they have been listed."""

    prefix: str
    etags: dict[str, str] = field(default_factory=dict)
    num_pages: float = 0
    num_heads: int = 0
    """Objects of it that were asked for one by one."""
    num_below: int = 0
    """Folders below it, itself too, that were asked about."""
    is_complete: bool = False
    _listing: Iterator[storage.ObjectStat] | None = None

    def etag(self, uri: str) -> str | None:
        """The object's ETag, empty where there is no such object; None where it is not known yet."""
        return self.etags.get(uri, "" if self.is_complete else None)

    @property
    def is_due(self) -> bool:
        """Whether to list it saves requests about the folders below it."""
        return self.num_pages < self.num_below - FEW_FOLDERS

    def read_page(self, store: Store) -> int:
        """Lists some more; the number of objects."""
        if self._listing is None:
            self._listing = store.list_objects(self.prefix)
        page = {found.uri: found.etag for found in itertools.islice(self._listing, PAGE)}
        self.etags |= page
        self.num_pages += 1
        self.is_complete = len(page) < PAGE
        return len(page)

    def give_up(self) -> int:
        """Forgets the listing, which is not gone on with; the number of objects."""
        number = len(self.etags)
        self.etags, self._listing, self.num_pages = {}, None, math.inf
        return number


def version_read(uri: str, etag: str) -> str:
    """The version of an object or local file that has just been read, whose ETag was then `etag`.

    A file that was written meanwhile has the version that it has now.
    """
    return object_version(etag) if sources.in_store(uri) else file_version(uri)


def object_version(etag: str) -> str:
    """`#etag=...` of an object."""
    return f"#etag={etag.strip(chr(34))}"


def file_version(path: str) -> str:
    """`#size=...&mtime=...` of a local file; empty where none can be read."""
    try:
        found = storage.head(path)
    except StorageError:  # unreadable: the row fails when its picture is fetched
        return ""
    return "" if found is None else f"#size={found.size_bytes}&mtime={found.last_modified.timestamp():.6f}"


def _above(uri: str) -> list[str]:
    """The folders of an object, its own first, up to the bucket."""
    parts = uri.split("/")[:-1]
    return ["/".join(parts[:number]) for number in range(len(parts), 2, -1)]
