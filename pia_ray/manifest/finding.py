"""A manifest's URI -> the names of its files: a file, a folder or a glob, local or in a store.

What is in a folder and what is taken from it agree: files that are left out are counted in one warning. Tables that
have a log of their own are refused.
"""

from __future__ import annotations

import glob
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import takewhile
from logging import getLogger
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Final, NamedTuple
from urllib.parse import unquote

from pia_ray import storage
from pia_ray.errors import ManifestError, ManifestUnavailable, StorageError
from pia_ray.formatting import count_of
from pia_ray.manifest.references import is_unicode, redacted
from pia_ray.manifest.tables import Kind
from pia_ray.storage import sources

KINDS: Final[Mapping[str, Kind]] = {
    ".parquet": "parquet",
    ".csv": "csv",
    ".tsv": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".txt": "txt",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".ipc": "arrow",
    ".xlsx": "xlsx",
    ".xlsm": "xlsx",
}
"""Manifest formats by extension; each may be followed by .gz or .zst."""

_BY_NAME_ALONE: Final = (".json", ".txt")
"""Formats that folders hold for other ends, such as notes and captions: they are manifests where they are named."""

_CAPTIONS: Final = (".txt", ".caption")
"""Extensions of the text files with a picture's prompt."""

PICTURES: Final = frozenset(
    [
        *(
            ".jpg",
            ".jpeg",
            ".jpe",
            ".jfif",
            ".jif",
            ".pjpeg",
            ".pjp",
            ".png",
            ".apng",
            ".webp",
            ".gif",
            ".tif",
            ".tiff",
        ),
        *(".bmp", ".dib", ".heic", ".heif", ".hif", ".avif", ".jxl", ".jp2", ".j2k", ".jpf", ".jpx", ".ico", ".svg"),
        *(".tga", ".pcx", ".ppm", ".pgm", ".pbm", ".pnm", ".psd"),
        *(".cr2", ".cr3", ".nef", ".arw", ".dng", ".orf", ".rw2", ".raf"),
    ]
)
"""Extensions that count as pictures in a folder of images; a picture that cannot be read is a failed row."""

_PICTURE_AND_MORE: Final = re.compile(r"\.(?:jpe?g|png|webp|gif|avif|heic)[^a-z0-9].*")
"""Extensions that content networks and browsers go on with, such as `.jpg_large` and `.jpg!d`."""

_LOGS: Final[Mapping[str, re.Pattern[str]]] = {
    "a Delta Lake table": re.compile(r"(?P<root>|.*/)_delta_log/.+"),
    "an Apache Iceberg table": re.compile(r"(?P<root>|.*/)metadata/[^/]+\.metadata\.json"),
    "an Apache Hudi table": re.compile(r"(?P<root>|.*/)\.hoodie/.+"),
    "a Lance table": re.compile(r"(?P<root>|.*/)_versions/[^/]+\.manifest"),
}
"""Files by which a table with a log is known, with the table's own folder."""

_EXPORTS: Final[Mapping[str, str]] = {
    "a Delta Lake table": ", for example with DeltaTable(...).to_pyarrow_table() of the package deltalake",
    "an Apache Iceberg table": ", for example with table.scan().to_arrow() of the package pyiceberg",
}

_log = getLogger(__name__)


class Found(NamedTuple):
    """The files of a manifest."""

    root: str
    """The folder of all, with a slash at its end."""
    tables: Sequence[str]
    """Names of tables below the root, in order."""
    pictures: Sequence[str]
    """Names of pictures below the root, in order; empty where there are tables."""
    captions: Mapping[str, str] = MappingProxyType({})
    """Names of the text files with the pictures' prompts, by picture."""


