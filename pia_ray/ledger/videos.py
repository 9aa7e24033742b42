"""The videos of an output compared with the succeeded rows of its ledger: which are missing, which are damaged."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pia_ray import storage
from pia_ray.config.catalog import DAMAGED, MISSING
from pia_ray.errors import StorageNotFound
from pia_ray.ledger import layout
from pia_ray.ledger.index import Index
from pia_ray.ledger.parts import read_winners

SHOWN: Final = 1000
"""Names that a report of `verify` or `rebuild` holds of each kind; the counts are complete."""

_READERS: Final = 32
_BATCH: Final = 16 * _READERS
_HASH_BYTES: Final = 32

_Array = np.ndarray[Any, Any]
Observe = Callable[[int, int], None]
"""Told of the number of videos that are checked, and of all."""


@dataclass(frozen=True)
class VideoCheck:
    """The videos of succeeded rows. The masks have one entry per entry of `chosen`."""

    chosen: _Array
    """Positions of succeeded rows in `index.winners`."""
    missing: _Array
    wrong_size: _Array
    damaged: _Array
    """Of the right size, with another SHA-256 than the row's."""
    num_missing_thumbnails: int = 0
    num_orphans: int = 0
    orphans: list[str] = field(default_factory=list)
    """Videos without a row; at most 1000."""


def check_videos(output: str, index: Index, *, deep: bool, observe: Observe | None = None) -> VideoCheck:
    """The differences of the videos below `output`, also where it was moved since, from the ledger's rows.

    Sizes and, where the store has computed a SHA-256, that are compared; `deep` reads every video and compares its
    hash. Damaged parts are added to the index's list.

    Raises:
        StorageError: the store refused or did not answer.
    """
    rows = _Expected(index)
    seen, wrong, damaged = (np.zeros(len(rows.chosen), np.bool_) for _ in range(3))
    orphans: list[str] = []
    num_orphans = num_checked = 0
    asks = deep or storage.is_s3(output)
    with ThreadPoolExecutor(_READERS, thread_name_prefix="verify") as pool:
        listing = storage.list_objects(storage.join(output, "videos"))
        while found := list(islice(listing, _BATCH)):
            to_hash: list[tuple[int, str]] = []
            for video in found:
                position = position_of(video.uri, rows.high)
                if position is None:
                    num_orphans += 1
                    orphans += [video.uri] if len(orphans) < SHOWN else []
                    continue
                seen[position] = True
                wrong[position] = rows.sizes[position] not in (-1, video.size_bytes)
                if asks and not wrong[position] and rows.hashes[position].any():
                    to_hash.append((position, video.uri))
            hashes = pool.map(lambda entry: _sha256_of(entry[1], deep=deep), to_hash)
            for (position, _), sha256 in zip(to_hash, hashes, strict=True):
                seen[position] = sha256 is not None  # deleted since the listing
                damaged[position] = bool(sha256) and bytes.fromhex(sha256 or "") != rows.hashes[position].tobytes()
            num_checked += len(found)
            if observe is not None:
                observe(num_checked, len(rows.chosen))
    pictures = np.zeros(len(rows.chosen), np.int8)
    for picture in storage.list_objects(storage.join(output, "thumbnails")):
        position = position_of(picture.uri, rows.high)
        if position is not None:
            pictures[position] += 1
    num_missing_thumbnails = int(np.maximum(rows.thumbnails - pictures, 0).sum())
    return VideoCheck(rows.chosen, ~seen, wrong, damaged, num_missing_thumbnails, num_orphans, orphans)


def lost_videos(output: str, index: Index, kinds: Collection[str]) -> _Array:
    """A mask over `index.winners`: succeeded rows whose video is of one of these kinds, "missing" or "damaged".

    Raises:
        StorageError: the store refused or did not answer.
    """
    lost = np.zeros(len(index.winners), np.bool_)
    if kinds:
        found = check_videos(output, index, deep=DAMAGED in kinds)
        if MISSING in kinds:
            lost[found.chosen[found.missing]] = True
        if DAMAGED in kinds:
            lost[found.chosen[found.wrong_size | found.damaged]] = True
    return lost


def move_damaged_aside(output: str, high: _Array) -> None:
    """Moves the videos that are left of these keys, given by their sorted first halves, aside for people to examine."""
    videos = storage.list_objects(storage.join(output, "videos"))
    for uri in [found.uri for found in videos if position_of(found.uri, high) is not None]:
        storage.move(uri, layout.quarantine_uri(output, uri))


def position_of(uri: str, high: _Array) -> int | None:
    """The position of the file's key in the ordered first halves of keys; None for a file of no such key."""
    prefix = layout.key_prefix(uri)
    if prefix is None:
        return None
    position = int(np.searchsorted(high, np.uint64(prefix)))
    return position if position < len(high) and int(high[position]) == prefix else None


def uris_of(index: Index, chosen: _Array) -> Iterator[str]:
    """The URIs of the videos of those winners, or the keys of rows without one."""
    for _, table, _ in read_winners(index, chosen, columns=["video_uri", "work_key"]):
        if isinstance(table, pa.Table):
            yield from (row["video_uri"] or row["work_key"] for row in table.to_pylist())


class _Expected:
    """The facts of succeeded rows that their files are compared with, as parallel arrays: about 45 bytes a row."""

    def __init__(self, index: Index) -> None:
        self.chosen = np.flatnonzero(index.winners.succeeded)
        self.high = index.winners.high[self.chosen]  # in order, as all winners are
        self.sizes = np.full(len(self.chosen), -1, np.int64)
        self.thumbnails = np.zeros(len(self.chosen), np.int8)
        self.hashes = np.zeros((len(self.chosen), _HASH_BYTES), np.uint8)
        """All zero where the row has no hash."""
        columns = ("size_bytes", "thumbnail_uri", "input_thumbnail_uri", "poster_uri", "sha256")
        for uri, table, which in read_winners(index, self.chosen, columns=columns):
            if isinstance(table, pa.Table):
                self.sizes[which] = table["size_bytes"].fill_null(-1).to_numpy()
                thumbnails = [pc.is_valid(table[name]).cast(pa.int8()) for name in columns[1:4]]
                self.thumbnails[which] = sum(each.to_numpy() for each in thumbnails)
                digests = b"".join(bytes.fromhex(text or "00" * _HASH_BYTES) for text in table["sha256"].to_pylist())
                self.hashes[which] = np.frombuffer(digests, np.uint8).reshape(-1, _HASH_BYTES)
            elif table is not None:
                index.damaged[uri] = table.message


def _sha256_of(uri: str, *, deep: bool) -> str | None:
    """The hash of the video, empty where the store has none and the video is not read; None if the video is gone."""
    if not deep:
        found = storage.head(uri)
        return found.sha256 if found is not None else None
    try:
        return storage.sha256_of(uri)
    except StorageNotFound:
        return None
