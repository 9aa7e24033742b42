"""Objects in stores other than S3, through fsspec: only read, and only where the scheme's own package is installed.

Owns fsspec, whose own configuration decides: the environment variables and configuration files of each package.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pia_ray.errors import (
    StorageDenied,
    StorageError,
    StorageNotFound,
    StorageThrottled,
    StorageUnavailable,
)
from pia_ray.storage.errors import too_large
from pia_ray.storage.patience import patient
from pia_ray.storage.uris import READ_SCHEMES, ObjectStat, join, other_scheme, without_password

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

_REFUSED: Final = frozenset(
    [
        # They read local files, or other URIs that are inside theirs.
        *("local", "asynclocal", "file", "git", "data", "pyscript", "dir", "generic", "reference", "zip", "tar"),
        *("libarchive", "cached", "filecache", "simplecache", "blockcache", "async_wrapper", "asyncwrapper"),
        # They reach any host that a row names, without the guard of https://.
        *("http", "https", "ftp", "sftp", "ssh", "smb", "webdav", "webhdfs", "jupyter", "jlab"),
    ]
)
"""Schemes of fsspec that are not stores."""

_ETAGS: Final = ("ETag", "etag", "e_tag", "md5Hash", "content_md5", "blob_id", "generation", "version_id")
_TIMES: Final = ("LastModified", "last_modified", "mtime", "updated", "modified", "created")
"""Facts by which fsspec's packages tell that an object has changed, and when."""


def refusal(uri: str) -> str:
    """The reason for which objects of this URI's scheme are not read here; empty where they are."""
    if without_password(uri) != uri:
        return "a URI must hold no password; the package of a store reads credentials from its environment"
    return _refusal(other_scheme(uri))


@lru_cache(maxsize=256)
def _refusal(scheme: str) -> str:
    import fsspec
    from fsspec.registry import known_implementations

    unknown = f"{scheme}:// is not read; {READ_SCHEMES}"
    if scheme in _REFUSED:
        return unknown
    try:
        fsspec.get_filesystem_class(scheme)
    except ImportError:
        package = known_implementations[scheme]["class"].partition(".")[0].replace("_", "-")
        return f"{scheme}:// is not read without the package {package}: pip install {package}"
    except ValueError:
        return unknown
    return ""


@patient
def read_object(uri: str, *, max_bytes: int | None) -> tuple[bytes, str]:
    """The content and the ETag, or what stands for one, that the object had before."""
    filesystem, path = _opened(uri)
    with _errors("read", uri):
        about = _about(filesystem, path)
        if max_bytes is not None and about["size"] is not None and about["size"] > max_bytes:
            raise too_large(uri, about["size"], max_bytes)
        content = bytes(filesystem.cat_file(path))
    if about["size"] is not None and len(content) != about["size"]:
        raise StorageUnavailable(f"{uri}: {len(content)} of {about['size']} bytes arrived")
    if max_bytes is not None and len(content) > max_bytes:
        raise too_large(uri, len(content), max_bytes)
    return content, _etag(about)


@patient
def head(uri: str) -> ObjectStat | None:
    """The facts of the object, or None if there is nothing."""
    filesystem, path = _opened(uri)
    try:
        with _errors("read", uri):
            return _stat(uri, _about(filesystem, path))
    except StorageNotFound:
        return None


def list_objects(uri: str, *, suffix: str) -> Iterator[ObjectStat]:
    """Every object below the folder, in the order of their names."""
    filesystem, path = _opened(uri)
    for name, about in sorted(_found(filesystem, path, uri).items()):
        if name.endswith(suffix):
            yield _stat(join(uri, name), about)


@patient
def download_file(uri: str, path: Path) -> None:
    """Streams the object over the file at `path`, which may stay half written."""
    filesystem, source = _opened(uri)
    with _errors("read", uri):
        _about(filesystem, source)
        filesystem.get_file(source, str(path))


def arrow_filesystem(uri: str) -> tuple[FileSystem, str]:
    """A pyarrow file system and the path in it."""
    from pyarrow import PythonFile
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    class Handler(FSSpecHandler):  # type: ignore[misc]
        """Asks the store for what Arrow asks for, without fsspec's read-ahead of 5 MiB for each column."""

        def open_input_file(self, path: str) -> PythonFile:
            """An open object."""
            with _errors("read", uri):
                _about(self.fs, path)
                return PythonFile(_File(self.fs.open(path, mode="rb", cache_type="none"), uri), mode="r")

    filesystem, path = _opened(uri)
    return PyFileSystem(Handler(filesystem)), path


