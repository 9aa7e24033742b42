"""Objects on local disks: every write goes through a temporary file, mostly synced, which is then renamed or linked."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import stat
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO, Final

from pia_ray.storage.errors import local_errors, too_large
from pia_ray.storage.patience import patient
from pia_ray.storage.uris import ObjectStat, join, local_path

_TEMPORARY_PREFIX: Final = ".tmp-"
_TRIES: Final = 10

_GONE: Final = (errno.ENOENT, errno.ENOTDIR, errno.ESTALE)
"""Errors of a folder or file that was removed since it was listed; ESTALE on network mounts."""

_NO_LINKS: Final = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV)
"""Errors of a file system that gives a file no second name."""


@patient
def read_object(uri: str, *, max_bytes: int | None) -> tuple[bytes, str]:
    """The content, and the ETag of the file that was read, whatever has taken its place since."""
    with local_errors("read", uri), local_path(uri).open("rb") as file:
        facts = os.fstat(file.fileno())
        content = file.read() if max_bytes is None else file.read(max_bytes + 1)
        if max_bytes is not None and len(content) > max_bytes:
            raise too_large(uri, max(facts.st_size, len(content)), max_bytes)
        return content, _object_stat(uri, facts).etag


def pieces_of(uri: str) -> tuple[int, Iterator[bytes]]:
    with local_errors("read", uri):
        file = local_path(uri).open("rb")

    def pieces() -> Iterator[bytes]:
        with file:
            while piece := file.read(2**20):
                yield piece

    return os.fstat(file.fileno()).st_size, pieces()


def sha256_of(uri: str) -> str:
    with local_errors("read", uri), local_path(uri).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@patient
def write_bytes(uri: str, content: bytes, *, synced: bool = True) -> None:
    with local_errors("write", uri), temporary_beside(local_path(uri), content, synced=synced) as temporary:
        temporary.replace(local_path(uri))


@patient
def create_bytes(uri: str, content: bytes, *, synced: bool = True) -> str | None:
    """The ETag of the new file; None if something was there."""
    with local_errors("write", uri), temporary_beside(local_path(uri), content, synced=synced) as temporary:
        etag = _object_stat(uri, temporary.stat()).etag  # the file keeps its inode under its other name
        return etag if _link(temporary, local_path(uri)) else None


@patient
def check_writable(uri: str) -> None:
    folder = local_path(uri).absolute()
    with local_errors("write", uri):
        while not folder.exists() and folder != folder.parent:
            folder = folder.parent
        with tempfile.TemporaryFile(dir=folder):
            pass


@patient
def replace_bytes(uri: str, content: bytes, *, etag: str) -> str | None:
    with local_errors("write", uri), _folder_lock(local_path(uri).parent):
        now = head(uri)
        if now is None or now.etag != etag:
            return None
        write_bytes(uri, content)
        now = head(uri)
        return now.etag if now is not None else None


@patient
def head(uri: str) -> ObjectStat | None:
    with local_errors("read", uri):
        try:
            facts = local_path(uri).stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        return None if stat.S_ISDIR(facts.st_mode) else _object_stat(uri, facts)


@patient
def clock(uri: str) -> datetime:
    """The time by the file system of the folder `uri`, which may be another machine's."""
    with local_errors("write", uri), temporary_beside(local_path(uri) / "clock", b"") as temporary:
        return datetime.fromtimestamp(temporary.stat().st_mtime, UTC)


def list_objects(uri: str, *, suffix: str, after: str, before: str, limit: int | None) -> Iterator[ObjectStat]:
    """The files; a folder is read when the files before it have been taken."""
    return _files(uri, suffix, after.split("/") if after else [], before)


def _files(uri: str, suffix: str, after: Sequence[str], before: str = "") -> Iterator[ObjectStat]:
    """The files behind the one that `after` names, a folder in each item, and before that entry of the folder."""
    first = after[0] if after else ""
    for entry in _entries(uri, first, before):
        below = join(uri, entry.name)
        if entry.is_dir():
            yield from _files(below, suffix, after[1:] if entry.name == first else [])
        elif below.endswith(suffix) and entry.name != first and (found := _entry_stat(below, entry)) is not None:
            yield found


def list_folder(uri: str) -> tuple[list[str], list[ObjectStat]]:
    entries = _entries(uri, "")
    found = (_entry_stat(join(uri, entry.name), entry) for entry in entries if not entry.is_dir())
    return [entry.name for entry in entries if entry.is_dir()], [each for each in found if each is not None]


def remove_empty_folder(uri: str) -> None:
    with contextlib.suppress(OSError):
        local_path(uri).rmdir()


