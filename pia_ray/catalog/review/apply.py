"""`decide`, the rows of an output that a review changes, as they are to be recorded.

An approved video is frozen: no later run makes another take of its row. The row of a rejected one is taken again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pia_ray import ledger
from pia_ray.catalog.review.verdict_file import Verdict
from pia_ray.errors import ConfigError
from pia_ray.result_row import APPROVED, SUCCEEDED, ResultRow
from pia_ray.takes import merged, take_of, takes_of, takes_to_json, with_review

SHOWN: Final = 10
"""Verdicts without effect that a message names; it counts the others."""


@dataclass(frozen=True)
class Decided:
    """The effect of a review on the rows of an output."""

    rows: tuple[ResultRow, ...]
    """The rows that it changes, as they are to be recorded."""
    num_known: int
    """Verdicts that the ledger has already."""
    unknown: tuple[Verdict, ...]
    """Those on ids or work keys that the output does not have."""
    stale: tuple[Verdict, ...]
    """Those on a take that is no longer there, or on a row without a video."""

    @property
    def text(self) -> str:
        """The counts in one line."""
        approved = sum(row.review == APPROVED for row in self.rows)
        parts = [f"{approved:,} approved", f"{len(self.rows) - approved:,} rejected"]
        parts += [f"{self.num_known:,} known before"] if self.num_known else []
        parts += [f"{len(self.unknown):,} of unknown videos"] if self.unknown else []
        parts += [f"{len(self.stale):,} of videos that are no longer there"] if self.stale else []
        return ", ".join(parts)

    @property
    def warnings(self) -> tuple[str, ...]:
        """The verdicts without effect, in words."""
        lines = []
        if self.unknown:
            lines.append(f"review: {_named(self.unknown)}: the output has no such row; check id and video_index")
        if self.stale:
            lines.append(f"review: {_named(self.stale)}: the video that was reviewed is no longer there; review anew")
        return tuple(lines)

    def pending(self, items: pa.Table, pending: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """The mask of the pending items of a table as it is once the rows are recorded."""
        approved = [row.work_key for row in self.rows if row.review == APPROVED]
        rejected = [row.work_key for row in self.rows if row.review != APPROVED]
        stay, again = (
            pc.is_in(items["work_key"], pa.array(keys, pa.string())).to_numpy() for keys in (approved, rejected)
        )
        changed: np.ndarray[Any, Any] = (pending & ~stay) | again
        return changed


NOTHING_DECIDED: Final = Decided((), 0, (), ())


def decide(verdicts: Sequence[Verdict], output: ledger.Ledger) -> Decided:
    """The effect of a review on the rows of a ledger, which stays as it is.

    Raises:
        ConfigError: two verdicts are about one video, or an id has several rows.
    """
    keys = _keys(verdicts, output)
    rows = ledger.rows_of(output, {key for key in keys if key is not None})
    changed, unknown, stale, num_known = [], [], [], 0
    for verdict, key in zip(verdicts, keys, strict=True):
        row = rows.get(key or "")
        if row is None:
            unknown.append(verdict)
        elif _is_known(verdict, row):
            num_known += 1
        elif row.status != SUCCEEDED or verdict.take not in (None, row.take or 0):
            stale.append(verdict)
        else:
            changed.append(_reviewed(row, verdict))
    return Decided(tuple(changed), num_known, tuple(unknown), tuple(stale))


def _keys(verdicts: Sequence[Verdict], output: ledger.Ledger) -> list[str | None]:
    """The work key of the row that each verdict is about, or None.

    Raises:
        ConfigError: as `decide`.
    """
    by_id = ledger.keys_of(output, {verdict.id for verdict in verdicts if verdict.work_key is None})
    earlier: dict[str, list[Verdict]] = {}
    keys: list[str | None] = []
    for verdict in verdicts:
        found = [verdict.work_key] if verdict.work_key else by_id.get((verdict.id, verdict.video_index), [])
        if len(found) > 1:
            raise ConfigError(
                f"review: line {verdict.line}, id: {len(found)} rows have the id {verdict.video}; state the work_key"
            )
        keys.append(key := found[0] if found else None)
        if key is None:
            continue
        for other in earlier.setdefault(key, []):
            if None in (verdict.take, other.take) or verdict.take == other.take:
                raise ConfigError(
                    f"review: line {verdict.line}, verdict: {verdict.video} has a verdict in line {other.line} "
                    "already; keep one of the two lines"
                )
        earlier[key].append(verdict)
    return keys


def _is_known(verdict: Verdict, row: ResultRow) -> bool:
    """Whether the ledger has the verdict: as the row's last one, or on an earlier take.

    Without a take, one with the same note counts as the same, so that a file has its effect once.
    """
    last = row.review == verdict.verdict and (row.review_note or "") == verdict.note
    if verdict.take is None:
        return last
    if verdict.take == row.review_take == (row.take or 0):
        return last
    return any(take.number == verdict.take and take.review == verdict.verdict for take in takes_of(row))


def _reviewed(row: ResultRow, verdict: Verdict) -> ResultRow:
    """The row with the verdict on its video."""
    number = row.take or 0
    takes = with_review(merged(takes_of(row), [take_of(row, number)]), verdict.verdict, number=number)
    return replace(
        row,
        take=number,
        takes=takes_to_json(takes),
        review=verdict.verdict,
        review_note=verdict.note or None,
        review_take=number,
    )


def _named(verdicts: Sequence[Verdict]) -> str:
    shown = ", ".join(f"{verdict.video} (line {verdict.line})" for verdict in verdicts[:SHOWN])
    more = len(verdicts) - SHOWN
    return shown + (f" and {more:,} more" if more > 0 else "")
