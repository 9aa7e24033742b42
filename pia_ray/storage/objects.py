"""Reads, writes and lists objects by URI, wherever they are; what each call promises stands here for every store."""

from __future__ import annotations

import itertools
import logging
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final

from pia_ray.errors import OutputError, OutputUnavailable, StorageError, StorageNotFound
from pia_ray.storage import counts, local, s3
from pia_ray.storage.errors import local_errors
from pia_ray.storage.uris import ObjectStat, is_s3, join, local_path

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

STALE_TEMPORARY_S: Final = 24 * 3600.0
"""Temporary files and unfinished uploads older than this belong to nobody."""

_log = logging.getLogger(__name__)


def read_bytes(uri: str, *, max_bytes: int | None = None) -> bytes:
    """The whole content; a body that is cut off on the way is read again.

    Raises:
        StorageTooLarge: it is longer than `max_bytes`; nothing beyond that was read.
        StorageDamaged: the bytes do not have the SHA-256 that the store keeps of them.
        StorageError: as everywhere in this module, the kind that fits.
    """
    return read_object(uri, max_bytes=max_bytes)[0]


def read_object(uri: str, *, max_bytes: int | None = None) -> tuple[bytes, str]:
    """As `read_bytes`, with the ETag of that content, for `replace_bytes`."""
    found = s3.read_object(uri, max_bytes=max_bytes) if is_s3(uri) else local.read_object(uri, max_bytes=max_bytes)
    counts.count_read(len(found[0]))
    return found


def pieces_of(uri: str) -> tuple[int, Iterator[bytes]]:
    """The length of the content, and the content in pieces of at most 1 MiB. The last one, or closing, frees it."""
    return s3.pieces_of(uri) if is_s3(uri) else local.pieces_of(uri)


def sha256_of(uri: str) -> str:
    """The hash of the content as it is now, in hex; the object is streamed, whatever its length."""
    return s3.sha256_of(uri) if is_s3(uri) else local.sha256_of(uri)


def write_bytes(
    uri: str,
    content: bytes,
    *,
    content_type: str = "application/octet-stream",
    metadata: Mapping[str, str] | None = None,
    synced: bool = True,
) -> None:
    """Writes `content` in one atomic step, over what may be there.

    On a local disk what is not `synced` outlives this process, and may not outlive the machine.
    """
    if is_s3(uri):
        s3.write_bytes(uri, content, content_type=content_type, metadata=metadata or {})
    else:
        local.write_bytes(uri, content, synced=synced)
    counts.count_written(len(content))


def create_bytes(
    uri: str,
    content: bytes,
    *,
    content_type: str = "application/octet-stream",
    metadata: Mapping[str, str] | None = None,
    synced: bool = True,
) -> bool:
    """Whether `content` was put there, because nothing was there; what was there is left alone.

    A put whose answer was lost is recognised as this call's own. On a store without conditional writes it is a plain
    put after a check. `synced` is as for `write_bytes`.
    """
    return create_object(uri, content, content_type=content_type, metadata=metadata, synced=synced) is not None


def create_object(
    uri: str,
    content: bytes,
    *,
    content_type: str = "application/octet-stream",
    metadata: Mapping[str, str] | None = None,
    synced: bool = True,
) -> str | None:
    """As `create_bytes`, with the ETag of the new object for `replace_bytes`; None if something was there."""
    if is_s3(uri):
        created = s3.create_bytes(uri, content, content_type=content_type, metadata=metadata or {})
    else:
        created = local.create_bytes(uri, content, synced=synced)
    counts.count_written(len(content) if created is not None else 0)
    return created


def replace_bytes(uri: str, content: bytes, *, etag: str, content_type: str = "application/json") -> str | None:
    """The new ETag of the object, which is replaced if its ETag is `etag`; None if it has changed or gone.

    A store that does not know the condition If-Match may answer so each time.
    On a store without conditional writes, and on local file systems without locks, the comparison is not atomic.
    """
    if is_s3(uri):
        return s3.replace_bytes(uri, content, etag=etag, content_type=content_type)
    return local.replace_bytes(uri, content, etag=etag)


