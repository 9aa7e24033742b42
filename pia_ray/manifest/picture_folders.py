"""Folders of pictures as a manifest: a row for each, with the prompt of the text file of its name, if it has one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import Final

import pyarrow as pa

from pia_ray.errors import StorageNotFound, StorageTooLarge
from pia_ray.manifest.tables import Chunk, TableFile, nulls
from pia_ray.storage import sources

_ROWS: Final = 10_000
_CAPTION_BYTES: Final = 2**16
_READS: Final = 16


def read_pictures(file: TableFile, cells: Sequence[str], passed: pa.Schema) -> Iterator[Chunk]:
    """As `files.read`. A caption's lines become one prompt."""
    for start in range(0, len(file.pictures), _ROWS):
        names = file.pictures[start : start + _ROWS]
        columns: dict[str, Sequence[str | None]] = {"image": names}
        bad: dict[int, str] = {}
        if "prompt" in cells:
            columns["prompt"], bad = _captions(file, names)
        arrays = [nulls(column, len(names)) for column in passed]
        yield Chunk(start + 1, len(names), columns, pa.Table.from_arrays(arrays, schema=passed), bad)


def _captions(file: TableFile, names: Sequence[str]) -> tuple[list[str | None], dict[int, str]]:
    """The captions of pictures, and messages by position for those that are no text."""
    found: list[str | None] = [None] * len(names)
    bad = {}
    texts = {index: text for index, name in enumerate(names) if (text := file.captions.get(name)) is not None}
    with ThreadPoolExecutor(_READS, thread_name_prefix="captions") as pool:
        reads = [pool.submit(copy_context().run, _caption, file.folder + text) for text in texts.values()]
        for (index, text), read in zip(texts.items(), reads, strict=True):
            try:
                found[index] = " ".join(read.result().decode("utf-8-sig").split())
            except UnicodeDecodeError:
                bad[index] = f"has a caption {text} that is not UTF-8: save the file as UTF-8"
            except StorageTooLarge:
                bad[index] = f"has a caption {text} of more than {_CAPTION_BYTES:,} bytes"
    return found, bad


def _caption(uri: str) -> bytes:
    try:
        return sources.read_bytes(uri, max_bytes=_CAPTION_BYTES)
    except StorageNotFound:  # removed since the folder was listed
        return b""
