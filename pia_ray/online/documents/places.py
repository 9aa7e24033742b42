"""Where the documents of a kind are, and lists of them by time; documents of 0.1.0, which are elsewhere, included."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Generic

from pia_ray import storage
from pia_ray.errors import StorageNotFound
from pia_ray.online.documents.document import D, Kind
from pia_ray.storage import ObjectStat


class Places(Generic[D]):
    """The places of documents below a prefix.

    The names of documents hold their time backwards, so that a list begins with the newest: a page costs as much
    however many documents there are. Names of 0.1.0 are ids, which sort behind these.
    """

    def __init__(self, prefix: str, kind: Kind[D]) -> None:
        self._prefix = prefix
        self._kind = kind
        self._id = re.compile(rf"(?:[0-9a-f]+-)?({kind.id_pattern})\.json")
        self._earlier: set[str] = set()
        """Documents of 0.1.0 that were read: they stay where they are."""

    def uri(self, owner_folder: str, document_id: str) -> str:
        """The place of a document that was read, or of a new one."""
        if document_id in self._earlier:
            return self.earlier_uri(owner_folder, document_id)
        return storage.join(self._folder(owner_folder), self._kind.name_of(document_id))

    def earlier_uri(self, owner_folder: str, document_id: str) -> str:
        """The place of a document of 0.1.0."""
        return storage.join(self._folder(owner_folder), f"{document_id}.json")

    def is_earlier(self, document_id: str) -> bool:
        """Whether that is a document of 0.1.0 which was read."""
        return document_id in self._earlier

    def read(self, owner_folder: str, document_id: str, *, max_bytes: int) -> tuple[bytes, str]:
        """The content of a document, and its ETag.

        Raises:
            StorageNotFound: there is none.
        """
        uri = self.uri(owner_folder, document_id)
        try:
            return storage.read_object(uri, max_bytes=max_bytes)
        except StorageNotFound:
            earlier = self.earlier_uri(owner_folder, document_id)
            found = storage.read_object(earlier, max_bytes=max_bytes)
            self._earlier.add(document_id)
            return found

    def newest(self, owner_folder: str, *, after: str | None, page: int) -> Iterator[str]:
        """Ids of an owner's documents, the newest first, from behind that id on; names are read in pages."""
        folder = self._folder(owner_folder)
        place = self._name_of(after) or ""
        while True:
            # The content of a file is beside its document.
            found = storage.list_objects(folder, after=place, limit=2 * page)
            names = [each.uri.removeprefix(folder).lstrip("/") for each in found]
            for name in names:
                _, slash, last = name.partition("/")
                match = self._id.fullmatch(last) if slash else None
                if match is not None and (after is None or match[1] < after):
                    yield match[1]
            if names and "/" not in names[-1]:
                yield from self._newest_earlier(owner_folder, after)
                return
            if len(names) < 2 * page:
                return
            place = names[-1]

    def oldest(self, owner_folder: str, *, after: str | None) -> Iterator[str]:
        """Ids of an owner's documents, the oldest first, from behind that id on."""
        folder = self._folder(owner_folder)
        times, earlier = storage.list_folder(folder)
        yield from (each for each in self._ids(earlier) if after is None or each > after)
        first = self._name_of(after)
        for time in reversed(times):
            if first is None or time <= first.partition("/")[0]:
                ids = list(self._ids(storage.list_objects(storage.join(folder, time), suffix=".json")))
                yield from (each for each in reversed(ids) if after is None or each > after)

    def each(self, owner_folder: str = "") -> Iterator[tuple[str, str]]:
        """The owner's folder and the id of each document; of all owners below ""."""
        root, folder = self._folder(""), self._folder(owner_folder)
        for found in storage.list_objects(folder, suffix=".json"):
            if (match := self._id.fullmatch(found.uri.rpartition("/")[2])) is not None:
                yield found.uri.removeprefix(root).lstrip("/").partition("/")[0], match[1]

    def forget(self, document_id: str) -> None:
        """Drops what is kept in memory of a document that was deleted."""
        self._earlier.discard(document_id)

    def delete(self, owner_folder: str, document_id: str) -> None:
        """Removes a document."""
        storage.delete(self.uri(owner_folder, document_id))

    def _newest_earlier(self, owner_folder: str, after: str | None) -> Iterator[str]:
        ids = list(self._ids(storage.list_folder(self._folder(owner_folder))[1]))
        yield from (each for each in reversed(ids) if after is None or each < after)

    def _ids(self, found: Iterable[ObjectStat]) -> Iterator[str]:
        for each in found:
            if (match := self._id.fullmatch(each.uri.rpartition("/")[2])) is not None:
                yield match[1]

    def _name_of(self, after: str | None) -> str | None:
        """The name of a document that a page begins behind; None for the first page."""
        return None if after is None else self._kind.name_of(after)

    def _folder(self, owner_folder: str) -> str:
        return storage.join(self._prefix, self._kind.folder, owner_folder)
