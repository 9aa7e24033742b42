"""One file of a manifest, a chunk of its rows, and the types their columns share over all files.

What every format's reader needs: it knows Arrow types, not formats nor what columns mean.
"""

from __future__ import annotations

import gzip
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any, Final, Literal, NamedTuple

import pyarrow as pa

from pia_ray.config.knobs import REFERENCE_KNOBS
from pia_ray.errors import ManifestError
from pia_ray.storage import sources
from pia_ray.temporary_folders import temporary_folder

Kind = Literal["parquet", "arrow", "csv", "tsv", "jsonl", "txt", "xlsx", "pictures"]

CHUNK_ROWS: Final = 50_000
CHUNK_BYTES: Final = 64 * 2**20
IMAGE_ROWS: Final = 256
"""Rows of images read at once: Parquet stores equal images once, so that sizes in a file say nothing of memory."""


@dataclass(frozen=True)
class TableFile:
    """One file of a manifest, opened once to learn its columns."""

    uri: str
    """Absolute path or URI of an object; of a folder of images, the folder."""
    name: str
    """Its path below the root of all, for messages and as a part of the identity of its pictures."""
    folder: str
    """The folder of its relative references, with a slash at the end."""
    kind: Kind
    schema: pa.Schema
    """Columns with their types: text for CSV, over all JSON lines files for JSON lines."""
    num_rows: int | None = None
    """None where counting would mean another pass (CSV)."""
    json_columns: frozenset[str] = frozenset()
    """Columns of JSON lines with values of several kinds, which pass through as JSON text."""
    pictures: tuple[str, ...] = field(default=(), repr=False)
    """Paths below a folder of images."""
    captions: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Paths of the text files with the prompts of a folder of images, by picture."""
    partitions: Mapping[str, str | None] = field(default_factory=dict)
    """Columns with one value for the whole file, from the names of its folders."""
    delimiter: str = ","
    """The character between the cells of a CSV or TSV file."""
    encoding: str | None = None
    """The encoding of a text file, where the run states it; else UTF-8, or UTF-16 where the bytes show it."""

    @property
    def has_types(self) -> bool:
        """Whether cells may be bytes and structs, which are read in place."""
        return self.kind in ("parquet", "arrow")

    @property
    def keeps_empty(self) -> bool:
        """Whether the format tells empty text from no cell."""
        return self.has_types or self.kind == "jsonl"


@dataclass(frozen=True)
class Columns:
    """The meaning of the columns of one manifest file."""

    id: str | None
    image: str
    prompt: str | None
    knobs: Mapping[str, str]
    """The columns of all other knobs of `AnimationParams`, by knob."""
    passed: Mapping[str, str]
    """The names in the results of the columns that pass through, by column."""
    index: str | None = None
    """The column that tells rows of one id apart, in the results of an earlier run."""

    @property
    def references(self) -> tuple[str, ...]:
        """Those of the knobs that refer to files."""
        return tuple(knob for knob in self.knobs if knob in REFERENCE_KNOBS)

    @property
    def read(self) -> list[str]:
        """The columns whose values planning needs."""
        names = (self.id, self.image, self.prompt, *self.knobs.values(), self.index)
        return [name for name in dict.fromkeys(names) if name is not None]


class PictureOfRow(NamedTuple):
    """One of the pictures of a row."""

    number: int
    """From 0."""
    position: int | None
    """Its position in the list that the cell holds; None where the cell holds none."""

    def id_in(self, row_id: str) -> str:
        """The id of the picture in the row of that id; the first picture has the row's own."""
        return f"{row_id}-p{self.number}" if self.number else row_id


@dataclass(frozen=True)
class Chunk:
    """Some consecutive rows of one file."""

    first_row: int
    """Number of the first row; a file's rows count from 1, without the header."""
    num_rows: int
    cells: Mapping[str, Sequence[Any]]
    """The asked columns as Python values; None for null, and in bad rows."""
    passed: pa.Table
    """The columns that pass through; null in bad rows."""
    bad_rows: Mapping[int, str]
    """Messages by position in the chunk."""
    numbers: Sequence[int] = ()
    """Numbers of the rows, where some have several pictures; else they count from `first_row`."""
    pictures: Sequence[PictureOfRow | None] = ()
    """The pictures of such rows."""

    def number(self, index: int) -> int:
        """The number of a row."""
        return self.numbers[index] if self.numbers else self.first_row + index

    def picture(self, index: int) -> PictureOfRow | None:
        """The picture of a row that is one of several."""
        return self.pictures[index] if self.pictures else None

    def is_blank(self, index: int) -> bool:
        """Whether no cell of a row holds anything."""
        if any(not is_empty(values[index]) for values in self.cells.values()):
            return False
        return all(is_empty(column[index].as_py()) for column in self.passed.columns)

    def head(self, num_rows: int) -> Chunk:
        """Its first rows."""
        if num_rows >= self.num_rows:
            return self
        cells = {name: values[:num_rows] for name, values in self.cells.items()}
        return replace(self, num_rows=num_rows, cells=cells, passed=self.passed.slice(0, num_rows))