def find_names(uri: str) -> Found:
    """The names of a manifest's files: itself, those in a folder or of a glob, in order.

    The tables directly in a folder count; where there are none its pictures, and where there are none either, those at
    any depth. Names that start with "." and folders that start with "_" are left out.

    Raises:
        ManifestError: nothing there, an unknown extension, or a table with a log.
        OSError: the system refuses the path.
    """
    if sources.in_store(uri):
        return _in_store(uri)
    if not uri:
        raise ManifestError("the manifest is missing: give a file or a folder")
    try:
        path = storage.local_path(uri).absolute()
    except StorageError as error:
        raise ManifestError(f"{uri}: a manifest is a local path or an s3:// URI. {error.message}") from None
    if not is_unicode(str(path)):
        raise ManifestError(f"{uri!r}: the path is not UTF-8; rename the folder")
    if _is_file(path):
        return _one_file(uri, f"{path.parent}/", path.name)
    if path.is_dir():
        below = (Path(folder) for folder in _folders(str(path)))
        return _of_folder(uri, f"{path}/", [_name(p, path) for each in below for p in each.iterdir() if _is_file(p)])
    if path.exists():
        raise ManifestError(f"{uri} is a pipe or device, which can be read once only: write it to a file")
    if not glob.has_magic(uri):
        raise ManifestError(f"there is no manifest {uri}")
    root, _ = _split_glob(str(path))
    names = sorted({_name(p, root) for p in map(Path, _matches(str(path))) if _is_file(p)})
    if not names:
        raise ManifestError(f"{uri} matches no file")
    return _of_glob(uri, root, names, _logs_near(Path(root), names))


def _is_file(path: Path) -> bool:
    """Whether that is a file, or a link to one that is gone: its name stands for a row, which fails."""
    return path.is_file() or (path.is_symlink() and not path.exists())


def _name(path: Path, root: str | Path) -> str:
    return path.relative_to(root).as_posix()


def _matches(pattern: str) -> Iterator[str]:
    """The paths of an absolute pattern, in any order. `**` follows links of folders, but not in circles."""
    fixed, deep, rest = f"{pattern}/".partition("/**/")
    if not deep:
        yield from glob.iglob(pattern)  # noqa: PTH207 -- takes absolute patterns
        return
    for top in glob.iglob(fixed or "/"):  # noqa: PTH207 -- as above
        for folder in _folders(top, hidden=False) if Path(top).is_dir() else ():
            yield from _matches(f"{glob.escape(folder)}/{rest.rstrip('/') or '*'}")


def _folders(top: str, above: frozenset[str] = frozenset(), *, hidden: bool = True) -> Iterator[str]:
    """A folder and all below it, also through links, but for those to a folder above. `hidden` are `.git` and such."""
    above |= {os.path.realpath(top)}
    yield top
    with os.scandir(top) as found:
        others = (entry for entry in found if not entry.is_file(follow_symlinks=False))
        below = [(entry.path, entry.is_symlink()) for entry in others if hidden or not entry.name.startswith(".")]
    for folder, is_link in below:
        if Path(folder).is_dir() and not (is_link and os.path.realpath(folder) in above):
            yield from _folders(folder, above, hidden=hidden)


def kind_of(name: str) -> Kind | None:
    """The format of a manifest of this name; None for what is no table."""
    return KINDS.get(PurePosixPath(name.lower().removesuffix(".gz").removesuffix(".zst")).suffix)


def root_of(uri: str) -> str:
    """The folder of the references of a manifest, by its URI alone; with a slash at the end."""
    if not sources.in_store(uri):
        uri = str(storage.local_path(uri).absolute())
    if glob.has_magic(uri) and (sources.in_store(uri) or not Path(uri).exists()):
        return _split_glob(uri)[0]
    return (uri.rpartition("/")[0] if kind_of(uri) is not None else uri.rstrip("/")) + "/"


def common_folder(roots: Sequence[str]) -> str:
    """The deepest folder that holds all of these folders, with a slash at its end; empty where there is none."""
    parts = [root.split("/")[:-1] for root in roots]
    common = [level[0] for level in takewhile(lambda level: len(set(level)) == 1, zip(*parts, strict=False))]
    if common[1:2] == [""] and common[0].endswith(":") and len(common) < 3:  # buckets differ
        return ""
    return "/".join(common) + "/" if common else ""


def partitions_of(name: str) -> dict[str, str | None]:
    """The Hive partition columns of a file, from the folders `column=value` in its name."""
    pairs = (part.partition("=") for part in name.split("/")[:-1] if "=" in part)
    return {
        unquote(column): None if value == "__HIVE_DEFAULT_PARTITION__" else unquote(value)
        for column, _, value in pairs
        if column
    }