def head(uri: str) -> ObjectStat | None:
    """The facts of the object or file, or None if there is nothing."""
    return s3.head(uri) if is_s3(uri) else local.head(uri)


def exists(uri: str) -> bool:
    """Whether an object (not a mere folder) is there."""
    return head(uri) is not None


def clock(uri: str) -> datetime:
    """The time at the store that holds `uri`, in UTC: two machines that ask agree, even if their own clocks differ."""
    return s3.clock(uri) if is_s3(uri) else local.clock(uri)


def list_objects(
    uri: str, *, suffix: str = "", after: str = "", before: str = "", limit: int | None = None
) -> Iterator[ObjectStat]:
    """Every object below the folder or prefix `uri`, at any depth, in the order of their names.

    With `after`, a name below `uri`, those behind it; with `before`, a name in the folder itself, those that come
    before it; with a `limit` at most so many, and no more are asked for. A folder that is not there has no objects;
    temporary files of writers at work are left out.
    """
    found = s3.list_objects if is_s3(uri) else local.list_objects
    return itertools.islice(found(uri, suffix=suffix, after=after, before=before, limit=limit), limit)


def list_folder(uri: str) -> tuple[list[str], list[ObjectStat]]:
    """The names of the folders in the folder or prefix `uri`, and the objects in it, each in order."""
    return s3.list_folder(uri) if is_s3(uri) else local.list_folder(uri)


def remove_empty_folder(uri: str) -> None:
    """Removes a folder of a local disk if nothing is in it; elsewhere folders are not there without objects."""
    if not is_s3(uri):
        local.remove_empty_folder(uri)


def delete(uri: str) -> None:
    """Removes the object; that it is not there is fine."""
    if is_s3(uri):
        s3.delete(uri)
    else:
        local.delete(uri)


def delete_all(uris: Sequence[str]) -> None:
    """Removes these objects of one store; on S3 in one request for each thousand of a bucket."""
    s3.delete_all([uri for uri in uris if is_s3(uri)])
    for uri in uris:
        if not is_s3(uri):
            local.delete(uri)


def move(uri: str, target: str) -> None:
    """Gives the object another name in the same store, over what may be there; a crash may leave it under both."""
    if is_s3(uri):
        s3.copy(uri, target)
        s3.delete(uri)
    else:
        local.move(uri, target)


def copy(uri: str, target: str, *, content_type: str = "application/octet-stream") -> None:
    """Copies the object over what may be at `target`, inside the store where it holds both; it appears whole or not.

    Inside S3 the object keeps its own content type.
    """
    if is_s3(uri) and is_s3(target):
        s3.copy(uri, target)
    elif is_s3(target):
        upload_file(local_path(uri), target, content_type=content_type)
    else:
        copy_to_file(uri, local_path(target))


def link(uri: str, target: str) -> bool:
    """Whether a local file has got another name on its disk, over what may be there: some file systems give none."""
    return local.link(uri, target)


def presign(uri: str, *, expires_s: int) -> str:
    """An https:// link by which anyone can read the object for that time; for a local file its file:// URI."""
    return s3.presign(uri, expires_s=expires_s) if is_s3(uri) else local_path(uri).resolve().as_uri()


def copy_to_file(uri: str, path: str | Path) -> None:
    """Streams the object into a local file, in parts where it is large; the file appears whole or not at all."""
    path = Path(path)
    with local_errors("write", str(path)), local.temporary_beside(path, b"") as temporary:
        if is_s3(uri):
            s3.download_file(uri, temporary)
        else:
            local.copy_file(uri, temporary)
        counts.count_read(temporary.stat().st_size)
        temporary.replace(path)