class _File:
    """An open file of fsspec whose reads fail with storage errors."""

    def __init__(self, file: Any, uri: str) -> None:
        self._file = file
        self._uri = uri

    def read(self, size: int = -1) -> bytes:
        """So many of the next bytes, or all."""
        with _errors("read", self._uri):
            return bytes(self._file.read(size))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def _opened(uri: str) -> tuple[Any, str]:
    """The file system of fsspec that serves the URI, and the path in it.

    Not by `url_to_fs`, which takes `::` in a name for another URI inside it.
    """
    import fsspec

    if reason := refusal(uri):
        raise StorageError(reason)
    scheme = other_scheme(uri)
    uri = scheme + uri[len(scheme) :]
    kind = fsspec.get_filesystem_class(scheme)
    with _errors("open", uri):
        path = str(kind._strip_protocol(uri))
        # A listing that is remembered would hide what has changed since.
        return kind(use_listings_cache=False, **kind._get_kwargs_from_urls(uri)), path


@patient
def _found(filesystem: Any, path: str, uri: str) -> dict[str, Mapping[str, Any]]:
    """The store's facts of each object below the folder, by its name below it."""
    try:
        with _errors("list", uri):
            filesystem.invalidate_cache()
            found = filesystem.find(path, detail=True)
            folder = path.rstrip("/")
            if not all(name == folder or name.startswith(f"{folder}/") for name in found):
                folder = str(filesystem.info(path)["name"]).rstrip("/")  # the hub writes revisions in its own way
    except StorageNotFound:
        return {}
    own = ((name.removeprefix(f"{folder}/"), about) for name, about in found.items() if name != folder)
    return {name: about for name, about in own if about.get("type") != "directory"}


def _about(filesystem: Any, path: str) -> Mapping[str, Any]:
    about: Mapping[str, Any] = filesystem.info(path)
    if about.get("type") == "directory":
        raise IsADirectoryError(path)
    return about


def _stat(uri: str, about: Mapping[str, Any]) -> ObjectStat:
    return ObjectStat(uri, int(about.get("size") or 0), _etag(about), _time(about))


def _etag(about: Mapping[str, Any]) -> str:
    """A text that changes with the content, as far as the store gives one: else size and time."""
    named = next((str(about[name]) for name in _ETAGS if about.get(name)), "")
    return named or f"{about.get('size')}-{_time(about).timestamp():.6f}"


def _time(about: Mapping[str, Any]) -> datetime:
    for found in (about.get(name) for name in _TIMES):
        if isinstance(found, int | float):
            return datetime.fromtimestamp(found, UTC)
        if isinstance(found, str):
            try:
                found = datetime.fromisoformat(found)
            except ValueError:
                continue
        if isinstance(found, datetime):
            return found if found.tzinfo is not None else found.replace(tzinfo=UTC)
    return datetime.fromtimestamp(0, UTC)


@contextmanager
def _errors(verb: str, uri: str) -> Iterator[None]:
    """Turns what a package of fsspec raises into the storage error that fits.

    Texts name classes and our own URI only, since messages of stores may quote secrets.
    """
    try:
        yield
    except StorageError:
        raise
    except Exception as error:  # noqa: BLE001 - each package has errors of its own
        raise _storage_error(error, f"cannot {verb} {uri}: ") from None


def _storage_error(error: Exception, start: str) -> StorageError:
    kind, status = type(error).__name__, _status(error)
    if isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError) or status == 404:
        return StorageNotFound(f"{start}there is no such object.")
    refused = isinstance(error, PermissionError) or "Credential" in kind or "Auth" in kind
    if refused or status in (401, 403):
        return StorageDenied(f"{start}access denied ({kind}). Check the credentials that the store's package reads.")
    if status == 429:
        return StorageThrottled(f"{start}the store says that it is asked too often ({kind}).")
    if isinstance(error, ImportError):
        return StorageError(f"{start}the package {error.name} is not installed.")
    if status in (0, 408, 409) and isinstance(error, ValueError | TypeError | NotImplementedError):
        return StorageError(f"{start}the URI is not valid ({kind}).")
    if status in (0, 408, 409) or status >= 500:
        return StorageUnavailable(f"{start}the store did not answer in full ({kind}).")
    return StorageError(f"{start}the store answered {status} ({kind}).")


def _status(error: Exception) -> int:
    """The HTTP status that an error of a package names; 0 without one."""
    response = getattr(error, "response", None)
    candidates = (
        str(getattr(each, name, "")) for each in (error, response) for name in ("status_code", "status", "code")
    )
    return next((int(each) for each in candidates if each.isdecimal()), 0)