def _in_store(uri: str) -> Found:
    if reason := sources.refusal(uri):
        raise ManifestError(f"{redacted(uri)}: {reason}")
    try:
        if kind_of(uri) is not None and sources.exists(uri):
            root, _, name = uri.rpartition("/")
            return Found(f"{root}/", [name], [])
        if glob.has_magic(uri):
            root, pattern = _split_glob(uri)
            matches = _glob_pattern(pattern).fullmatch
            below = list(_below(root))
            names = sorted(filter(matches, below))
            if not names:
                raise ManifestError(f"{uri} matches no object")
            return _of_glob(uri, root, names, below)
        root = uri.rstrip("/") + "/"
        names = list(_below(root))
    except StorageError as error:
        kind = ManifestUnavailable if error.retryable else ManifestError
        raise kind(f"cannot read {uri}: {error.message}") from None
    if not names:
        if kind_of(uri) is None and sources.exists(uri):
            root, _, name = uri.rpartition("/")
            return _one_file(uri, f"{root}/", name)
        raise ManifestError(f"there is no manifest {uri}")
    return _of_folder(uri, root, names)


def _below(root: str) -> Iterator[str]:
    """The names of objects; those that stand for folders are left out."""
    names = (found.uri.removeprefix(root) for found in sources.list_objects(root))
    return (name for name in names if name and not name.endswith(("/", "_$folder$")))


def _one_file(uri: str, root: str, name: str) -> Found:
    if kind_of(name) is not None:
        return Found(root, [name], [])
    tip = " For one picture use `pia-ray image`." if _is_picture(name) else ""
    raise ManifestError(f"{uri}: a manifest's extension is {', '.join(KINDS)} (also with .gz or .zst).{tip}")


def _of_glob(uri: str, root: str, names: Sequence[str], below: Iterable[str]) -> Found:
    _refuse_logs(uri, below, names)
    if all(kind_of(name) is not None for name in names):
        return Found(root, names, [])
    return _sorted_out(uri, root, names, num_deeper=0)


def _of_folder(uri: str, root: str, names: Sequence[str]) -> Found:
    made = tuple(_made_by_runs(names))
    visible = sorted(name for name in names if _is_visible(name) and not name.startswith(made))
    if not visible:
        raise ManifestError(f"{uri} is an empty folder: there is no manifest and no image in it")
    sure = [name for name in visible if _is_table(name) or _is_picture(name)]
    level = [name for name in visible if "/" not in name] if any("/" not in name for name in sure) else visible
    _refuse_logs(uri, names, level)
    return _sorted_out(uri, root, level, num_deeper=len(set(sure).difference(level)))


def _sorted_out(uri: str, root: str, names: Sequence[str], *, num_deeper: int) -> Found:
    """The tables among the names, or else the pictures; the rest is counted in a warning."""
    tables = [name for name in names if _is_table(name)]
    pictures = [name for name in names if _is_picture(name)]
    unnamed = [name for name in names if _has_no_extension(name)]
    if not tables:
        pictures = sorted({*pictures, *unnamed})
    captions = {} if tables else _captions(names, pictures)
    left_out = set(names).difference(tables, pictures, captions.values())
    parts = _counted(left_out)
    if tables and pictures:
        parts.append(f"{count_of(len(pictures), 'picture')}, items only where a row names them")
    if num_deeper:
        parts.append(f"{count_of(num_deeper, 'file')} in its subfolders (a glob with ** takes them too)")
    if parts and (tables or pictures):
        _log.warning("%s: left out are %s", uri, ", ".join(parts))
    if not tables and not pictures:
        known = ", ".join(KINDS)
        raise ManifestError(
            f"{uri}: no manifest there. A manifest is a {known} (also .gz or .zst), or a folder or glob of these"
        )
    return Found(root, tables, [] if tables else pictures, captions)


