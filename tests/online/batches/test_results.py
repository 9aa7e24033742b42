"""The results table of a batch says of every error what the error tree says of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from pia_ray.errors import (
    FetchUnavailable,
    OutOfMemory,
    PiaRayError,
    StorageUnavailable,
    Timeout,
    UnexpectedError,
    WorkerDied,
)
from pia_ray.online.batches.results import row_of_job, row_without_job
from pia_ray.online.public_errors import public_error
from pia_ray.online.video_jobs import JobStore
from tests.online.video_jobs.test_store import claim, create
from tests.test_shape import error_classes

TRIED_AGAIN = (FetchUnavailable, OutOfMemory, StorageUnavailable, Timeout, UnexpectedError, WorkerDied)


@pytest.mark.parametrize("kind", error_classes(), ids=lambda kind: kind.__name__)
def test_a_failed_line_may_be_tried_again_where_its_error_may(kind: type[PiaRayError], tmp_path: Path) -> None:
    jobs = JobStore(str(tmp_path))
    create(jobs)
    job = jobs.queue.fail(claim(jobs), kind("what happened"))
    stored = jobs.get("ann", job.id)
    row = row_of_job(stored, batch_id="batch_1", line=0, custom_id="a")
    assert (row["status"], row["error_code"]) == ("failed", kind.code)
    assert row["retryable"] == kind.retryable
    assert row["retryable"] or kind not in TRIED_AGAIN
    error = public_error(kind("what happened"))
    never = row_without_job(error, batch_id="batch_1", line=0, custom_id="a", body={}, now=86_400.0)
    assert never["retryable"] == kind.retryable
    assert str(never["finished_at"]).startswith("1970-01-02")
