"""An output's succeeded videos under names of the user's, in a folder or S3 prefix, with posters and a feed.

Videos are copied several at a time, each whole or not at all; what an earlier export copied is not copied again. All
names are known before anything is copied. Decodes no video; what one tells of its making is reduced
to the level that is asked for.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Final, cast

import pyarrow.parquet as pq

from pia_ray import ledger, storage
from pia_ray.catalog.export.feed import FACTS, Feed, FeedFormat, url_base, url_of
from pia_ray.catalog.export.names import DEFAULT_NAME, check_name, export_name, folded
from pia_ray.catalog.export.record import ExportRecord
from pia_ray.config.knob_types import VideoFormat
from pia_ray.errors import BadParameter, ConfigError, OutputError, OutputUnavailable, StorageError, VideoError
from pia_ray.ledger import RESULTS_SCHEMA
from pia_ray.manifest.templates import fields_of
from pia_ray.media.marking import ProvenanceLevel, strip_provenance
from pia_ray.media.video import MIME
from pia_ray.result_row import APPROVED, SUCCEEDED
from pia_ray.temporary_folders import temporary_folder

COPIES_AT_ONCE: Final = 16

SHOWN: Final = 10
"""Rows that an error names."""

_BATCH_ROWS: Final = 512
_PICTURES: Final = {"poster": "poster_uri", "thumbnail": "thumbnail_uri"}
"""Columns of the pictures that are copied beside a video, by the end of their names."""

_TYPES: Final[Mapping[str, str]] = {
    "jpg": "image/jpeg",
    "jpeg": "image/jpeg",
    "png": "image/png",
    **{str(kind): mime for kind, mime in MIME.items()},
}
_ROW_COLUMNS: Final = (*FACTS, "status", "video_uri", "sha256", "size_bytes", "work_key")
_VERDICTS: Final = ("accepted", "review")
_TAKEN_FOLDERS: Final = ("videos", "thumbnails", "_ledger")

_log = logging.getLogger(__name__)

_Row = dict[str, Any]
_Files = dict[str, str | None]
"""FILES of a line of the feed."""

Observe = Callable[[int, int], None]
"""Called with the number of videos that are exported, and of all."""


@dataclass(frozen=True)
class ExportOptions:
    """The wishes of an export."""

    name: str = DEFAULT_NAME
    accepted: bool = False
    """Only videos that a person has approved, or that meet the bounds of their run and nobody has rejected."""
    provenance: ProvenanceLevel = "public"
    """The most that an exported video tells of its making."""
    feed: FeedFormat = "csv"
    base_url: str | None = None
    link: bool = False
    """A second name on the same disk, in place of a copy, for files that are exported as they are."""
    prune: bool = False
    """Also remove what earlier exports copied and this one does not."""


@dataclass
class Exported:
    """The end of an export."""

    target: str
    feeds: list[str] = field(default_factory=list)
    num_videos: int = 0
    """Videos that are in the target now."""
    num_copied: int = 0
    """Files that were copied or linked now, posters and thumbnails included."""
    num_unchanged: int = 0
    """Files that an earlier export had copied."""
    bytes_copied: int = 0
    num_left_out: int = 0
    """Rows that failed, or were not accepted where only those are wanted."""
    num_pruned: int = 0
    num_others: int = 0
    """Files of earlier exports that this one does not have, and that are there still."""
    missing: list[dict[str, Any]] = field(default_factory=list)
    """Videos that are not in the output, or damaged there: `id`, `video_index`, `reason`."""


def export_output(
    output: str,
    target: str,
    *,
    options: ExportOptions,
    observe: Observe | None = None,
) -> Exported:
    """The end of an export of the videos of an output's results; names those that the output lacks.

    Raises:
        ConfigError: the options do not fit the output, or two rows have one name; nothing was copied.
        OutputError: there are no results, or a store refuses; the same call goes on where this one stopped.
    """
    return _Export(output, target.rstrip("/") or target, options).run(observe)


class _Export:
    """One export at work."""

    def __init__(self, output: str, target: str, options: ExportOptions) -> None:
        self._output = output
        self._target = target
        self._options = options
        self._base = url_base(options.base_url, target)
        self._exported = Exported(target)
        self._paths: set[str] = set()
        self._lock = threading.Lock()
        _check_target(output, target, options)

    def run(self, observe: Observe | None) -> Exported:
        """Checks every name, then copies."""
        try:
            with ledger.open_results(self._output) as file:
                names = file.schema_arrow.names
                self._id_column = self._column_of_ids(names)
                ids = [self._id_column] if self._id_column else []
                self._own = [*(name for name in names if name not in RESULTS_SCHEMA.names), *ids]
                self._check_template([*names, *ids])
                self._copy_all(file, self._check_names(file), observe)
        except StorageError as error:
            kind = OutputUnavailable if error.retryable else OutputError
            raise kind(f"the export stopped: {error.message} The same command goes on from there.") from None
        return self._exported

    def _column_of_ids(self, names: list[str]) -> str | None:
        """The manifest's column that the run took ids from; it is not among those that pass through."""
        run = ledger.latest_run(self._output)
        column = run.config.get("id_col") if run is not None else None
        return column if isinstance(column, str) and not fields_of(column) and column not in names else None

    def _check_template(self, names: list[str]) -> None:
        where = f"results.parquet of {self._output}"
        try:
            check_name(self._options.name, names=names, where=where)
        except ConfigError as error:
            if self._own:
                raise
            raise ConfigError(
                f"{error.message}. These results hold no columns of the catalogue's own: `pia-ray animate` with its "
                "manifest writes them anew, and animates only what is not done"
            ) from None

    def _rows(self, file: pq.ParquetFile, columns: set[str]) -> Iterator[_Row]:
        """The rows to export with these columns and those that say whether a row is wanted."""
        wanted = {"id", "status", *_VERDICTS, *columns}
        columns_there = [name for name in file.schema_arrow.names if name in wanted]
        for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=columns_there):
            for row in batch.to_pylist():
                if not self._is_wanted(row):
                    continue
                if self._id_column:
                    row[self._id_column] = row["id"]
                yield row

    def _is_wanted(self, row: _Row) -> bool:
        if row["status"] != SUCCEEDED or not self._options.accepted:
            return bool(row["status"] == SUCCEEDED)
        review = row.get("review")  # what a person says counts before the bounds
        return review == APPROVED or (review is None and bool(row.get("accepted")))

    def _check_names(self, file: pq.ParquetFile) -> int:
        """The number of videos, after every name is known to be one video's alone.

        Raises:
            ConfigError: rows share a name, or lack a cell that it needs.
        """
        taken: dict[str, str] = {}
        shared, empty = [], []
        for row in self._rows(file, {"video_index", *fields_of(self._options.name)}):
            this = f'"{row["id"]}" ({row["video_index"]})'
            try:
                path = export_name(self._options.name, row)
            except BadParameter:
                empty.append(this)
                continue
            key = path if storage.is_s3(self._target) else folded(path)
            other = taken.setdefault(key, this)
            if other is not this:
                shared.append(f'{other} and {this} as "{path}"')
        shared += [
            f'{this} and the {ending} of {base} as "{key}"'
            for key, this in taken.items()
            for ending in _PICTURES
            if key.endswith(f"-{ending}") and (base := taken.get(key.removesuffix(f"-{ending}")))
        ]
        if empty:
            raise ConfigError(
                f'--name "{self._options.name}": a cell that it needs is empty in {_listed(empty)}. Put a part that '
                "may be left out in [...]"
            )
        if shared:
            raise ConfigError(
                f'--name "{self._options.name}" gives several videos one name: {_listed(shared)}. Name a column that '
                "tells them apart, such as {id} and {video_index}. Nothing was copied"
            )
        if not taken and self._options.accepted and not self._is_judged(file):
            raise ConfigError(
                "--accepted: no video of these results was held against bounds or reviewed. Animate with --accept or "
                "--review, or leave out the flag"
            )
        self._exported.num_left_out = file.metadata.num_rows - len(taken)
        return len(taken)

    def _is_judged(self, file: pq.ParquetFile) -> bool:
        """Whether any row was held against bounds, or seen by a person."""
        columns = [name for name in _VERDICTS if name in file.schema_arrow.names]
        batches = file.iter_batches(columns=columns) if columns else ()
        return any(column.null_count < len(column) for batch in batches for column in batch.columns)

    def _copy_all(self, file: pq.ParquetFile, total: int, observe: Observe | None) -> None:
        self._there = {found.uri: found.size_bytes for found in storage.list_objects(self._target)}
        self._record = ExportRecord.read(self._target)
        self._record.write()  # a target that cannot be written is found before the first video
        columns = {*_ROW_COLUMNS, *_PICTURES.values(), *self._own, *fields_of(self._options.name)}
        with temporary_folder() as folder:
            feed = Feed(folder, own=self._own, form=self._options.feed)
            try:
                with ThreadPoolExecutor(COPIES_AT_ONCE, thread_name_prefix="export") as pool, feed:
                    for number, (row, files) in enumerate(_mapped(pool, self._copy_row, self._rows(file, columns)), 1):
                        if isinstance(files, str):
                            facts = {"id": row["id"], "video_index": row["video_index"], "reason": files}
                            self._exported.missing.append(facts)
                        else:
                            feed.add(row, files)
                            self._exported.num_videos += 1
                        if observe is not None:
                            observe(number, total)
            finally:
                self._record.write()
            for path, size_bytes in feed.upload(self._target).items():
                self._exported.feeds.append(storage.join(self._target, path))
                self._paths.add(path)
                self._record.note(path, source="feed", size_bytes=size_bytes)
        self._prune()

    def _copy_row(self, row: _Row) -> tuple[_Row, _Files | str]:
        """The row, and the FILES of its line in the feed, or the reason why the output does not have its video."""
        stem = export_name(self._options.name, row)
        source = storage.join(self._output, ledger.path_in_output(row["video_uri"] or ""))
        path = f"{stem}.{_extension(source)}"
        try:
            self._copy(source, path, row, is_video=True)
        except VideoError as error:
            return row, error.message
        files: _Files = {"video_file": path, "video_url": url_of(path, self._base)}
        for ending, column in _PICTURES.items():
            if not row.get(column):
                continue
            source = storage.join(self._output, ledger.path_in_output(row[column]))
            path = f"{stem}-{ending}.{_extension(source)}"
            try:
                self._copy(source, path, row, is_video=False)
            except VideoError as error:
                _log.warning("%s: the feed has no %s of %s", error.message, ending, row["id"])
            else:
                files[f"{ending}_url"] = url_of(path, self._base)
        return row, files

    def _copy(self, source: str, path: str, row: Mapping[str, Any], *, is_video: bool) -> None:
        """Copies one file, unless it is there.

        Raises:
            VideoError: the output does not have it, or has another.
        """
        target = storage.join(self._target, path)
        mark = f"{row['sha256'] or row['work_key']}"
        if is_video:
            mark += f" {self._options.provenance}"
        with self._lock:
            self._paths.add(path)
        size_bytes = self._record.size_of(path, source=mark)
        if size_bytes is not None and self._there.get(target) == size_bytes:
            with self._lock:
                self._exported.num_unchanged += 1
            return
        found = storage.head(source)
        if found is None or (is_video and row["size_bytes"] not in (None, found.size_bytes)):
            raise VideoError(f"{source} is {'not there' if found is None else 'damaged'}")
        size_bytes = found.size_bytes
        kind = _TYPES.get(_extension(source), "application/octet-stream")
        if is_video and (content := self._reduced(source, row)) is not None:
            storage.write_bytes(target, content, content_type=kind)
            size_bytes = len(content)
        elif not (self._options.link and storage.link(source, target)):
            storage.copy(source, target, content_type=kind)
        self._record.note(path, source=mark, size_bytes=size_bytes)
        with self._lock:
            self._exported.num_copied += 1
            self._exported.bytes_copied += size_bytes

    def _reduced(self, source: str, row: Mapping[str, Any]) -> bytes | None:
        """The video without what its provenance tells beyond the level; None where it tells no more.

        Raises:
            VideoError: it is damaged, or is not the row's.
        """
        level, ending = self._options.provenance, _extension(source)
        if level == "full":
            return None
        content = storage.read_bytes(source)
        if row["sha256"] not in (None, hashlib.sha256(content).hexdigest()):
            raise VideoError(f"{source} is damaged")
        reduced = strip_provenance(content, cast(VideoFormat, ending), level)
        return None if reduced is content else reduced

    def _prune(self) -> None:
        """Removes, or counts, the files of earlier exports that this one does not have."""
        for path in list(self._record.others(self._paths)):
            uri = storage.join(self._target, path)
            if not self._options.prune:
                self._exported.num_others += uri in self._there
                continue
            storage.delete(uri)
            self._record.forget(path)
            self._exported.num_pruned += 1
        self._record.write()