def _captions(names: Iterable[str], pictures: Iterable[str]) -> dict[str, str]:
    """The text file of each picture that has one: `a.txt` or `a.caption` for `a.jpg`."""
    texts = {name for name in names if name.endswith(_CAPTIONS)}
    stems = ((picture, picture.removesuffix(PurePosixPath(picture).suffix)) for picture in pictures)
    found = ((picture, next((stem + end for end in _CAPTIONS if stem + end in texts), None)) for picture, stem in stems)
    return {picture: text for picture, text in found if text is not None}


def _counted(names: Iterable[str]) -> list[str]:
    """Counts of files by extension."""
    counts = Counter(PurePosixPath(name).suffix.lower() for name in names)
    return [f"{count} {suffix or 'without extension'}" for suffix, count in sorted(counts.items())]


def _is_visible(name: str) -> bool:
    *folders, file = [part for part in name.split("/") if part] or [""]
    hidden = any(part[0] in "._" for part in folders) or file[:1] == "." or file[:2] == "~$"  # Excel's locks
    # Cameras begin the names of Adobe RGB pictures with an underscore.
    return not hidden and (file[:1] != "_" or _is_picture(file))


def _is_table(name: str) -> bool:
    """Whether a file of a folder is a table, and not a note or caption."""
    stem = name.lower().removesuffix(".gz").removesuffix(".zst")
    return kind_of(name) is not None and not stem.endswith(_BY_NAME_ALONE)


def _is_picture(name: str) -> bool:
    suffix = PurePosixPath(name).suffix.lower()
    return suffix in PICTURES or _PICTURE_AND_MORE.fullmatch(suffix) is not None


def _has_no_extension(name: str) -> bool:
    suffix = PurePosixPath(name).suffix
    return not suffix or suffix[1:].isdigit()


def _refuse_logs(uri: str, below: Iterable[str], names: Sequence[str]) -> None:
    """Refuses names inside a table whose log says which of its files count."""
    for name in below:
        for kind, pattern in _LOGS.items():
            if (match := pattern.fullmatch(name)) and any(taken.startswith(match["root"]) for taken in names):
                raise ManifestError(
                    f"{uri}: {match['root'] or 'it'} is {kind}, whose log says which of its files count; read as loose "
                    f"files, rows that were withdrawn would be animated. Write its rows to a Parquet file first"
                    f"{_EXPORTS.get(kind, '')}"
                )


def _logs_near(root: Path, names: Sequence[str]) -> Iterator[str]:
    """Names, below a root, of the logs of tables that hold the given files."""
    folders = {parent.as_posix() for name in names for parent in PurePosixPath(name).parents}
    for folder in sorted(folders):
        for pattern in ("_delta_log/*", ".hoodie/*", "metadata/*.metadata.json", "_versions/*.manifest"):
            for path in (root / folder).glob(pattern):
                yield path.relative_to(root).as_posix()


def _made_by_runs(names: Iterable[str]) -> set[str]:
    """Prefixes of the names that earlier runs left in this folder, because an output may be in or below it."""
    starts: set[str] = set()
    for name in names:
        head, ledger, _ = f"/{name}".partition("/_ledger/")
        if ledger and head:
            starts.add(f"{head[1:]}/")
        elif ledger:
            starts |= {"videos/", "thumbnails/", "results.parquet"}
    return starts


def _split_glob(pattern: str) -> tuple[str, str]:
    """The fixed folders in front of the first wildcard, with a slash at their end, and the rest."""
    parts = pattern.split("/")
    fixed = next(index for index, part in enumerate(parts) if glob.has_magic(part))
    return "/".join(parts[:fixed]) + "/", "/".join(parts[fixed:])


def _glob_pattern(pattern: str) -> re.Pattern[str]:
    """A shell pattern over names with slashes: * and ? stay inside one folder, ** spans any number of them."""
    tokens = re.findall(r"\*\*/|\*\*|\*|\?|\[!?\]?[^\]]*\]|.", pattern, re.DOTALL)
    text = ""
    for token in tokens:
        if token in ("**/", "**", "*", "?"):
            text += {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}[token]
        elif token.startswith("[") and len(token) > 2:
            inner = token[1:-1].replace("\\", "\\\\")
            text += f"[^{inner[1:]}]" if inner.startswith("!") else f"[{inner}]"
        else:
            text += re.escape(token)
    return re.compile(text, re.DOTALL)
