"""Counts of videos by a person's verdict, from the columns `review`, `take` and `review_take` of results."""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from pia_ray.result_row import APPROVED, REJECTED


@dataclass(frozen=True)
class ReviewCounts:
    """Videos by the verdict of a person."""

    num_approved: int
    num_rejected: int
    """Videos that were rejected and have not been taken again."""
    num_retaken: int
    """Videos that replace a rejected one and have no verdict yet."""
    num_open: int
    """Other videos without a verdict."""


def count_reviews(succeeded: pa.Table) -> ReviewCounts | None:
    """The counts of rows that succeeded; None where none has been reviewed."""
    if succeeded["review"].null_count == len(succeeded):
        return None
    approved = pc.sum(pc.equal(succeeded["review"], APPROVED)).as_py() or 0
    rejected = succeeded.filter(pc.equal(succeeded["review"], REJECTED))
    same = pc.sum(pc.equal(pc.fill_null(rejected["take"], 0), rejected["review_take"])).as_py() or 0
    return ReviewCounts(approved, same, len(rejected) - same, len(succeeded) - approved - len(rejected))