def _entries(uri: str, first: str, before: str = "") -> list[os.DirEntry[str]]:
    """The entries of a folder in order, from that name on and before the other, without temporary files.

    None if it is not there. Names outside of these bounds are read and dropped one by one.
    """
    with local_errors("list", uri):
        try:
            with os.scandir(local_path(uri)) as found:
                wanted = (each for each in found if (not before or each.name < before) and each.name >= first)
                named = (each for each in wanted if not each.name.startswith(_TEMPORARY_PREFIX))
                return sorted(named, key=lambda entry: entry.name)
        except OSError as error:
            if error.errno in _GONE:
                return []
            raise


def _entry_stat(uri: str, entry: os.DirEntry[str]) -> ObjectStat | None:
    """The facts of an entry; None where it was deleted since the listing."""
    with local_errors("list", uri):
        try:
            return _object_stat(uri, entry.stat())
        except OSError as error:
            if error.errno in _GONE:
                return None
            raise


@patient
def delete(uri: str) -> None:
    with local_errors("delete", uri), contextlib.suppress(FileNotFoundError, NotADirectoryError):
        local_path(uri).unlink()


def move(uri: str, target: str) -> None:
    with local_errors("move", uri):
        _make_folder(local_path(target).parent)
        local_path(uri).replace(local_path(target))


def link(uri: str, target: str) -> bool:
    """Whether the file now has that name too; a file system without links, or another disk, has not."""
    with local_errors("link", uri):
        try:
            with temporary_beside(local_path(target), b"") as temporary:
                temporary.unlink()  # a link is made under a new name only
                os.link(local_path(uri), temporary)
                temporary.replace(local_path(target))
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            return False
    return True


def copy_file(uri: str, path: Path) -> None:
    """Copies the object over the file at `path`, which may stay half written."""
    with local_errors("read", uri):
        shutil.copyfile(local_path(uri), path)


@patient
def upload_file(path: Path, uri: str) -> None:
    with local_errors("write", uri), temporary_beside(local_path(uri), b"") as temporary:
        shutil.copyfile(path, temporary)
        _sync(temporary)
        temporary.replace(local_path(uri))


def sweep(uri: str, *, older_than_s: float) -> int:
    """The number of temporary files of dead writers, which are removed."""
    folder = local_path(uri)
    removed = 0
    with local_errors("sweep", uri):
        if not folder.is_dir():
            return 0
        oldest = clock(uri).timestamp() - older_than_s
        for path in folder.rglob(f"{_TEMPORARY_PREFIX}*"):
            with contextlib.suppress(FileNotFoundError):
                if path.is_file() and path.stat().st_mtime < oldest:
                    path.unlink()
                    removed += 1
    return removed


@contextlib.contextmanager
def temporary_beside(target: Path, content: bytes, *, synced: bool = True) -> Iterator[Path]:
    """A temporary file in the folder of `target` for the body to link or rename; both are synced, or neither is."""
    # A fixed name would let two writers take each other's file.
    temporary = target.parent / f"{_TEMPORARY_PREFIX}{uuid.uuid4().hex}"
    try:
        with _created(temporary) as file:
            file.write(content)
            if synced:
                file.flush()
                os.fsync(file.fileno())
        yield temporary
        if synced:
            with contextlib.suppress(FileNotFoundError):  # others removed what was written, and the empty folder
                _sync(target.parent)
    finally:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):  # where its folder could not be made
            temporary.unlink()


def _link(temporary: Path, target: Path) -> bool:
    try:
        os.link(temporary, target)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        with _folder_lock(target.parent):  # file systems without links: vfat, some network mounts
            if target.exists():
                return False
            temporary.replace(target)
    return True


def _created(path: Path) -> BinaryIO:
    """The new file, open for writing, in a folder that others may remove while it is empty."""
    for _ in range(_TRIES):
        _make_folder(path.parent)
        with contextlib.suppress(FileNotFoundError):
            return path.open("xb")
    return path.open("xb")


def _make_folder(folder: Path) -> None:
    missing = []
    while not folder.is_dir():
        missing.append(folder)
        folder = folder.parent
    for path in reversed(missing):
        path.mkdir(exist_ok=True)
        _sync(path.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network mounts cannot sync folders
            raise
    finally:
        os.close(handle)


@contextlib.contextmanager
def _folder_lock(folder: Path) -> Iterator[None]:
    _make_folder(folder)
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a mount without locks: the comparison is then not atomic
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _object_stat(uri: str, facts: os.stat_result) -> ObjectStat:
    return ObjectStat(
        uri=uri,
        size_bytes=facts.st_size,
        etag=f"{facts.st_ino:x}-{facts.st_mtime_ns:x}-{facts.st_size:x}",
        last_modified=datetime.fromtimestamp(facts.st_mtime, UTC),
    )
