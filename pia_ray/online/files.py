"""Files that callers upload for batches, and those that batches answer with: a document and the bytes, in storage.

Blocking calls; knows no HTTP. A file belongs to the key that made it: to others it is not there.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from pia_ray import storage
from pia_ray.errors import BadParameter, NotFound, StorageError, StorageNotFound
from pia_ray.online.requests.bodies import shown

Purpose = Literal["batch", "batch_output", "vision", "user_data"]
UPLOAD_PURPOSES: Final = ("batch", "vision", "user_data")
"""What callers may upload files for: lines of a batch, pictures that requests name by `file_id`."""

Order = Literal["asc", "desc"]


class StoredFile(BaseModel):
    """What is known of one file."""

    model_config = ConfigDict(frozen=True)

    id: str
    owner: str
    filename: str
    purpose: Purpose
    size_bytes: int
    created_at: float
    """Seconds since 1970, UTC."""
    expires_at: float


class FileStore:
    """The files below a prefix. Any number of processes may use the same one."""

    def __init__(self, prefix: str, *, ttl_s: float) -> None:
        self._prefix = storage.join(prefix, "files")
        self._ttl_s = ttl_s

    def create(
        self, owner: str, content: bytes, *, filename: str, purpose: Purpose, ttl_s: float | None = None
    ) -> StoredFile:
        """Keeps the bytes until they expire; `ttl_s` in place of the store's own."""
        now = time.time()
        file = StoredFile(
            id=new_id("file"),
            owner=owner,
            filename=filename,
            purpose=purpose,
            size_bytes=len(content),
            created_at=now,
            expires_at=now + (self._ttl_s if ttl_s is None else ttl_s),
        )
        # The document last: a file that is listed can be read.
        storage.write_bytes(self.content_uri(file), content)
        storage.write_bytes(
            self._document_uri(owner, file.id), file.model_dump_json().encode(), content_type="application/json"
        )
        return file

    def get(self, owner: str, file_id: str) -> StoredFile:
        """One file.

        Raises:
            NotFound: there is none of that id, it has expired, or it is another key's.
        """
        if is_id(file_id, "file"):
            try:
                file = StoredFile.model_validate_json(storage.read_bytes(self._document_uri(owner, file_id)))
            except StorageNotFound:
                pass
            except ValidationError:
                raise StorageError(f"the document of file {file_id} is damaged: delete the file") from None
            else:
                if time.time() < file.expires_at:
                    return file
        raise NotFound(f'there is no file "{shown(file_id)}"')

    def read(self, owner: str, file_id: str) -> bytes:
        """The bytes of a file.

        Raises:
            NotFound: as `get`.
        """
        file = self.get(owner, file_id)
        try:
            return storage.read_bytes(self.content_uri(file))
        except StorageNotFound:
            raise NotFound(f'there is no file "{file_id}"') from None

    def content_uri(self, file: StoredFile) -> str:
        """Where the bytes lie."""
        return storage.join(self._prefix, owner_folder(file.owner), f"{file.id}.bin")

    def list(
        self, owner: str, *, after: str | None, limit: int, order: Order, purpose: Purpose | None = None
    ) -> tuple[Sequence[StoredFile], bool]:
        """At most `limit` of the owner's files behind the one with the id `after`, and whether there are more."""
        ids = ids_below(storage.join(self._prefix, owner_folder(owner)))
        files: list[StoredFile] = []
        for file_id in page(ids, after=after, order=order):
            try:
                file = self.get(owner, file_id)
            except NotFound:  # expired, or deleted since the listing
                continue
            if purpose is None or file.purpose == purpose:
                if len(files) == limit:
                    return files, True
                files.append(file)
        return files, False

    def delete(self, owner: str, file_id: str) -> None:
        """Removes a file.

        Raises:
            NotFound: as `get`.
        """
        file = self.get(owner, file_id)
        storage.delete(self._document_uri(owner, file.id))
        storage.delete(self.content_uri(file))

    def sweep(self) -> int:
        """Removes the files that have expired, whoever's they are; how many."""
        removed = 0
        for found in storage.list_objects(self._prefix, suffix=".json"):
            try:
                file = StoredFile.model_validate_json(storage.read_bytes(found.uri))
            except (StorageNotFound, ValidationError):
                continue
            if file.expires_at <= time.time():
                storage.delete(found.uri)
                storage.delete(self.content_uri(file))
                removed += 1
        return removed

    def _document_uri(self, owner: str, file_id: str) -> str:
        return storage.join(self._prefix, owner_folder(owner), f"{file_id}.json")


def new_id(kind: str) -> str:
    """An id that nobody guesses, such as `file_...`; ids of a kind sort by the time they were made."""
    return f"{kind}_{time.time_ns() // 1000:014x}{secrets.token_hex(12)}"


def is_id(text: str, kind: str) -> bool:
    """Whether the text has the form of such an id, and so is fit to be part of a path."""
    prefix, _, digits = text.partition("_")
    return prefix == kind and len(digits) == 38 and all(digit in "0123456789abcdef" for digit in digits)


def owner_folder(owner: str) -> str:
    """The name of the folder of a key's things."""
    return hashlib.sha256(owner.encode()).hexdigest()[:24]


def ids_below(folder: str) -> Iterator[str]:
    """The ids of the documents right in a folder, oldest first."""
    for found in storage.list_objects(folder, suffix=".json"):
        yield found.uri.rpartition("/")[2].removesuffix(".json")


def page(ids: Iterable[str], *, after: str | None, order: Order) -> Iterable[str]:
    """Of ids that come oldest first, those behind `after`, in that order.

    Ids sort by time, so that a page begins at the right place also when the item `after` has been deleted.
    """
    if order == "asc":
        return (each for each in ids if after is None or each > after)
    return reversed([each for each in ids if after is None or each < after])


def parse_purpose(text: str) -> Purpose:
    """The purpose of an upload.

    Raises:
        BadParameter: it is none of `UPLOAD_PURPOSES`.
    """
    for purpose in UPLOAD_PURPOSES:
        if text == purpose:
            return purpose
    raise BadParameter(f'purpose must be one of {", ".join(UPLOAD_PURPOSES)} (got "{shown(text)}")', "purpose")
