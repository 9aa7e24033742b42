"""Documents in storage, a JSON object each: what video jobs, files and batches have in common.

A document belongs to an owner and changes by compare-and-swap, so that of two changes that meet one is refused. An
index names the documents of all owners in an order of its own. Its entry is written before the document that it names
and removed after it: a crash in between leaves an entry too many, and the document alone says what is true.
Calls block. Knows no HTTP.
"""

from __future__ import annotations

import itertools
import logging
import math
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, Generic

from pydantic import ValidationError

from pia_ray import storage
from pia_ray.errors import Conflict, NotFound, StorageError, StorageNotFound
from pia_ray.online.documents.document import D, Document, Index, IndexEntry, Kind, Order, Page, Revision
from pia_ray.online.documents.indexes import Indexes
from pia_ray.online.documents.places import Places
from pia_ray.online.public_errors import shortened

MAX_DOCUMENT_BYTES: Final = 16_000_000
CLOCK_S: Final = 600.0
"""Seconds after which the store's clock is read again."""
ABANDONED_S: Final = 3600.0
"""Seconds after which an entry without a document belongs to a request that broke off."""
_TRIES: Final = 20
_READERS: Final = 8

_log = logging.getLogger(__name__)


class DocumentStore(Generic[D]):
    """The documents of a kind below a prefix; safe in threads and in any number of processes.

    `remove_content` removes what belongs to a document and lies outside of it, by the folder of its owner and its id.
    """

    def __init__(
        self,
        prefix: str,
        kind: Kind[D],
        *,
        indexes: tuple[Index[D], ...] = (),
        remove_content: Callable[[str, str], None],
    ) -> None:
        self._prefix = prefix
        self._kind = kind
        self._indexes = Indexes(prefix, kind, indexes)
        self._places = Places(prefix, kind)
        self._backfill_expiry = kind.backfill_expiry
        self._remove_content = remove_content
        self._lock = threading.Lock()
        self._clock_offset_s = 0.0
        self._clock_read_at = -CLOCK_S
        self._last_us = 0
        self._num_written: Counter[str] = Counter()
        """By index, its entries that this process has written."""
        self._empty_until: dict[str, float] = {}
        """By index, how long it is taken to be empty."""

    def now(self) -> float:
        """Seconds since 1970 by the store's clock, on which all replicas agree to a second or so."""
        with self._lock:
            if time.monotonic() - self._clock_read_at >= CLOCK_S:
                self._clock_offset_s = storage.clock(self._prefix).timestamp() - time.monotonic()
                self._clock_read_at = time.monotonic()
            return time.monotonic() + self._clock_offset_s

    def owner_folder(self, owner: str) -> str:
        """The owner in names: hex digits."""
        return self._kind.owner_folder(owner)

    def is_earlier(self, document_id: str) -> bool:
        """Whether that is a document of 0.1.0 which was read."""
        return self._places.is_earlier(document_id)

    def new_id(self) -> str:
        """A new id that cannot be guessed. The ids of one process sort in the order of their creation."""
        now_us = int(self.now() * 1e6)
        with self._lock:
            self._last_us = max(now_us, self._last_us + 1)
            return self._kind.id_at(self._last_us)

    def checked_id(self, document_id: str) -> str:
        """The id itself.

        Raises:
            NotFound: it has not the form of an id, and so is not fit to be part of a name.
        """
        if re.fullmatch(self._kind.id_pattern, document_id) is None:
            raise self._missing(document_id)
        return document_id

    def read(self, owner: str, document_id: str) -> Revision[D]:
        """The owner's document of that id.

        Raises:
            NotFound: there is none, or it belongs to another owner.
        """
        return self._read(self.owner_folder(owner), self.checked_id(document_id))

    def create(self, document: D, *, contents: Mapping[str, bytes] | None = None) -> Revision[D] | None:
        """The new document, written after its contents by URI; None if it is there already, which is left alone."""
        for uri in sorted(self._indexes.uris(document)):
            self._add(uri)
        for uri, content in (contents or {}).items():
            storage.write_bytes(uri, content)
        etag = storage.create_object(self._uri(document), _json(document), content_type="application/json")
        return None if etag is None else Revision(document, etag)

    def replace(self, at: Revision[D], change: Mapping[str, Any]) -> Revision[D]:
        """The document with these fields changed.

        Raises:
            Conflict: it was changed or deleted since `at`.
        """
        document = at.document.model_copy(update={**change, "revision": at.document.revision + 1})
        before, after = self._indexes.uris(at.document), self._indexes.uris(document)
        for uri in sorted(after - before):
            self._add(uri)
        etag = storage.replace_bytes(self._uri(document), _json(document), etag=at.etag)
        if etag is None:
            raise self._kind.conflict(f"{document.id} was changed by another process")
        self._remove(document, before - after)
        return Revision(document, etag)

    def change(self, owner: str, document_id: str, edit: Callable[[D], Mapping[str, Any]]) -> D:
        """The document with the fields changed that `edit` gives, however often others change it in between.

        Raises:
            NotFound: as `read`.
            Conflict: others never stop; what `edit` raises passes through.
        """
        for _ in range(_TRIES):
            at = self.read(owner, document_id)
            change = edit(at.document)
            if not change:
                return at.document
            try:
                return self.replace(at, change).document
            except Conflict:
                continue
        raise self._kind.conflict(f"{document_id} changes too fast: try again")

    def delete(self, document: D, *, late_s: float = 0.0) -> None:
        """Removes a document, its content and its entries; the document first, because it refers to the content.

        With `late_s` the sweep also removes what is written of its content within that time.
        """
        entries = self._indexes.uris(document)
        if late_s:
            late = self._indexes.uri(self._indexes.expiry, document, int(self.now() + late_s))
            self._add(late)
            entries.discard(late)
        self._places.delete(self.owner_folder(document.owner), document.id)
        self._remove_content(self.owner_folder(document.owner), document.id)
        self._remove(document, entries)
        self._places.forget(document.id)

    def list(
        self,
        owner: str,
        *,
        after: str | None = None,
        limit: int,
        order: Order = "desc",
        where: Callable[[D], bool] = lambda _: True,
    ) -> Page[D]:
        """At most `limit` of an owner's documents, the newest or the oldest first; those behind the id `after`.

        Ids sort by time, so that a page begins at its place also where the document `after` has been deleted.

        Raises:
            NotFound: `after` has not the form of an id.
        """
        if after is not None:
            self.checked_id(after)
        folder = self.owner_folder(owner)
        if order == "desc":
            ids = self._places.newest(folder, after=after, page=limit + 1)
        else:
            ids = self._places.oldest(folder, after=after)

        def read(document_id: str) -> D | None:
            try:
                return self.read(owner, document_id).document
            except NotFound:  # deleted since the listing
                return None

        documents: list[D] = []
        with ThreadPoolExecutor(_READERS) as readers:
            while some := list(itertools.islice(ids, limit + 1 - len(documents))):
                documents += [one for one in readers.map(read, some) if one is not None and where(one)]
        return Page(tuple(documents[:limit]), has_more=len(documents) > limit)

    def find(self, document_id: str) -> Revision[D]:
        """The document of that id, whoever its owner is. It is searched for among the names of all documents.

        Raises:
            NotFound: there is none.
        """
        wanted = self.checked_id(document_id)
        for owner_folder, found_id in self._places.each():
            if found_id == wanted:
                return self._read(owner_folder, wanted)
        raise self._missing(document_id)

    def each(self, *, owner: str | None = None, created_before: float = math.inf) -> Iterator[Revision[D]]:
        """The documents of one owner or of all, the newest first. Those that are damaged are logged and left out."""
        names = self._places.each("" if owner is None else self.owner_folder(owner))
        newest = sorted(names, key=lambda name: name[1], reverse=True)
        wanted = [name for name in newest if self._kind.time_of(name[1]) < created_before]

        def read(name: tuple[str, str]) -> Revision[D] | None:
            try:
                return self._read(*name)
            except NotFound:  # deleted since the listing
                return None
            except StorageError as error:
                _log.error("%s cannot be read: %s", name[1], error.message)
                return None

        with ThreadPoolExecutor(_READERS) as readers:
            for start in range(0, len(wanted), 4 * _READERS):
                found = readers.map(read, wanted[start : start + 4 * _READERS])
                yield from (each for each in found if each is not None)

    def entries(self, index: Index[D], limit: int | None = None) -> tuple[IndexEntry, ...]:
        """The first `limit` entries of an index, or all, by rank and then by age.

        Of an index by owner the first are by rank and owner. One with `idle_s` that was empty may be up to so old.
        """
        found = tuple(self.each_entry(index, limit))
        return tuple(sorted(found, key=lambda entry: (entry.rank, entry.id))) if index.by_owner else found

    def each_entry(self, index: Index[D], limit: int | None = None) -> Iterator[IndexEntry]:
        """As `entries`, in the order of their names, and read as they are taken."""
        with self._lock:
            if time.monotonic() < self._empty_until.get(index.folder, 0.0):
                return
            num_written, is_empty = self._num_written[index.folder], True
        for entry in self._indexes.entries(index, limit):
            is_empty = False
            yield entry
        with self._lock:
            if index.idle_s and is_empty and num_written == self._num_written[index.folder]:
                self._empty_until[index.folder] = time.monotonic() + index.idle_s

    def unranked_entries(self, index: Index[D]) -> Iterator[IndexEntry]:
        """The entries that 0.1.0 wrote in an index whose names have ranks since; theirs have none, and come last."""
        return self._indexes.unranked(index)

    def entries_of(self, index: Index[D], owner_folder: str, rank: int, *, limit: int) -> Sequence[IndexEntry]:
        """The first entries of an owner at that rank, oldest first, in an index by owner."""
        return self._indexes.entries_of(index, owner_folder, rank, limit=limit)

    def ranks(self, index: Index[D]) -> tuple[Sequence[int], Sequence[IndexEntry]]:
        """The ranks with entries in an index by owner, and its entries of 0.1.0, which are beside these."""
        return self._indexes.ranks(index)

    def owner_folders(self, index: Index[D], rank: int) -> Sequence[str]:
        """The owners with entries at that rank in an index by owner."""
        return self._indexes.owner_folders(index, rank)

    def read_entry(self, entry: IndexEntry) -> Revision[D]:
        """The document of an entry. Where a request broke off long ago, its content and the entry are removed.

        Raises:
            NotFound: there is no such document, or not yet.
        """
        try:
            return self._read(entry.owner_folder, entry.id)
        except NotFound:
            if self.now() - entry.written_at.timestamp() > ABANDONED_S:
                self._remove_content(entry.owner_folder, entry.id)
                self.delete_entry(entry)
            raise

    def add_entry(self, index: Index[D], document: D) -> None:
        """Writes a document's entry in an index, if it has to have one and has lost it."""
        if (rank := index.rank(document)) is not None:
            self._add(self._indexes.uri(index, document, rank))

    def delete_entry(self, entry: IndexEntry) -> None:
        """Removes an entry of an index."""
        self._indexes.delete(entry.uri)

    def mend_entry(self, entry: IndexEntry, index: Index[D], document: D) -> None:
        """Gives a document's entry in an index the name that it has to have, where `entry` has another."""
        rank = index.rank(document)
        if rank is None or self._indexes.uri(index, document, rank) != entry.uri:
            if rank is not None:
                self._add(self._indexes.uri(index, document, rank))
            self.delete_entry(entry)

    def sweep(self, before_delete: Callable[[D], None] = lambda _: None) -> int:
        """The number of documents that have expired, which are deleted. Entries that are out of date are mended."""
        if self._backfill_expiry:
            self._add_expiry_entries()
            self._backfill_expiry = False
        now, num_deleted = self.now(), 0
        for entry in self._indexes.entries(self._indexes.expiry, before_rank=int(now) + 1):
            try:
                document = self._read(entry.owner_folder, entry.id).document
            except NotFound:
                self._remove_content(entry.owner_folder, entry.id)
                storage.delete(entry.uri)
                continue
            except StorageError as error:
                _log.error("%s cannot expire: %s", entry.id, error.message)
                continue
            second = self._indexes.expiry.rank(document)
            if second is not None and second <= now:
                before_delete(document)
                self.delete(document)
                num_deleted += 1
            elif second is not None:  # the entry of a process that came too late to end the document
                storage.create_bytes(self._indexes.uri(self._indexes.expiry, document, second), b"")
                storage.delete(entry.uri)
        return num_deleted

    def _add_expiry_entries(self) -> None:
        known = {entry.id for entry in self._indexes.entries(self._indexes.expiry)}
        for owner_folder, document_id in self._places.each():
            if document_id in known:
                continue
            try:
                document = self._read(owner_folder, document_id).document
            except NotFound:
                continue
            except StorageError as error:
                _log.error("%s cannot expire: %s", document_id, error.message)
                continue
            if (second := self._indexes.expiry.rank(document)) is not None:
                storage.create_bytes(self._indexes.uri(self._indexes.expiry, document, second), b"")

    def _read(self, owner_folder: str, document_id: str) -> Revision[D]:
        try:
            content, etag = self._places.read(owner_folder, document_id, max_bytes=MAX_DOCUMENT_BYTES)
            return Revision(self._kind.model.model_validate_json(content), etag)
        except StorageNotFound:
            raise self._missing(document_id) from None
        except ValidationError as error:
            uri = self._places.uri(owner_folder, document_id)
            raise StorageError(f"{uri} is damaged: {error.errors(include_url=False)[0]['msg']}") from None

    def _add(self, uri: str) -> None:
        """Writes an entry of an index."""
        storage.create_bytes(uri, b"")
        with self._lock:
            folder = self._indexes.folder_of(uri)
            self._num_written[folder] += 1
            self._empty_until.pop(folder, None)

    def _remove(self, document: D, uris: set[str]) -> None:
        """Removes entries of a document."""
        for uri in sorted(uris):
            self._indexes.delete(uri)
            if self._places.is_earlier(document.id):
                self._indexes.delete_earlier(uri)

    def _missing(self, document_id: str) -> NotFound:
        return self._kind.not_found(f'there is no {self._kind.name} "{shortened(document_id)}"')

    def _uri(self, document: D) -> str:
        return self._places.uri(self.owner_folder(document.owner), document.id)


def _json(document: Document) -> bytes:
    return document.model_dump_json().encode()
