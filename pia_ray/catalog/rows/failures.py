"""The errors with which rows fail, and the result rows of those without a video."""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from datetime import UTC, datetime

from pia_ray import ledger
from pia_ray.catalog.steps import worker_name
from pia_ray.errors import OutputError, RowError, Timeout, UnexpectedError, WorkerDied
from pia_ray.manifest import redacted
from pia_ray.result_row import ResultRow
from pia_ray.types import ManifestRow


def given_up(deaths: Sequence[ledger.AttemptRecord]) -> RowError:
    """The error of a row that has ended its worker each time."""
    tries = "1 try" if len(deaths) == 1 else f"{len(deaths)} tries"
    if any(record.state == "timeout" for record in deaths):
        return Timeout(
            f"the row hung, and its worker was ended, at the last of {tries}: check its picture and size, "
            "or raise row_timeout_s, then run again with --retry timeout"
        )
    return WorkerDied(
        f"the worker died at each of {tries} of this row: check its picture and size, "
        "then run again with --retry worker_died"
    )


def row_error(error: Exception) -> RowError:
    """The error that a row fails with after any exception."""
    if isinstance(error, TimeoutError):
        return Timeout(str(error) or "a step of the row did not end in time")
    if isinstance(error, RowError):
        return error
    text = "".join(traceback.format_exception(error)).strip()
    return UnexpectedError(f"{type(error).__name__}: {error}\n{text}")


def without_video(
    row: ManifestRow, error: RowError | OutputError, *, model: str, run_id: str, attempts: int
) -> ResultRow:
    """The result of a row that this process ends without a video."""
    return ResultRow.failed(
        error,
        id=row.id,
        video_index=row.video_index,
        picture_index=row.picture_index,
        work_key=row.work_key,
        image_uri=redacted(row.image),
        params=row.params,
        model=model,
        run_id=run_id,
        worker=worker_name(),
        attempts=attempts,
        finished_at=datetime.now(UTC),
    )
