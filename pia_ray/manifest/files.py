"""A manifest's URI -> its files, each opened by its format and read in chunks of rows.

Finds a file, a folder or a glob, local or in S3. A damaged file is a `ManifestError` that names it.
"""

from __future__ import annotations

import glob
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from logging import getLogger
from pathlib import Path, PurePosixPath
from typing import Any, Final

import pyarrow as pa

from pia_ray import storage
from pia_ray.errors import ManifestError, StorageError
from pia_ray.manifest.parquet import open_parquet, read_parquet
from pia_ray.manifest.references import is_unicode
from pia_ray.manifest.tables import CHUNK_ROWS, Chunk, Columns, Kind, TableFile
from pia_ray.manifest.text import csv_reader, one_type_per_json_column, read_csv, read_jsonl, scan_jsonl

KINDS: Final[Mapping[str, Kind]] = {
    ".parquet": "parquet",
    ".csv": "csv",
    ".tsv": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
}
"""Manifest formats by extension; each may be followed by .gz."""

PICTURES: Final = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".apng", ".tif", ".tiff", ".bmp")
"""Extensions that count as pictures in a folder of images."""

_log = getLogger(__name__)


def find(uri: str) -> tuple[TableFile, ...]:
    """The files of a manifest: itself, those in a folder or of a glob, in order of their names.

    The tables directly in a folder count; where there are none its pictures, and where there are none either, those at
    any depth. Names that start with "." or "_" are left out.

    Raises:
        ManifestError: nothing there, an unknown extension, or a file that cannot be read.
    """
    try:
        root, names = _names(uri)
    except OSError as error:
        raise ManifestError(f"cannot read {uri}: {error.strerror or error}") from None
    tables = [name for name in names if _kind(name) is not None]
    pictures = [name for name in names if PurePosixPath(name).suffix.lower() in PICTURES]
    if tables:
        if len(tables) < len(names):
            _log.info("%s: %d files that are no tables are left out", uri, len(names) - len(tables))
        with ThreadPoolExecutor(max_workers=16) as pool:  # footers are one small request each
            return tuple(one_type_per_json_column(list(pool.map(lambda name: _open(root, name), tables))))
    if pictures:
        schema = pa.schema([("image", pa.string())])
        name = PurePosixPath(root).name
        return (TableFile(root, name, root, "pictures", schema, len(pictures), pictures=tuple(pictures)),)
    known = ", ".join(KINDS)
    raise ManifestError(f"{uri}: no manifest there. A manifest is a {known} (also .gz), or a folder or glob of these")


def read(file: TableFile, columns: Columns, *, passed: pa.Schema) -> Iterator[Chunk]:
    """The rows of a file in order, in chunks of bounded size: the cells that planning needs, and `passed` of all files.

    Empty cells and cells of blanks are null, but where they pass through. An empty negative prompt that a format with
    types holds stays one, as it says that there is none.

    Raises:
        ManifestError: the file is damaged, or a value does not fit the type its column has over all files.
    """
    readers: Mapping[Kind, Callable[[TableFile, Sequence[str], pa.Schema], Iterator[Chunk]]] = {
        "parquet": read_parquet,
        "csv": read_csv,
        "tsv": read_csv,
        "jsonl": read_jsonl,
        "pictures": _read_pictures,
    }
    sources = {new: column for column, new in columns.passed.items()}
    # A column that the file lacks gets a name that none has, and is null there.
    own = pa.schema([field.with_name(sources.get(field.name, f"\0{field.name}")) for field in passed])
    keep = columns.knobs.get("negative_prompt") if file.kind in ("parquet", "jsonl") else None
    try:
        for chunk in readers[file.kind](file, columns.read, own):
            cells = {name: values if name == keep else _filled(values) for name, values in chunk.cells.items()}
            if columns.id is not None and columns.index is not None:
                cells[columns.id] = list(map(_id_of_video, cells[columns.id], cells[columns.index]))
            yield replace(chunk, cells=cells, passed=chunk.passed.rename_columns(passed.names))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise ManifestError(f"{file.name} is damaged or cannot be read: {error}") from None
    except (OSError, EOFError, zlib.error, StorageError) as error:
        raise ManifestError(f"cannot read {file.name}: {error}") from None


def _filled(values: Sequence[Any]) -> Sequence[Any]:
    """The cells with null for text that is empty or all blanks."""
    return [None if type(value) is str and (not value or value.isspace()) else value for value in values]


def _id_of_video(row_id: object, index: object) -> object:
    """The id of one of the videos of a row, as another run's manifest needs it: ids there occur once."""
    return row_id if str(index) in ("0", "None") else f"{row_id}-{index}"


def root_of(uri: str) -> str:
    """The folder of the references of a manifest, by its URI alone; with a slash at the end."""
    if not storage.is_s3(uri):
        uri = str(storage.local_path(uri).expanduser().absolute())
    if glob.has_magic(uri) and (storage.is_s3(uri) or not Path(uri).exists()):
        return _split_glob(uri)[0]
    return (uri.rpartition("/")[0] if _kind(uri) is not None else uri.rstrip("/")) + "/"


def _kind(name: str) -> Kind | None:
    return KINDS.get(PurePosixPath(name.lower().removesuffix(".gz")).suffix)


