"""The counts and the speed of a run, by the results that have come."""

from __future__ import annotations

from pia_ray.catalog.progress import Progress, counted
from pia_ray.ledger import BusyShare
from tests.ledger.test_ledger import row_of

VIDEO = row_of(1, run_id="r")
FAILURE = row_of(2, run_id="r", status="failed", error_code="image_not_found", video_uri=None, gpu_s=None)


def after(*results: tuple[float, str]) -> Progress:
    """The progress after results at those seconds; v is a video, f a row that failed."""
    progress, share = Progress("starting", num_items=99, num_pending=99), BusyShare()
    for seconds, kinds in results:
        rows = [VIDEO if kind == "v" else FAILURE for kind in kinds]
        progress = counted(progress, rows, run_id="r", since_start_s=seconds, share=share)
    return progress


def test_rows_that_fail_are_neither_the_first_video_nor_a_part_of_the_speed_of_videos() -> None:
    progress = after((2, "ff"), (10, "v"), (12, "f"), (20, "vv"), (30, "vf"))
    assert (progress.num_succeeded, progress.num_failed) == (4, 4)
    assert (progress.first_row_s, progress.first_video_s) == (2, 10)
    assert progress.videos_per_s == 3 / 20
    assert progress.rows_per_s == 7 / 28


def test_a_run_without_a_video_has_no_first_one_and_no_speed_of_videos() -> None:
    progress = after((2, "f"), (3, "f"))
    assert (progress.first_video_s, progress.since_first_video_s, progress.videos_per_s) == (0, 0, 0)
    assert progress.rows_per_s == 1
    assert after((2, "v"), (4, "f")).videos_per_s == 0, "one video has no speed"
