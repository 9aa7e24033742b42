"""The lines of report and ledger for people, without a run."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

from pia_ray.cli.output_report import compacted_line, live_lines, rebuilt_lines, summary_lines, verified_lines
from pia_ray.ledger import LedgerSummary, LiveRun, Rebuilt, RowInFlight, TakeCounts, Verified, WorkerState

EMPTY = LedgerSummary(
    run=None,
    num_items=0,
    num_succeeded=0,
    num_failed=0,
    num_left=0,
    num_retryable=0,
    errors={},
    flags={},
    last_finished_at=None,
    num_in_run=0,
    run_s=None,
    videos_per_minute=None,
    gpu_s=0.0,
    size_bytes=0,
    percentiles_s={},
)


def test_a_ledger_without_rows_says_none() -> None:
    assert summary_lines(EMPTY) == ["run       none", "rows      none", "failures  none", "flags     none"]


def test_a_report_is_in_words_and_rounded_units() -> None:
    found = replace(
        EMPTY,
        num_items=3,
        num_succeeded=1,
        num_failed=2,
        num_retryable=2,
        errors={"timeout": 2},
        last_finished_at=datetime(2026, 3, 4, 5, 6, 7, tzinfo=UTC),
        num_in_run=1,
        run_s=3725.2,
        videos_per_minute=0.0161,
        gpu_s=4.225,
        size_bytes=25_902,
        percentiles_s={"fetch_s": {50: 0.0052, 90: 0.2, 99: 100.0}},
        busy_share=0.5,
        takes=TakeCounts(num_accepted=1, num_retaken=1, num_given_up=0, retake_gpu_s=2.0),
    )
    assert summary_lines(found) == [
        "run       none, last row at 2026-03-04 05:06 UTC",
        "rows      1 of 3 work items succeeded, 2 failed, none left",
        "failures  2 x timeout",
        "          2 of them may succeed at another try",
        "flags     none",
        "speed     1 video of the latest run in 1 h 02 min, 1.0 videos/h",
        "engine    4.2 s for all videos, busy 50% of the latest run",
        "size      25.9 kB of videos",
        "bounds    1 accepted, 0 not; 1 retaken, which took 2.0 s of the engine",
        "times            median   90% within   99% within",
        "  fetch            5 ms        0.2 s   1 min 40 s",
    ]


def test_one_worker_with_one_row_is_told_in_the_singular() -> None:
    worker = WorkerState("host:1", "run", "", (RowInFlight("car", "ab", "animate", 2.0, 3.0),), 0.5, "storage", 1)
    live = LiveRun("run", "driver", renewed_s=1.0, expired=False, workers=(worker,))
    lines = live_lines(live, store={"state": "answers", "seconds": 0.02})
    assert lines[0] == "store     answered in 20 ms"
    assert lines[1].endswith(": 1 worker, 1 row in flight")
    assert "  worker host:1: 1 row, engine busy 50%" in lines[2]
    assert lines[3] == "    waits with 1 finished animation: storage"


def test_verify_names_what_is_wrong_and_nothing_else() -> None:
    assert verified_lines(Verified(0, 0), deep=False) == ["no videos to check"]
    assert verified_lines(Verified(1, 0), deep=True) == ["1 video read: none missing or damaged"]
    found = Verified(3, 1, num_missing=1, missing=["videos/a.mp4"], num_orphans=1, orphans=["videos/b.mp4"])
    assert verified_lines(found, deep=False) == [
        "1 of 3 videos missing or damaged",
        "  1 missing",
        "    videos/a.mp4",
        "1 failed row without a video",
        "1 video without a row: the next run, or `ledger rebuild`, adds it",
        "    videos/b.mp4",
    ]


def test_rebuild_and_compact_count_in_words() -> None:
    assert rebuilt_lines(Rebuilt(1, 0, 0, 0, [], 1)) == [
        "1 video found, 0 rows restored from them; the results have 1 row"
    ]
    assert rebuilt_lines(Rebuilt(2, 1, 1, 0, [], 1))[1:] == [
        "1 video without a row and with reduced provenance: the next run animates them again"
    ]
    assert compacted_line(3, 1) == "the ledger has 1 part, after 3 before"
