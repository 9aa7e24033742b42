"""Reviews: approved videos are frozen, and rejected ones are taken again until one is approved."""

from __future__ import annotations

import csv
import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from pia_ray import ledger
from pia_ray.catalog.local import run_local
from pia_ray.catalog.review.verdict_file import Verdict, parse_review
from pia_ray.catalog.workload import plan_workload
from pia_ray.cli.main import main
from pia_ray.config.acceptance import parse_bounds
from pia_ray.config.catalog import CatalogConfig
from pia_ray.errors import ConfigError, DeviceLost
from pia_ray.media.video import probe
from pia_ray.takes import Policy, Take, next_take, take_seed, takes_from_json
from tests.catalog.test_local import CountingAnimator, by_id, configure, rows_of, write

HEADER = "id,video_index,verdict,note\n"


def catalog(folder: Path, *, num_rows: int = 3, **settings: Any) -> CatalogConfig:
    rows = [
        {"id": f"r{n}", "image": f"r{n}.png", "prompt": "uneven", "seed": 42 + 7 * n, "num_frames": 4}
        for n in range(num_rows)
    ]
    manifest = folder / "manifest.parquet"
    if not manifest.exists():
        write(folder, rows)
    return configure(manifest, folder / "out", **settings)


def go(config: CatalogConfig, **settings: Any) -> dict[str, int]:
    """Runs it with these settings; how often each row was animated."""
    with CountingAnimator() as animator:
        run_local(config.model_copy(update=settings), animator=animator)
    return dict(animator.asked)


def review(folder: Path, *lines: str, header: str = HEADER) -> str:
    path = folder / "review.csv"
    path.write_text(header + "\n".join(lines) + "\n", "utf-8")
    return str(path)


def seen(config: CatalogConfig, verdicts: dict[str, str], *, note: str = "") -> str:
    """A review of the takes that are there now, as the gallery writes it."""
    rows = by_id(config)
    path = Path(config.output).with_name("seen.csv")
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "video_index", "verdict", "note", "work_key", "take"])
        for row_id, verdict in verdicts.items():
            row = rows[row_id]
            writer.writerow([row_id, 0, verdict, note, row["work_key"], row["take"] or 0])
    return str(path)


def videos(config: CatalogConfig) -> dict[str, str]:
    return {row["id"]: hashlib.sha256(Path(row["video_uri"]).read_bytes()).hexdigest() for row in rows_of(config)}


def test_a_rejected_video_is_taken_again_with_another_seed_and_its_note_stays_with_the_row(tmp_path: Path) -> None:
    config = catalog(tmp_path)
    go(config)
    before = videos(config)
    asked = go(config, review=review(tmp_path, 'r1,0,rejected,"melts, and flickers"', "r0,0,approved,"))
    assert asked == {"r1": 1}
    rows, after = by_id(config), videos(config)
    assert (rows["r1"]["take"], rows["r1"]["review"], rows["r1"]["review_take"]) == (1, "rejected", 0)
    assert rows["r1"]["review_note"] == "melts, and flickers"
    assert rows["r1"]["seed"] == take_seed(49, 1)
    assert after["r1"] != before["r1"]
    assert {after[row] == before[row] for row in ("r0", "r2")} == {True}
    assert (rows["r0"]["review"], rows["r0"]["review_take"]) == ("approved", 0)
    assert rows["r2"]["review"] is None
    assert ledger.verify(config.output, deep=True).ok


def test_the_video_of_a_retaken_row_holds_no_note(tmp_path: Path) -> None:
    config = catalog(tmp_path, num_rows=1)
    go(config)
    go(config, review=review(tmp_path, "r0,0,rejected,the client hates it"))
    content = Path(rows_of(config)[0]["video_uri"]).read_bytes()
    assert b"hates" not in content
    assert "review_note" not in probe(content).provenance


def test_an_approved_video_stays_whatever_a_later_run_accepts_or_retries(tmp_path: Path) -> None:
    config = catalog(tmp_path)
    go(config)
    go(config, review=review(tmp_path, "r0,0,approved,"))
    before = videos(config)
    strict = config.model_copy(update={"accept": ("flicker<=0.0001",), "retakes": 2})
    assert go(strict, retry=("failed",)) == {"r1": 2, "r2": 2}
    assert go(strict, retakes=4, unaccepted="fail") == {"r1": 2, "r2": 2}
    assert videos(config)["r0"] == before["r0"]
    assert by_id(config)["r0"]["review"] == "approved"


def test_a_row_with_another_prompt_is_another_video_without_a_verdict(tmp_path: Path) -> None:
    config = catalog(tmp_path, num_rows=1)
    go(config)
    go(config, review=review(tmp_path, "r0,0,approved,"))
    write(tmp_path, [{"id": "r0", "image": "r0.png", "prompt": "another", "seed": 42, "num_frames": 4}])
    assert go(config) == {"r0": 1}
    assert rows_of(config)[0]["review"] is None


