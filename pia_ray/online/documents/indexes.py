"""Indexes of documents: folders of empty objects, whose names say which document is meant and where it stands."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Generic

from pia_ray import storage
from pia_ray.errors import StorageNotFound
from pia_ray.online.documents.document import D, Index, IndexEntry, Kind
from pia_ray.storage import ObjectStat


class Indexes(Generic[D]):
    """The indexes of a kind below a prefix. `expiry` orders documents by the second in which they expire."""

    def __init__(self, prefix: str, kind: Kind[D], indexes: tuple[Index[D], ...]) -> None:
        self.expiry = Index[D]("expiring", self._expiry_second, digits=12)
        self._prefix = prefix
        self._kind = kind
        self._indexes = (*indexes, self.expiry)
        self._name = re.compile(rf"(?:(\d+)-)?({kind.id_pattern})(?:-([0-9a-f]{{{kind.owner_digits}}}))?")

    def uris(self, document: D) -> set[str]:
        """The entries that the document has to have."""
        ranks = ((index, index.rank(document)) for index in self._indexes)
        return {self.uri(index, document, rank) for index, rank in ranks if rank is not None}

    def uri(self, index: Index[D], document: D, rank: int) -> str:
        """The entry of a document in an index."""
        prefix = f"{rank:0{index.digits}d}-" if index.digits else ""
        name = f"{prefix}{document.id}-{self._kind.owner_folder(document.owner)}"
        return storage.join(self._prefix, index.folder, name)

    def entries(self, index: Index[D]) -> Iterator[IndexEntry]:
        """The entries of an index, in its order."""
        for found in storage.list_objects(storage.join(self._prefix, index.folder)):
            if (entry := self._parsed(found)) is not None:
                yield entry

    def _parsed(self, found: ObjectStat) -> IndexEntry | None:
        match = self._name.fullmatch(found.uri.rpartition("/")[2])
        if match is None:
            return None
        rank, document_id, owner_folder = match.groups()
        if owner_folder is None:  # entries of 0.1.0 for batches hold the name of the owner
            try:
                owner_folder = self._kind.owner_folder(storage.read_bytes(found.uri).decode())
            except StorageNotFound:  # removed since the listing
                return None
        return IndexEntry(document_id, int(rank or 0), owner_folder, found.last_modified, found.uri)

    def _expiry_second(self, document: D) -> int | None:
        expires_at = self._kind.expires_at(document)
        return None if expires_at is None else int(expires_at)
