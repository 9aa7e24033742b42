"""The lines that `report` and the ledger commands print for people. `--json` prints the facts themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC
from typing import TYPE_CHECKING, Any, Final

from pia_ray.formatting import count_of, duration, size, videos_rate

if TYPE_CHECKING:
    from pia_ray.ledger import LedgerSummary, LiveRun, Rebuilt, ReviewCounts, TakeCounts, Verified

SHOWN_ROWS: Final = 40
"""Rows in flight that a report names."""

SHOWN_FILES: Final = 100
"""Files of a kind that the findings of a check name."""

_STAGES: Final = {"fetch_s": "fetch", "animate_s": "animate", "publish_s": "publish", "gpu_s": "engine"}


def summary_lines(found: LedgerSummary) -> list[str]:
    """The report of an output: counts, failures, and the times of the latest run."""
    run = "none" if found.run is None else found.run.run_id
    if found.last_finished_at is not None:
        run += f", last row at {found.last_finished_at.astimezone(UTC):%Y-%m-%d %H:%M} UTC"
    counts = f"{found.num_succeeded:,} of {count_of(found.num_items, 'work item')} succeeded"
    lines = [
        f"run       {run}",
        f"rows      {counts}, {_none(found.num_failed)} failed, {_none(found.num_left)} left"
        if found.num_items
        else "rows      none",
        *_counts("failures", found.errors),
    ]
    if found.num_retryable:
        lines.append(f"          {found.num_retryable:,} of them may succeed at another try")
    lines += _counts("flags", found.flags)
    if found.num_in_run and found.run_s is not None:
        rate = "" if found.videos_per_minute is None else f", {videos_rate(found.videos_per_minute / 60)}"
        lines.append(
            f"speed     {count_of(found.num_in_run, 'video')} of the latest run in {duration(found.run_s)}{rate}"
        )
    if found.num_succeeded:
        busy = "" if found.busy_share is None else f", busy {found.busy_share:.0%} of the latest run"
        lines.append(f"engine    {duration(found.gpu_s)} for all videos{busy}")
        lines.append(f"size      {size(found.size_bytes)} of videos")
    if found.takes is not None:
        lines.append(takes_line(found.takes))
    if found.review is not None:
        lines.append(_review_line(found.review))
    return lines + _percentiles(found.percentiles_s)


def _none(number: int) -> str:
    return f"{number:,}" if number else "none"


def takes_line(takes: TakeCounts) -> str:
    """The line of the rows that have bounds, or of those that were taken again for a review alone."""
    cost = f", which took {duration(takes.retake_gpu_s)} of the engine" if takes.num_retaken else ""
    if not takes.num_accepted + takes.num_given_up:
        return f"retaken   {takes.num_retaken:,}{cost}"
    return f"bounds    {takes.num_accepted:,} accepted, {takes.num_given_up:,} not; {takes.num_retaken:,} retaken{cost}"


def _review_line(review: ReviewCounts) -> str:
    parts = (
        f"{review.num_approved:,} approved",
        f"{review.num_rejected:,} rejected",
        f"{review.num_retaken:,} taken again",
        f"{review.num_open:,} not reviewed",
    )
    return f"review    {', '.join(parts)}"


def _counts(label: str, counts: Mapping[str, int]) -> list[str]:
    if not counts:
        return [f"{label:<10}none"]
    shown = [f"{count:,} x {name}" for name, count in counts.items()]
    return [f"{label:<10}{shown[0]}", *(f"{'':<10}{each}" for each in shown[1:])]


def _percentiles(seconds: Mapping[str, Mapping[int, float]]) -> list[str]:
    """The times of a row as a table: one line a stage, one column a percentile."""
    if not seconds:
        return []
    percents = sorted(next(iter(seconds.values())))
    lines = ["times     " + "".join(f"{'median' if q == 50 else f'{q}% within':>13}" for q in percents)]
    for column, values in seconds.items():
        lines.append(f"  {_STAGES.get(column, column):<8}" + "".join(f"{duration(values[q]):>13}" for q in percents))
    return lines


def live_lines(live: LiveRun | None, *, store: Mapping[str, Any]) -> list[str]:
    """The state of the store, and of the run that is at work with its workers and their oldest rows."""
    if store["state"] == "away":
        lines = [f"store     is away: {store['reason']}"]
    else:
        lines = [f"store     answered in {duration(store['seconds'])}"]
    if live is None:
        return lines if store["state"] == "away" else [*lines, "no run is at work"]
    renewed = "" if live.renewed_s is None else f" by {live.driver}, which was seen {duration(live.renewed_s)} ago"
    ended = ": it has ended, or does not reach the store" if live.expired else ""
    counts = f"{count_of(len(live.workers), 'worker')}, {count_of(live.num_in_flight, 'row')} in flight"
    lines.append(f"run {live.run_id}{renewed}{ended}: {counts}")
    shown = 0
    for worker in live.workers:
        busy = "" if worker.busy_share is None else f", engine busy {worker.busy_share:.0%}"
        seen = f"{count_of(len(worker.rows), 'row')}{busy}, seen {duration(worker.seen_s)} ago"
        lines.append(f"  worker {worker.worker}: {seen}")
        if worker.outage:
            lines.append(f"    waits with {count_of(worker.num_waiting, 'finished animation')}: {worker.outage}")
        for row in worker.rows[: max(0, SHOWN_ROWS - shown)]:
            lines.append(f"    {row.id}: {row.stage} for {duration(row.stage_s)}, begun {duration(row.age_s)} ago")
        shown += len(worker.rows)
    if shown > SHOWN_ROWS:
        lines.append(f"  and {count_of(shown - SHOWN_ROWS, 'more row')}: --json names all")
    return lines


def verified_lines(found: Verified, *, deep: bool) -> list[str]:
    """The findings of `ledger verify`: one sentence where all is well, else what differs, with its files."""
    num_wrong = found.num_missing + found.num_wrong_size + found.num_damaged
    videos = count_of(found.num_succeeded, "video")
    if num_wrong:
        lines = [f"{num_wrong:,} of {videos} missing or damaged"]
    elif not found.num_succeeded:
        lines = ["no videos to check"]
    elif deep:
        lines = [f"{videos} read: none missing or damaged"]
    else:
        lines = [f"{videos} checked by size: none missing or damaged (--deep reads every byte)"]
    lines += _files(found.num_missing, "missing", found.missing)
    lines += _files(found.num_wrong_size, "of another size", found.wrong_size)
    lines += _files(found.num_damaged, "damaged", found.damaged)
    if found.damaged_parts:
        lines.append(f"{count_of(len(found.damaged_parts), 'part')} of the ledger damaged")
        lines += [f"    {uri}: {reason}" for uri, reason in found.damaged_parts.items()]
    if found.num_failed:
        lines.append(f"{count_of(found.num_failed, 'failed row')} without a video")
    if found.num_missing_thumbnails:
        lines.append(f"{count_of(found.num_missing_thumbnails, 'thumbnail')} missing")
    if found.num_orphans:
        lines.append(
            f"{count_of(found.num_orphans, 'video')} without a row: the next run, or `ledger rebuild`, adds it"
        )
        lines += [f"    {uri}" for uri in found.orphans[:SHOWN_FILES]]
    return lines


def _files(number: int, state: str, uris: Sequence[str]) -> list[str]:
    if not number:
        return []
    shown = [f"    {uri}" for uri in uris[:SHOWN_FILES]]
    more = [f"    and {number - len(shown):,} more"] if number > len(shown) else []
    return [f"  {number:,} {state}", *shown, *more]


def rebuilt_lines(found: Rebuilt) -> list[str]:
    """The counts of `ledger rebuild`."""
    lines = [
        f"{count_of(found.num_videos, 'video')} found, {count_of(found.num_restored, 'row')} restored from them; "
        f"the results have {count_of(found.num_results, 'row')}"
    ]
    if found.num_reduced:
        lines.append(
            f"{count_of(found.num_reduced, 'video')} without a row and with reduced provenance: "
            "the next run animates them again"
        )
    if found.num_foreign:
        lines.append(f"{count_of(found.num_foreign, 'file')} below videos/ damaged or not of pia-ray")
        lines += [f"    {uri}" for uri in found.foreign[:SHOWN_FILES]]
    return lines


def compacted_line(before: int, after: int) -> str:
    """The sentence of `ledger compact`."""
    earlier = "as before" if before == after else f"after {before:,} before"
    return f"the ledger has {count_of(after, 'part')}, {earlier}"