@pytest.mark.parametrize("columns", ["as the gallery writes them", "by hand"])
def test_a_review_that_a_config_file_names_in_every_run_has_its_effect_once(tmp_path: Path, columns: str) -> None:
    config = catalog(tmp_path)
    go(config)
    by_hand = columns == "by hand"
    path = review(tmp_path, "r1,0,rejected,") if by_hand else seen(config, {"r1": "rejected"})
    assert go(config, review=path) == {"r1": 1}
    assert go(config, review=path) == {}
    assert by_id(config)["r1"]["take"] == 1


def test_rejecting_again_takes_again_and_approving_at_last_freezes_that_take(tmp_path: Path) -> None:
    config = catalog(tmp_path)
    go(config)
    for take in (1, 2, 3):
        assert go(config, review=seen(config, {"r1": "rejected"}, note=f"number {take}")) == {"r1": 1}
        row = by_id(config)["r1"]
        assert (row["take"], row["review_take"], row["review_note"]) == (take, take - 1, f"number {take}")
    assert go(config, review=seen(config, {"r1": "approved"})) == {}
    row = by_id(config)["r1"]
    assert (row["take"], row["review"], row["review_take"], row["review_note"]) == (3, "approved", 3, None)
    assert [take.review for take in takes_from_json(row["takes"])] == ["rejected"] * 3 + ["approved"]
    assert go(config, accept=("flicker<=0.0001",), retakes=1).get("r1") is None


def test_a_changed_mind_counts_until_the_row_has_been_taken_again(tmp_path: Path) -> None:
    config = catalog(tmp_path, num_rows=1)
    go(config)
    first = seen(config, {"r0": "approved"})
    go(config, review=first)
    assert go(config, review=seen(config, {"r0": "rejected"})) == {"r0": 1}
    assert go(config, review=review(tmp_path, "r0,0,approved,,,0", header=HEADER[:-1] + ",work_key,take\n")) == {}
    row = rows_of(config)[0]
    assert (row["take"], row["review"], row["review_take"]) == (1, "rejected", 0), (
        "take 0 is gone: the verdict is stale"
    )


def test_a_rejected_row_with_bounds_gets_as_many_takes_as_at_first(tmp_path: Path) -> None:
    config = catalog(tmp_path, num_rows=1, accept=["flicker<=0.0001"], retakes=2)
    assert go(config) == {"r0": 3}
    first = rows_of(config)[0]
    assert go(config, review=seen(config, {"r0": "rejected"})) == {"r0": 3}
    row = rows_of(config)[0]
    assert row["take"] > 2, "a take from before the rejection is not published again"
    assert (row["accepted"], row["review_take"]) == (False, first["take"])
    assert len(json.loads(row["takes"])) == 6


def test_a_crash_after_a_rejection_costs_neither_the_verdict_nor_the_video(tmp_path: Path) -> None:
    config = catalog(tmp_path, num_rows=1)
    go(config)
    path = seen(config, {"r0": "rejected"}, note="blurs")

    class Lost(CountingAnimator):
        def submit(self, request: Any, **how: Any) -> Any:
            raise DeviceLost("gone")

    with Lost() as animator, pytest.raises(DeviceLost):
        run_local(config.model_copy(update={"review": path}), animator=animator)
    row = rows_of(config)[0]
    assert (row["review"], row["review_note"], row["take"]) == ("rejected", "blurs", 0)
    assert Path(row["video_uri"]).exists()
    assert go(config, max_attempts=5) == {"r0": 1}, "without the file"
    row = rows_of(config)[0]
    assert (row["take"], row["review_note"]) == (1, "blurs")


def test_a_lost_video_that_was_reviewed_is_made_again_as_the_take_that_it_was(tmp_path: Path) -> None:
    config = catalog(tmp_path, num_rows=1)
    go(config)
    go(config, review=seen(config, {"r0": "rejected"}))
    go(config, review=seen(config, {"r0": "approved"}))
    row = rows_of(config)[0]
    Path(row["video_uri"]).unlink()
    assert go(config, remake=("missing",)) == {"r0": 1}
    again = rows_of(config)[0]
    assert (again["take"], again["seed"], again["review"]) == (1, row["seed"], "approved")


def test_verdicts_on_unknown_ids_are_named_and_the_rest_counts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = catalog(tmp_path)
    go(config)
    lines = [f"gone{n},0,rejected," for n in range(12)]
    with caplog.at_level(logging.WARNING):
        assert go(config, review=review(tmp_path, *lines, "r1,0,rejected,", "r2,1,approved,")) == {"r1": 1}
    (text,) = (record.getMessage() for record in caplog.records if "review" in record.getMessage())
    assert "gone0 (line 2), gone1 (line 3)" in text
    assert "gone9 (line 11) and 3 more" in text
    assert "gone10" not in text


