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
        self._by_owner = {index.folder for index in indexes if index.by_owner}
        owner = rf"[0-9a-f]{{{kind.owner_digits}}}"
        self._owned = re.compile(rf"(\d+)/({owner})/({kind.id_pattern})")
        self._name = re.compile(rf"(?:(\d+)-)?({kind.id_pattern})(?:-({owner}))?")

    def uris(self, document: D) -> set[str]:
        """The entries that the document has to have."""
        ranks = ((index, index.rank(document)) for index in self._indexes)
        return {self.uri(index, document, rank) for index, rank in ranks if rank is not None}

    def uri(self, index: Index[D], document: D, rank: int) -> str:
        """The entry of a document in an index."""
        owner_folder = self._kind.owner_folder(document.owner)
        if index.by_owner:
            return storage.join(self._of_owner(index, owner_folder, rank), document.id)
        prefix = f"{rank:0{index.digits}d}-" if index.digits else ""
        return storage.join(self._prefix, index.folder, f"{prefix}{document.id}-{owner_folder}")

    def folder_of(self, uri: str) -> str:
        """The folder of the index that an entry belongs to."""
        return uri.removeprefix(self._prefix).lstrip("/").partition("/")[0]

    def entries(
        self, index: Index[D], limit: int | None = None, *, before_rank: int | None = None
    ) -> Iterator[IndexEntry]:
        """The entries of an index by rank; within a rank by owner where it has folders of these, else by age."""
        folder = storage.join(self._prefix, index.folder)
        before = "" if before_rank is None else f"{before_rank:0{index.digits}d}"
        for found in storage.list_objects(folder, before=before, limit=limit):
            if (entry := self._parsed(found, folder)) is not None:
                yield entry

    def unranked(self, index: Index[D]) -> Iterator[IndexEntry]:
        """The entries of 0.1.0, whose names have no rank: they come behind all names that begin with digits."""
        folder = storage.join(self._prefix, index.folder)
        for found in storage.list_objects(folder, after=":"):
            if (entry := self._parsed(found, folder)) is not None:
                yield entry

    def entries_of(self, index: Index[D], owner_folder: str, rank: int, *, limit: int) -> list[IndexEntry]:
        """The first entries of an owner at that rank, oldest first, in an index with a folder for each."""
        found = storage.list_objects(self._of_owner(index, owner_folder, rank), limit=limit)
        return [
            IndexEntry(each.uri.rpartition("/")[2], rank, owner_folder, each.last_modified, each.uri) for each in found
        ]

    def ranks(self, index: Index[D]) -> tuple[list[int], list[IndexEntry]]:
        """The ranks of an index by owner, and its entries of 0.1.0, which are in no folder of an owner."""
        folder = storage.join(self._prefix, index.folder)
        ranks, earlier = storage.list_folder(folder)
        parsed = (self._parsed(each, folder) for each in earlier)
        return [int(rank) for rank in ranks], [each for each in parsed if each is not None]

    def owner_folders(self, index: Index[D], rank: int) -> list[str]:
        """The owners with entries at that rank."""
        return storage.list_folder(storage.join(self._prefix, index.folder, f"{rank:0{index.digits}d}"))[0]

    def delete(self, uri: str) -> None:
        """Removes an entry, and on a disk its owner's folder with the last one."""
        storage.delete(uri)
        if self.folder_of(uri) in self._by_owner:
            storage.remove_empty_folder(uri.rpartition("/")[0])

    def delete_earlier(self, uri: str) -> None:
        """Removes the entry that 0.1.0 wrote in place of that one, if it wrote one of another name."""
        folder = self.folder_of(uri)
        if folder in self._by_owner:
            rank, owner_folder, document_id = uri.split("/")[-3:]
            storage.delete(storage.join(self._prefix, folder, f"{rank}-{document_id}-{owner_folder}"))

    def _of_owner(self, index: Index[D], owner_folder: str, rank: int) -> str:
        return storage.join(self._prefix, index.folder, f"{rank:0{index.digits}d}", owner_folder)

    def _parsed(self, found: ObjectStat, folder: str) -> IndexEntry | None:
        name = found.uri.removeprefix(folder).lstrip("/")
        if (owned := self._owned.fullmatch(name)) is not None:
            return IndexEntry(owned[3], int(owned[1]), owned[2], found.last_modified, found.uri)
        match = self._name.fullmatch(name)
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