def unify(files: Sequence[TableFile], columns: Sequence[Mapping[str, str]]) -> pa.Schema:
    """One schema for the given columns of each file, under their new names; numbers are widened where files differ.

    Raises:
        ManifestError: a column has types that do not go together; names the column and the files.
    """
    types: dict[str, tuple[pa.DataType, str]] = {}
    for file, names in zip(files, columns, strict=True):
        for column, name in names.items():
            kind = pa.string() if column in file.partitions else plain_type(file.schema.field(column).type)
            if name not in types:
                types[name] = (kind, file.name)
                continue
            before, where = types[name]
            try:
                pair = [pa.schema([(name, before)]), pa.schema([(name, kind)])]
                widened = pa.unify_schemas(pair, promote_options="permissive").field(0).type
            except (pa.ArrowTypeError, pa.ArrowInvalid):
                raise ManifestError(
                    f'column "{name}" is {before} in {where} and {kind} in {file.name}: give it one type, or rename it'
                ) from None
            types[name] = (widened, where)
    return pa.schema([(name, pa.string() if pa.types.is_null(kind) else kind) for name, (kind, _) in types.items()])


def cast(column: pa.Array, to: pa.Field, file: TableFile) -> pa.Array:
    """A pass-through column of a file in the type it has over all files.

    Raises:
        ManifestError: a value does not fit, or is not valid text.
    """
    try:
        column.validate(full=True)  # Parquet readers do not check that text is UTF-8
        if column.type == to.type:
            return column
        return column.cast(plain_type(column.type)).cast(to.type)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise ManifestError(
            f'column "{to.name}" of {file.name} is {column.type}, which does not fit {to.type}, its type over all '
            f"files of the manifest: {error}"
        ) from None


def plain_type(kind: pa.DataType) -> pa.DataType:
    """The type without an encoding or extension, which not every reader of the results knows."""
    if isinstance(kind, pa.BaseExtensionType):
        return plain_type(kind.storage_type)
    if pa.types.is_dictionary(kind):
        return plain_type(kind.value_type)
    if pa.types.is_string_view(kind):
        return pa.string()
    return pa.binary() if pa.types.is_binary_view(kind) else kind


def holds_bytes(kind: pa.DataType) -> bool:
    """Whether values of a type may hold pictures or arrays."""
    kind = plain_type(kind)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return pa.types.is_floating(kind.value_type) or holds_bytes(kind.value_type)
    return bool(pa.types.is_nested(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def values_of(column: pa.Array) -> list[Any]:
    """As `to_pylist`, but far faster for text and numbers."""
    if isinstance(column, pa.FixedShapeTensorArray):
        return [None if not value.is_valid else value.to_numpy() for value in column]
    if isinstance(column, pa.ExtensionArray):
        return list(column.to_pylist())
    if (plain := plain_type(column.type)) != column.type:
        column = column.cast(plain)
    kind = column.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        try:
            return list(column.to_numpy(zero_copy_only=False).tolist())
        except (pa.ArrowException, UnicodeDecodeError):  # not UTF-8: its lone surrogates become bad rows
            raw = column.cast(pa.large_binary()).to_pylist()
            return [None if value is None else value.decode("utf-8", "surrogateescape") for value in raw]
    if pa.types.is_integer(kind) or pa.types.is_floating(kind):
        if not column.null_count:
            return list(column.to_numpy(zero_copy_only=False).tolist())
        values = list(column.fill_null(0).to_numpy(zero_copy_only=False).tolist())  # as is, uint64 would turn to float
        for index in column.is_null().to_numpy(zero_copy_only=False).nonzero()[0].tolist():
            values[index] = None
        return values
    return list(column.to_pylist())


def no_twins(names: Sequence[str], file: str) -> None:
    """Refuses a file with several columns of one name.

    Raises:
        ManifestError: names the columns.
    """
    if twins := sorted({name for name in names if names.count(name) > 1}):
        raise ManifestError(f"{file} has more than one column named {', '.join(twins)}: rename all but one")


def nulls(column: pa.Field, num_rows: int) -> pa.Array:
    """A pass-through column for a file that does not have it."""
    return pa.nulls(num_rows, column.type)


def is_empty(cell: object) -> bool:
    """Whether a cell holds nothing: null, no text, or blanks alone."""
    return cell is None or (isinstance(cell, str) and not cell.strip())


def is_packed(uri: str) -> bool:
    """Whether a file is packed, by its name."""
    return uri.lower().endswith((".gz", ".zst"))


@contextmanager
def bytes_of(uri: str) -> Iterator[IO[bytes]]:
    """The unpacked bytes. Objects are copied to a temporary file first, with the store's own retries."""
    with _local_copy(uri) as path:
        stream: Any
        if uri.lower().endswith(".zst"):
            with tempfile.TemporaryFile() as stream:
                with pa.input_stream(str(path), compression="zstd") as packed:
                    shutil.copyfileobj(packed, stream, 2**20)
                stream.seek(0)
                yield stream
            return
        with gzip.open(path, "rb") if uri.lower().endswith(".gz") else path.open("rb") as stream:
            yield stream


@contextmanager
def _local_copy(uri: str) -> Iterator[Path]:
    if not sources.in_store(uri):
        yield Path(uri)
        return
    with temporary_folder() as folder:
        path = folder / "manifest"
        sources.copy_to_file(uri, path)
        yield path