def upload_file(path: str | Path, uri: str, *, content_type: str = "application/octet-stream") -> None:
    """Streams a local file to `uri`, in parts where it is large; it appears whole or not at all."""
    if is_s3(uri):
        s3.upload_file(Path(path), uri, content_type=content_type)
    else:
        local.upload_file(Path(path), uri)
    counts.count_written(Path(path).stat().st_size)


def arrow_filesystem(uri: str) -> tuple[FileSystem, str]:
    """A pyarrow file system and the path in it, for reading Parquet in columns and by Ray Data.

    It asks the endpoint, with the credentials and in the region, that boto3 would use. Not for writing: it cannot
    write conditionally.
    """
    if is_s3(uri):
        return s3.arrow_filesystem(uri)
    from pyarrow import fs

    return fs.LocalFileSystem(), str(local_path(uri))


def conditional_writes(uri: str) -> bool:
    """Whether the store refuses to overwrite when asked to; true until `probe` or a write has found otherwise."""
    return not is_s3(uri) or s3.conditional_writes(uri)


def probe(output_uri: str, *, folders: Sequence[str] = ()) -> None:
    """Writes, reads and deletes a small object, and learns whether the store has conditional writes.

    In each of `folders` it creates and deletes one too, because rights may differ by prefix.

    Raises:
        OutputUnavailable: the store does not answer, or has no space.
        OutputError: says what is refused and what to do about it.
    """
    uri = join(output_uri, "_ledger", f"probe-{uuid.uuid4().hex}")
    content = b"pia-ray was here to see whether it can write"
    with _refusals(output_uri, uri):
        if is_s3(uri):
            s3.greet(uri)
        create_bytes(uri, content)
        if is_s3(uri):
            works = conditional_writes(uri) and not create_bytes(uri, content)
            s3.remember_conditional_writes(uri, works=works)
            if not works:
                _log.warning(
                    "%s has no conditional writes: results stay right, but two runs at once are not kept apart",
                    output_uri,
                )
        if read_bytes(uri) != content:
            raise OutputError(f"{output_uri}: what was written is not what is read back")
        delete(uri)
        for folder in folders:
            beside = join(output_uri, folder, uri.rpartition("/")[2])
            create_bytes(beside, content)
            delete(beside)


def compares_etags(uri: str) -> bool:
    """Whether the store replaces an object by its ETag alone, as two writes of a small object show."""
    if not is_s3(uri):
        return True
    name = join(uri, f"probe-{uuid.uuid4().hex}")
    etag = create_object(name, b"")
    try:
        is_refused = replace_bytes(name, b"other", etag=f'"{uuid.uuid4().hex}"') is None
        return is_refused and etag is not None and replace_bytes(name, b"own", etag=etag) is not None
    finally:
        delete(name)


def check_writable(uri: str) -> None:
    """Writes and removes a file in the folder, or in the nearest above it that exists; on S3 an object below it.

    Leaves no trace, so that it can come before what may be refused for other reasons.

    Raises:
        OutputUnavailable, OutputError: as `probe`.
    """
    name = join(uri, "_ledger", f"probe-{uuid.uuid4().hex}")
    with _refusals(uri, name):
        if not is_s3(uri):
            local.check_writable(uri)
        else:
            create_bytes(name, b"")
            delete(name)


@contextmanager
def _refusals(output_uri: str, uri: str) -> Iterator[None]:
    """Turns what the store refuses of `uri`, a name that is ours, into an error about the output."""
    try:
        yield
    except StorageError as error:
        reason = error.message.replace(uri, output_uri)
        if isinstance(error, StorageNotFound):
            raise OutputError(f"{reason} Create it, or choose another.") from None
        kind = OutputUnavailable if error.retryable else OutputError
        raise kind(f"the output {output_uri} cannot be used: {reason}") from None


def sweep(uri: str, *, older_than_s: float = STALE_TEMPORARY_S) -> int:
    """The number of temporary files and unfinished multipart uploads of dead writers below `uri`, which are removed."""
    return s3.sweep(uri, older_than_s=older_than_s) if is_s3(uri) else local.sweep(uri, older_than_s=older_than_s)
