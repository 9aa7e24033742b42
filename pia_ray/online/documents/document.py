"""The values of the document store: documents, their kinds, and how an index orders them."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Final, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict

from pia_ray.errors import Conflict, NotFound

Order = Literal["asc", "desc"]


class Document(BaseModel):
    """An object of an owner. Times in documents are seconds since 1970 by the store's clock."""

    # A newer replica's fields stay in the document when an older one changes it, as during an upgrade.
    model_config = ConfigDict(frozen=True, extra="allow", protected_namespaces=())

    id: str
    """The name of the kind, the time of creation and random digits: ids sort by time and cannot be guessed."""
    owner: str
    """Id of the key that made it."""
    created_at: float
    revision: int = 0
    """Counts the changes of this document."""


_MOST_US: Final = 2**52 - 1
"""A time after all others, in microseconds: the year 2112."""

D = TypeVar("D", bound=Document)


@dataclass(frozen=True)
class Index(Generic[D]):
    """An order of documents: by a rank, and within a rank by age."""

    folder: str
    """Of its entries."""
    rank: Callable[[D], int | None]
    """The rank of a document; None for one that is not in the index."""
    digits: int = 0
    """Of the rank in the name of an entry; with 0 the name has none."""
    by_owner: bool = False
    """Whether each rank has a folder, and in it each owner; entries of 0.1.0 lie in the index's folder itself."""
    idle_s: float = 0.0
    """Seconds for which an index that was empty is not read again, unless this process writes an entry."""


@dataclass(frozen=True)
class Kind(Generic[D]):
    """A kind of documents: names and places, which storage keeps for ever."""

    name: str
    """Begins every id."""
    model: type[D]
    folder: str
    """The name of the folder of documents within each owner's folder."""
    expires_at: Callable[[D], float | None]
    """The time at which a document is to be removed; None as long as that is open."""
    backfill_expiry: bool = False
    """Whether the first sweep of a process adds documents of 0.1.0 to the index of what expires."""
    id_bytes: int = 12
    """Random ones of an id."""
    owner_digits: int = 24
    """Hex digits of the digest that stands for an owner in names."""
    not_found: type[NotFound] = NotFound
    conflict: type[Conflict] = Conflict

    def owner_folder(self, owner: str) -> str:
        """The owner in names: hex digits."""
        return hashlib.sha256(owner.encode("utf-8", "surrogatepass")).hexdigest()[: self.owner_digits]

    def id_at(self, time_us: int, *, digits: str | None = None) -> str:
        """An id of that time, in microseconds since 1970, with these hex digits, which are random if left out."""
        return f"{self.name}_{time_us:014x}{(digits or secrets.token_hex(self.id_bytes))[: 2 * self.id_bytes]}"

    def time_of(self, document_id: str) -> float:
        """The time in an id of this kind, in seconds since 1970."""
        return int(document_id.removeprefix(f"{self.name}_")[:14], 16) / 1e6

    def name_of(self, document_id: str) -> str:
        """The document in its owner's folder: the newest has the first name. A folder holds those of 268 s."""
        backwards = f"{_MOST_US - int(document_id.removeprefix(f'{self.name}_')[:14], 16):013x}"
        return f"{backwards[:6]}/{backwards[6:]}-{document_id}.json"

    @property
    def id_pattern(self) -> str:
        """Regular expression of an id."""
        return rf"{self.name}_[0-9a-f]{{{14 + 2 * self.id_bytes}}}"


@dataclass(frozen=True)
class Revision(Generic[D]):
    """A document as it was read or written, for a change that is refused if another one came between."""

    document: D
    etag: str


@dataclass(frozen=True)
class IndexEntry:
    """A document as an index names it."""

    id: str
    rank: int
    owner_folder: str
    written_at: datetime
    uri: str


@dataclass(frozen=True)
class Page(Generic[D]):
    """Part of the list of an owner's documents."""

    documents: tuple[D, ...]
    has_more: bool
    """Whether others follow the last of these."""