def _names(uri: str) -> tuple[str, list[str]]:
    """The root, with a slash at its end, and the names of the files below it."""
    if storage.is_s3(uri):
        return _s3_names(uri)
    try:
        path = storage.local_path(uri).expanduser().absolute()
    except StorageError as error:
        raise ManifestError(f"{uri}: a manifest is a local path or an s3:// URI. {error.message}") from None
    if not is_unicode(str(path)):
        raise ManifestError(f"{uri!r}: the path is not UTF-8; rename the folder")
    if path.is_file():
        return _one_file(uri, f"{path.parent}/", path.name)
    if path.is_dir():
        root = f"{path}/"
        return root, _of_folder(uri, (p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()))
    if not glob.has_magic(uri):
        raise ManifestError(f"there is no manifest {uri}")
    root, _ = _split_glob(str(path))
    found = (Path(name) for name in glob.iglob(str(path), recursive=True))  # noqa: PTH207 -- takes absolute patterns
    names = sorted(p.relative_to(root).as_posix() for p in found if p.is_file())
    if not names:
        raise ManifestError(f"{uri} matches no file")
    return root, names


def _s3_names(uri: str) -> tuple[str, list[str]]:
    try:
        if _kind(uri) is not None and storage.exists(uri):
            root, _, name = uri.rpartition("/")
            return f"{root}/", [name]
        if glob.has_magic(uri):
            root, pattern = _split_glob(uri)
            matches = _glob_pattern(pattern).fullmatch
            names = sorted(name for name in _below(root) if matches(name))
            if not names:
                raise ManifestError(f"{uri} matches no object")
            return root, names
        root = uri.rstrip("/") + "/"
        names = list(_below(root))
    except StorageError as error:
        raise ManifestError(f"cannot read {uri}: {error.message}") from None
    if not names:
        if _kind(uri) is None and storage.exists(uri):
            root, _, name = uri.rpartition("/")
            return _one_file(uri, f"{root}/", name)
        raise ManifestError(f"there is no manifest {uri}")
    return root, _of_folder(uri, names)


def _below(root: str) -> Iterator[str]:
    return (found.uri.removeprefix(root) for found in storage.list_objects(root))


def _one_file(uri: str, root: str, name: str) -> tuple[str, list[str]]:
    if _kind(name) is not None:
        return root, [name]
    tip = " For one picture use `pia-ray image`." if PurePosixPath(name).suffix.lower() in PICTURES else ""
    raise ManifestError(f"{uri}: a manifest's extension is {', '.join(KINDS)} (also with .gz).{tip}")


def _of_folder(uri: str, names: Iterable[str]) -> list[str]:
    names = list(names)
    made = tuple(_made_by_runs(names))
    visible = sorted(
        name
        for name in names
        if not any(part[0] in "._" for part in name.split("/") if part) and not name.startswith(made)
    )
    if not visible:
        raise ManifestError(f"{uri} is an empty folder: there is no manifest and no image in it")
    usable = [name for name in visible if _kind(name) or PurePosixPath(name).suffix.lower() in PICTURES]
    direct = [name for name in usable if "/" not in name]
    if direct and len(direct) < len(usable):
        deeper = len(usable) - len(direct)
        _log.warning("%s: %d files in its subfolders are left out; a glob with ** takes them too", uri, deeper)
    return direct or usable or visible


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


def _open(root: str, name: str) -> TableFile:
    uri, folder = root + name, (root + name).rpartition("/")[0] + "/"
    kind = _kind(name)
    assert kind is not None
    try:
        if kind == "parquet":
            with open_parquet(uri) as parquet:
                schema, rows = parquet.schema_arrow, parquet.metadata.num_rows
            _no_twins(schema.names, name)
            return TableFile(uri, name, folder, kind, schema, rows)
        if kind == "jsonl":
            return scan_jsonl(TableFile(uri, name, folder, kind, pa.schema([])))
        with csv_reader(TableFile(uri, name, folder, kind, pa.schema([]))) as (header, rows_left):
            named = [column for column in header if column]
            _no_twins(named, name)
            if len(named) < len(header):
                _log.warning("%s: %d columns without a name are left out", name, len(header) - len(named))
            count = None if next(rows_left, None) is not None else 0
        return TableFile(uri, name, folder, kind, pa.schema([(column, pa.string()) for column in named]), count)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise ManifestError(f"{name} is damaged or no {kind} file: {error}") from None
    except (OSError, EOFError, zlib.error, StorageError) as error:
        raise ManifestError(f"cannot read {name}: {error}") from None


def _no_twins(names: Sequence[str], file: str) -> None:
    if twins := sorted({name for name in names if names.count(name) > 1}):
        raise ManifestError(f"{file} has more than one column named {', '.join(twins)}: rename all but one")


def _read_pictures(file: TableFile, cells: Sequence[str], passed: pa.Schema) -> Iterator[Chunk]:
    assert list(cells) == ["image"]
    assert not passed.names
    for start in range(0, len(file.pictures), CHUNK_ROWS):
        names = file.pictures[start : start + CHUNK_ROWS]
        yield Chunk(start + 1, len(names), {"image": names}, passed.empty_table(), {})
