"""An opened manifest: its files, the meaning of their columns, and the schema of those that pass through."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import pyarrow as pa

from pia_ray import storage
from pia_ray.config.catalog import CatalogConfig
from pia_ray.errors import ManifestError
from pia_ray.manifest import templates
from pia_ray.manifest.columns import ColumnUse, check_decisions, meaning, use_of
from pia_ray.manifest.files import find, read
from pia_ray.manifest.items import ITEMS_SCHEMA
from pia_ray.manifest.several_pictures import each_picture
from pia_ray.manifest.tables import Chunk, Columns, TableFile, unify


@dataclass(frozen=True)
class Manifest:
    """An opened manifest: its files, their columns, and the columns that pass through."""

    uri: str
    """Of several manifests all URIs, with commas."""
    files: tuple[TableFile, ...]
    columns: tuple[Columns, ...]
    """One per file."""
    passed: pa.Schema
    """Under the names that the results give them."""
    use: ColumnUse

    @property
    def items_schema(self) -> pa.Schema:
        """Schema of the tables that `plan` yields."""
        return pa.schema([*ITEMS_SCHEMA, *self.passed])

    def chunks(self, config: CatalogConfig) -> Iterator[tuple[TableFile, Columns, Chunk]]:
        """The rows of all files in order, at most `config.limit`, with the run's prompts where they name columns.

        Raises:
            ManifestError: as `files.read`; or a prompt names a column that a file lacks, or an unknown filter.
        """
        limit, prompts = _Limit(config.limit), templates.templates_of(config)
        for file in self.files if prompts else ():
            for knob, text in prompts.items():
                templates.check(text, knob, names=(*file.schema.names, *file.partitions), where=file.name)
        for file, columns in zip(self.files, self.columns, strict=True):
            chunks = limit.of(read(file, columns, passed=self.passed))
            for rows in each_picture(chunks, file, columns, pictures=config.pictures):
                if columns.prompt is not None and config.defaults.get("prompt"):
                    own = [None if cell == "" else cell for cell in rows.cells[columns.prompt]]
                    rows = replace(rows, cells={**rows.cells, columns.prompt: own})
                yield file, *templates.with_prompts(prompts, columns, rows)


class _Limit:
    """The number of rows that may still be read, over all files."""

    def __init__(self, num_rows: int | None) -> None:
        self._left = num_rows

    def of(self, chunks: Iterator[Chunk]) -> Iterator[Chunk]:
        """The chunks, cut off at the limit."""
        if self._left is None:
            yield from chunks
            return
        while self._left > 0 and (chunk := next(chunks, None)) is not None:
            rows = chunk.head(self._left)
            self._left -= rows.num_rows
            yield rows


def open_manifest(config: CatalogConfig) -> Manifest:
    """The manifest of a run, by its files' headers and footers (JSON lines have neither and are read whole).

    Raises:
        ManifestError: there is no manifest, it has no rows, or its columns cannot work; says which and what to do.
    """
    storage.declare_buckets(anonymous=config.s3_anonymous, requester_pays=config.s3_requester_pays)
    uri = ", ".join(config.manifests)
    found = find(config.manifests, config)
    if all(file.num_rows == 0 for file in found):
        raise ManifestError(f"{uri} has no rows")
    found = tuple(file for file in found if file.num_rows != 0)
    for file in found:
        if file.kind == "pictures" and not file.captions and "prompt" not in config.defaults:
            raise ManifestError(
                f"{file.uri} is a folder of images, which has no prompts: give a --prompt for all, or each picture "
                f"a text file of its name"
            )
    columns = tuple(meaning(file, config) for file in found)
    check_decisions(found, columns, config)
    passed = unify(found, [meant.passed for meant in columns])
    return Manifest(uri, found, columns, passed, use_of(columns, config))
