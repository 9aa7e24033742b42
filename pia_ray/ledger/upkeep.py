"""Care of an output: `summary` for reports, `verify`, and `rebuild` from the videos alone."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pia_ray import storage
from pia_ray.errors import StorageDamaged, StorageNotFound, VideoError
from pia_ray.ledger import layout, runs
from pia_ray.ledger.busy_share import BusyShare
from pia_ray.ledger.ledger import Ledger, output_errors
from pia_ray.ledger.parts import read_winners
from pia_ray.ledger.results import row_from_provenance, tells_row
from pia_ray.ledger.results_writer import winners_of
from pia_ray.ledger.review_counts import ReviewCounts, count_reviews
from pia_ray.ledger.runs import RunRecord
from pia_ray.ledger.take_counts import TakeCounts, count_takes
from pia_ray.ledger.videos import SHOWN, Observe, check_videos, position_of, uris_of
from pia_ray.result_row import FAILED, SUCCEEDED, ResultRow

PERCENTILES: Final = (50, 90, 99)
TIMINGS: Final = ("fetch_s", "animate_s", "publish_s", "gpu_s")

_SUMMARY_COLUMNS: Final = (
    "status",
    "error_code",
    "retryable",
    "run_id",
    "finished_at",
    "recorded_at",
    "size_bytes",
    "flags",
    "worker",
    "accepted",
    "take",
    "takes",
    "review",
    "review_take",
    *TIMINGS,
)
_READERS: Final = 16

_log = logging.getLogger(__name__)
_Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class LedgerSummary:
    """Counts and times of the work items of the latest manifest, over all runs."""

    run: RunRecord | None
    """The latest run; None for a ledger without one."""
    num_items: int
    num_succeeded: int
    num_failed: int
    num_left: int
    num_retryable: int
    """Failed rows for which trying again can help."""
    errors: Mapping[str, int]
    """Failed rows by error code, the most frequent first."""
    flags: Mapping[str, int]
    """Succeeded rows by the flags of their videos, the most frequent first."""
    last_finished_at: datetime | None
    num_in_run: int
    """Succeeded rows that the latest run itself made."""
    run_s: float | None
    """Seconds from the start of the latest run to its last row; None if it made none."""
    videos_per_minute: float | None
    """Of the latest run."""
    gpu_s: float
    size_bytes: int
    percentiles_s: Mapping[str, Mapping[int, float]]
    """Seconds by timing column and percentile, over succeeded rows; timings that no row has are left out."""
    busy_share: float | None = None
    """Share of the time between a worker's first and last row that its engine computed: of the latest run."""
    takes: TakeCounts | None = None
    """Of all rows; None where none has bounds or has been taken again."""
    review: ReviewCounts | None = None
    """Of all rows; None where none has been reviewed."""