def _mapped(
    pool: ThreadPoolExecutor, call: Callable[[_Row], tuple[_Row, _Files | str]], rows: Iterator[_Row]
) -> Iterator[tuple[_Row, _Files | str]]:
    """The results of the call in the rows' order, with a bounded number of rows in memory."""
    waiting: deque[Future[tuple[_Row, _Files | str]]] = deque()
    for row in rows:
        waiting.append(pool.submit(call, row))
        if len(waiting) >= 4 * COPIES_AT_ONCE:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _check_target(output: str, target: str, options: ExportOptions) -> None:
    """Refuses a target that is the output or one of its folders, or that nothing can be written to.

    Raises:
        ConfigError: says why.
    """
    try:
        ours, theirs = (
            uri if storage.is_s3(uri) else str(storage.local_path(uri).resolve()) for uri in (output, target)
        )
    except StorageError as error:
        raise ConfigError(f"--to {target}: {error.message}") from None
    ours, theirs = ours.rstrip("/"), theirs.rstrip("/")
    if theirs == ours or any(f"{theirs}/".startswith(f"{ours}/{folder}/") for folder in _TAKEN_FOLDERS):
        raise ConfigError(f"--to {target} is the output itself, or a folder that runs write to: choose another")
    if options.link and (storage.is_s3(output) or storage.is_s3(target)):
        raise ConfigError("--link is for an output and a target on one disk: leave it out, objects of S3 are copied")


def _extension(uri: str) -> str:
    return uri.rpartition(".")[2].lower()


def _listed(texts: list[str]) -> str:
    more = f" and {len(texts) - SHOWN} more" if len(texts) > SHOWN else ""
    return "; ".join(texts[:SHOWN]) + more
