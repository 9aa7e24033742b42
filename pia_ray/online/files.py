"""Files that callers upload and that batches write: a document and the bytes of each, in storage.

A file belongs to the key that made it; other keys do not see it. Calls block. Knows no HTTP.
"""

from __future__ import annotations

from typing import Final, Literal

from pia_ray import storage
from pia_ray.errors import BadParameter, NotFound, StorageNotFound
from pia_ray.online.documents.document import Document, Kind, Order, Page
from pia_ray.online.documents.store import DocumentStore
from pia_ray.online.public_errors import shortened

Purpose = Literal["batch", "batch_output", "vision", "user_data"]
UPLOAD_PURPOSES: Final = ("batch", "vision", "user_data")
"""Purposes of uploads: the input file of a batch, and pictures that requests name by `file_id`."""


class StoredFile(Document):
    """The document of one file."""

    filename: str
    purpose: Purpose
    size_bytes: int
    expires_at: float


FILES: Final = Kind(
    name="file", model=StoredFile, folder="", expires_at=lambda file: file.expires_at, backfill_expiry=True
)


class FileStore:
    """The files below a prefix. Any number of processes may use the same one."""

    def __init__(self, prefix: str, *, ttl_s: float) -> None:
        self._prefix = storage.join(prefix, "files")
        self._documents = DocumentStore(
            self._prefix, FILES, remove_content=lambda *names: storage.delete(self._content_uri(*names))
        )
        self._ttl_s = ttl_s

    def create(
        self, owner: str, content: bytes, *, filename: str, purpose: Purpose, ttl_s: float | None = None
    ) -> StoredFile:
        """A new file, which expires after `ttl_s`, or after the store's own time."""
        now = self._documents.now()
        file = StoredFile(
            id=self._documents.new_id(),
            owner=owner,
            filename=filename,
            purpose=purpose,
            size_bytes=len(content),
            created_at=now,
            expires_at=now + (self._ttl_s if ttl_s is None else ttl_s),
        )
        self._documents.create(file, contents={self.content_uri(file): content})
        return file

    def get(self, owner: str, file_id: str) -> StoredFile:
        """One file.

        Raises:
            NotFound: there is none of that id, it has expired, or it belongs to another key.
        """
        file = self._documents.read(owner, file_id).document
        if not self._is_kept(file):
            raise NotFound(f'there is no file "{file_id}"')
        return file

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
        """The URI of the bytes."""
        return self._content_uri(self._documents.owner_folder(file.owner), file.id)

    def list(
        self, owner: str, *, after: str | None, limit: int, order: Order, purpose: Purpose | None = None
    ) -> Page[StoredFile]:
        """At most `limit` of the owner's files behind the one with the id `after`."""

        def is_wanted(file: StoredFile) -> bool:
            return self._is_kept(file) and purpose in (None, file.purpose)

        return self._documents.list(owner, after=after, limit=limit, order=order, where=is_wanted)

    def delete(self, owner: str, file_id: str) -> None:
        """Removes a file.

        Raises:
            NotFound: as `get`.
        """
        self._documents.delete(self.get(owner, file_id))

    def sweep(self) -> int:
        """The number of expired files of all owners, which are removed."""
        return self._documents.sweep()

    def _is_kept(self, file: StoredFile) -> bool:
        return self._documents.now() < file.expires_at

    def _content_uri(self, owner_folder: str, file_id: str) -> str:
        if self._documents.is_earlier(file_id):
            return storage.join(self._prefix, owner_folder, f"{file_id}.bin")
        return storage.join(self._prefix, owner_folder, FILES.name_of(file_id).removesuffix(".json") + ".bin")


def parse_purpose(text: str) -> Purpose:
    """The purpose of an upload.

    Raises:
        BadParameter: it is not one of `UPLOAD_PURPOSES`.
    """
    for purpose in UPLOAD_PURPOSES:
        if text == purpose:
            return purpose
    raise BadParameter(f'purpose must be one of {", ".join(UPLOAD_PURPOSES)} (got "{shortened(text)}")', "purpose")