@dataclass(frozen=True)
class Verified:
    """The findings of `verify`. Lists hold at most 1000 names each."""

    num_succeeded: int
    num_failed: int
    num_missing: int = 0
    missing: list[str] = field(default_factory=list)
    """Videos of succeeded rows that are not there."""
    num_wrong_size: int = 0
    wrong_size: list[str] = field(default_factory=list)
    num_damaged: int = 0
    damaged: list[str] = field(default_factory=list)
    """Videos of the right size whose SHA-256 is not that of their row."""
    num_missing_thumbnails: int = 0
    num_orphans: int = 0
    orphans: list[str] = field(default_factory=list)
    """Videos without a row: a crash between commit and record. The next run, or `rebuild`, finds them."""
    damaged_parts: Mapping[str, str] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether every succeeded row has its video, as it was made, and no part is damaged."""
        return not (self.num_missing or self.num_wrong_size or self.num_damaged or self.damaged_parts)


@dataclass(frozen=True)
class Rebuilt:
    """The counts of `rebuild`."""

    num_videos: int
    num_restored: int
    num_reduced: int
    """Generated videos whose provenance is public or none, and without a row: they tell too little to restore it. Their
    rows come back with the next run, which animates them again."""
    num_foreign: int
    foreign: list[str]
    """Files below videos/ that are damaged or not of pia-ray; at most 1000."""
    num_results: int


def summary(ledger: Ledger) -> LedgerSummary:
    """Counts, throughput and percentiles for reports."""
    ledger.flush()
    with output_errors(ledger.output):
        run = runs.latest_run(ledger.output)
        num_items, rows = _summary_rows(ledger, run)
    if not len(rows):
        return LedgerSummary(run, num_items, 0, 0, num_items, 0, {}, {}, None, 0, None, None, 0.0, 0, {})
    succeeded = rows.filter(pc.equal(rows["status"], SUCCEEDED))
    failed = rows.filter(pc.equal(rows["status"], FAILED))
    codes = Counter({entry["values"]: entry["counts"] for entry in pc.value_counts(failed["error_code"]).to_pylist()})
    run_s = per_minute = None
    own = succeeded.filter(pc.equal(succeeded["run_id"], run.run_id if run is not None else ""))
    num_in_run = len(own)
    if run is not None and num_in_run:
        run_s = max((_last_time(own, since=run.started_at) - run.started_at).total_seconds(), 1e-6)
        per_minute = 60 * num_in_run / run_s
    return LedgerSummary(
        run=run,
        num_items=num_items,
        num_succeeded=len(succeeded),
        num_failed=len(failed),
        num_left=num_items - len(succeeded) - len(failed),
        num_retryable=pc.sum(failed["retryable"]).as_py() or 0,
        errors={code or "unknown": count for code, count in codes.most_common()},
        flags=_flags(succeeded),
        last_finished_at=_last_time(rows),
        num_in_run=num_in_run,
        run_s=run_s,
        videos_per_minute=per_minute,
        gpu_s=pc.sum(succeeded["gpu_s"]).as_py() or 0.0,
        size_bytes=pc.sum(succeeded["size_bytes"]).as_py() or 0,
        percentiles_s=_percentiles(succeeded),
        busy_share=_busy_share(own),
        takes=_takes(rows),
        review=count_reviews(succeeded),
    )


def _summary_rows(ledger: Ledger, run: RunRecord | None) -> tuple[int, pa.Table]:
    """Number of the items of the latest run, and the rows that they have."""
    positions, _ = winners_of(ledger.output, ledger.index, run.run_id if run is not None else None)
    pieces = [
        table
        for _, table, _ in read_winners(ledger.index, positions[positions >= 0], columns=_SUMMARY_COLUMNS)
        if isinstance(table, pa.Table)
    ]
    rows = pa.concat_tables(pieces) if pieces else pa.table({name: [] for name in _SUMMARY_COLUMNS})
    return len(positions), rows


def _takes(rows: pa.Table) -> TakeCounts | None:
    judged = rows.filter(pc.or_(pc.is_valid(rows["accepted"]), pc.is_valid(rows["takes"])))
    counts = count_takes(zip(judged["accepted"].to_pylist(), judged["takes"].to_pylist(), strict=True))
    return counts if counts != TakeCounts() else None


def verify(output: str, *, deep: bool = False, observe: Observe | None = None) -> Verified:
    """The differences between succeeded rows and the objects of the output, as `check_videos` finds them.

    `observe` is told of the number of videos that are checked, and of all.
    """
    with output_errors(output):
        ledger = Ledger.open(output)
        found = check_videos(output, ledger.index, deep=deep, observe=observe)
        findings: dict[str, Any] = {}
        for name in ("missing", "wrong_size", "damaged"):
            positions = found.chosen[getattr(found, name)]
            findings |= {f"num_{name}": len(positions), name: list(uris_of(ledger.index, positions[:SHOWN]))}
    return Verified(
        num_succeeded=len(found.chosen),
        num_failed=len(ledger.index.winners) - len(found.chosen),
        num_missing_thumbnails=found.num_missing_thumbnails,
        num_orphans=found.num_orphans,
        orphans=found.orphans,
        damaged_parts=dict(ledger.index.damaged),
        **findings,
    )


def rebuild(output: str) -> Rebuilt:
    """The counts of a rebuild: each video without a row gets one from what is inside it, and the results are written.

    A video whose provenance is reduced tells too little for that, and is counted. Pass-through columns come back where
    the latest run's work items are still there. Failed rows and attempts leave no video and are lost with the parts; a
    rerun makes them again.
    """
    num_videos = num_restored = num_reduced = num_foreign = 0
    foreign: list[str] = []
    with Ledger.open(output) as ledger, output_errors(output):
        ledger.quarantine_damaged()
        winners = ledger.index.winners
        high = winners.high[winners.succeeded]
        pictures = {found.uri for found in storage.list_objects(storage.join(output, "thumbnails"))}

        def restore(found: storage.ObjectStat) -> ResultRow | _Reduced | str | None:
            try:
                return _restore(output, found.uri, pictures)
            except (StorageDamaged, VideoError) as error:
                _log.warning("%s: %s", found.uri, error.message)
                return found.uri
            except StorageNotFound:
                return None

        with ThreadPoolExecutor(_READERS, thread_name_prefix="rebuild") as pool:
            for batch in _batches(storage.list_objects(storage.join(output, "videos"))):
                num_videos += len(batch)
                for row in pool.map(restore, [found for found in batch if position_of(found.uri, high) is None]):
                    if isinstance(row, ResultRow):
                        ledger.append([row])
                        num_restored += 1
                    elif isinstance(row, _Reduced):
                        num_reduced += 1
                    elif row is not None:
                        num_foreign += 1
                        foreign += [row] if len(foreign) < SHOWN else []
        num_results = ledger.write_results()
    return Rebuilt(num_videos, num_restored, num_reduced, num_foreign, foreign, num_results)


@dataclass(frozen=True)
class _Reduced:
    """A generated video that tells too little of its row."""


def _restore(output: str, uri: str, pictures: set[str]) -> ResultRow | _Reduced:
    from pia_ray.media.marking import is_marked
    from pia_ray.media.video import probe  # decoding is heavy to import, and only this needs it

    content = storage.read_bytes(uri)
    facts = probe(content)
    values = facts.provenance
    if not tells_row(values) and is_marked(content, facts.format):
        return _Reduced()
    row_id, work_key = str(values.get("id", "")), str(values.get("work_key", ""))
    made = (
        *layout.thumbnail_uris(output, row_id, work_key=work_key),
        *(layout.poster_uri(output, row_id, work_key=work_key, kind=kind) for kind in ("jpg", "webp")),
    )
    input_uri, video_uri, jpg_uri, webp_uri = (picture if picture in pictures else None for picture in made)
    row = row_from_provenance(
        values,
        video_uri=uri,
        thumbnail_uri=video_uri,
        input_thumbnail_uri=input_uri,
        poster_uri=jpg_uri or webp_uri,
        size_bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
    )
    if layout.key_prefix(uri) != int(row.work_key[: layout.KEY_DIGITS], 16):
        raise VideoError("the file's name is not that of the work item inside it")
    return row


def _batches(found: Iterator[storage.ObjectStat]) -> Iterator[list[storage.ObjectStat]]:
    batch: list[storage.ObjectStat] = []
    for each in found:
        batch.append(each)
        if len(batch) == 4 * _READERS:
            yield batch
            batch = []
    if batch:
        yield batch


def _last_time(rows: pa.Table, *, since: datetime | None = None) -> Any:
    """The time when the last of the rows was finished.

    It is the store's time of record where a worker's clock says a later time, or one before `since`.
    """
    finished, recorded = rows["finished_at"], pc.coalesce(rows["recorded_at"], rows["finished_at"])
    times = pc.if_else(pc.greater(finished, recorded), recorded, finished)
    if since is not None:
        times = pc.if_else(pc.less(times, pa.scalar(since, times.type)), recorded, times)
    return pc.max(times).as_py()


def _flags(rows: pa.Table) -> dict[str, int]:
    found = rows.filter(pc.is_valid(rows["flags"]))["flags"].to_pylist()
    return dict(Counter(flag for flags in found for flag in flags.split(",")).most_common())


def _busy_share(rows: pa.Table) -> float | None:
    """Engine time over the time between each worker's first and last of these rows; None where nothing is known."""
    share = BusyShare()
    for record in rows.select(["worker", "finished_at", "fetch_s", "animate_s", "gpu_s"]).to_pylist():
        share.add(**record)
    return share.value


def _percentiles(rows: pa.Table) -> dict[str, dict[int, float]]:
    found = {}
    for name in TIMINGS:
        values = pc.quantile(rows[name], q=[percent / 100 for percent in PERCENTILES]).to_pylist()
        if values and values[0] is not None:
            found[name] = dict(zip(PERCENTILES, values, strict=True))
    return found