def test_the_report_counts_videos_by_verdict(tmp_path: Path) -> None:
    config = catalog(tmp_path)
    go(config)
    assert ledger.summary(ledger.Ledger.open(config.output)).review is None
    go(config, review=review(tmp_path, "r0,0,approved,", "r1,0,rejected,"))
    found = ledger.summary(ledger.Ledger.open(config.output))
    assert found.review == ledger.ReviewCounts(num_approved=1, num_rejected=0, num_retaken=1, num_open=1)
    assert found.takes is not None
    assert (found.takes.num_retaken, found.takes.retake_gpu_s > 0) == (1, True)


def test_an_estimate_and_judge_know_the_review(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = catalog(tmp_path)
    go(config)
    path = review(tmp_path, "r0,0,approved,", "r1,0,rejected,")
    workload = plan_workload(config.model_copy(update={"review": path}), resume=True)
    assert (workload.num_items, workload.num_pending) == (3, 1)
    strict = config.model_copy(update={"review": path, "accept": ("flicker<=0.0001",), "retakes": 1})
    assert plan_workload(strict, resume=True).num_pending == 2
    assert by_id(config)["r0"]["review"] is None, "an estimate records nothing"
    go(config, review=path)
    assert main(["judge", config.output, "--accept", "flicker<=0.0001", "--json"]) == 0
    judged = json.loads(capsys.readouterr().out)
    assert (judged["num_accepted"], judged["num_approved"]) == (0, 1)


def test_the_command_line_refuses_a_bad_review_before_it_begins(tmp_path: Path) -> None:
    config = catalog(tmp_path, num_rows=1)
    bad = review(tmp_path, "r0,0,perhaps,")
    arguments = [config.manifest, "--model", "demo", "--review", bad]
    assert main(["validate", *arguments]) == 2
    assert main(["animate", *arguments, "--output", config.output]) == 2
    assert not Path(config.output, "results.parquet").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("id,verdict\na,approved\n", "no column video_index in line 1; it needs id, video_index, verdict"),
        ("", "no column id, video_index, verdict"),
        ("id,video_index,verdict,verdict\n", "the column verdict twice"),
        (HEADER + "a,0,approved,\nb,0,aproved,\n", "line 3, verdict: must be approved or rejected"),
        (HEADER + "a,x,approved,\n", "line 2, video_index: must be a whole number from 0 .got 'x'."),
        (HEADER + ",0,approved,\n", "line 2, id: must be the id of a row"),
        (HEADER + 'a,0,approved,"two\nlines"\nb,0,no,\n', "line 4, verdict"),
        (HEADER + "a,0,approved,\nb,0,rejected,\na,0,approved,\n", "line 4, verdict: a has the same verdict in line 2"),
        (HEADER + "a,1,approved,\na,1,rejected,\n", "a .video 1. has another verdict in line 2 already; keep one"),
        (HEADER[:-1] + ",take\na,0,approved,,first\n", "line 2, take: must be a whole number"),
        (HEADER[:-1] + ",work_key\na,0,approved,,12ab\n", "line 2, work_key: must be the 64 hex digits"),
        (HEADER + 'a,0,approved,"open\n', "not a valid CSV file"),
    ],
)
def test_a_bad_review_is_refused_by_line_and_field(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_review(text, name="review.csv")


def test_a_review_from_a_spreadsheet_is_read(tmp_path: Path) -> None:
    text = "ID;Video_Index;Verdict;Shelf\r\n a ;0;Approved;x\r\nb;0;;\r\n;;;\r\n"
    assert parse_review(text, name="r") == (Verdict(2, " a ", 0, "approved"),)


def test_a_review_that_is_not_there_or_contradicts_itself_stops_the_run_with_its_verdicts_unread(
    tmp_path: Path,
) -> None:
    config = catalog(tmp_path)
    go(config)
    with pytest.raises(ConfigError, match=r"review: .*nothing\.csv cannot be read"):
        go(config, review=str(tmp_path / "nothing.csv"))
    key = by_id(config)["r1"]["work_key"]
    both = review(tmp_path, "r1,0,rejected,,", f"r1,0,approved,,{key}", header=HEADER[:-1] + ",work_key\n")
    with pytest.raises(ConfigError, match="line 3, verdict: r1 has a verdict in line 2 already"):
        go(config, review=both)
    assert {row["review"] for row in rows_of(config)} == {None}


def test_takes_after_a_rejection_begin_anew() -> None:
    bounds = Policy(parse_bounds(["flicker<=0.1"]), 1)
    old = [Take(0, 0, {"flicker": 0.05}, review="passed_over"), Take(1, 1, {"flicker": 0.01}, review="rejected")]
    assert next_take(old, bounds, published=1) == 2
    assert next_take([*old, Take(2, 2, {"flicker": 0.5})], bounds, published=2) == 3
    both = [*old, Take(2, 2, {"flicker": 0.5}), Take(3, 3, {"flicker": 0.6})]
    assert next_take(both, bounds, published=2) is None
    frozen = [*both[:2], Take(2, 2, {"flicker": 0.5}, review="approved")]
    assert next_take(frozen, bounds, published=2) is None
