"""Takes: bounds and their order are pure; a row that misses is animated again, and the best of its takes is there."""

from __future__ import annotations

import json
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from pia_ray import ledger
from pia_ray.animation import Animation
from pia_ray.catalog.calibration import calibrate_from_output
from pia_ray.catalog.local import run_local
from pia_ray.catalog.validate import validate
from pia_ray.cli.main import main
from pia_ray.config.acceptance import NUMBERS, parse_bounds
from pia_ray.config.catalog import CatalogConfig
from pia_ray.errors import ConfigError, DeviceLost, NonFiniteFrames, OutOfMemory
from pia_ray.media.judgement import Judgement
from pia_ray.media.video import probe
from pia_ray.takes import (
    Policy,
    Take,
    best_take,
    next_take,
    take_seed,
    takes_from_json,
    takes_to_json,
)
from pia_ray.types import AnimationRequest
from tests.catalog.test_local import DEMO, CountingAnimator, by_id, configure, rows_of, write

ROWS = 4


def policy(*bounds: str, retakes: int = 3, **how: Any) -> Policy:
    return Policy(parse_bounds(bounds), retakes, **how)


def takes(*flickers: float | None) -> list[Take]:
    """A take for each; None is one without a video."""
    return [
        Take(n, n, {} if flicker is None else {"flicker": flicker}, error="nan_frames" if flicker is None else None)
        for n, flicker in enumerate(flickers)
    ]


def uneven(folder: Path, **settings: Any) -> CatalogConfig:
    """A run over rows whose `flicker` depends on their seeds."""
    rows = [
        {"id": f"r{n}", "image": f"r{n}.png", "prompt": "uneven", "seed": 42 + 7 * n, "num_frames": 4}
        for n in range(ROWS)
    ]
    manifest = folder / "manifest.parquet"
    if not manifest.exists():
        write(folder, rows)
    return configure(manifest, folder / settings.pop("output", "out"), **settings)


def go(config: CatalogConfig) -> dict[str, int]:
    """Runs it; how often each row was animated."""
    with CountingAnimator() as animator:
        run_local(config, animator=animator)
    return dict(animator.asked)


class FailingAnimator(CountingAnimator):
    """Fails the second animation of each row with that error."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self._error = error

    def submit(self, request: AnimationRequest, **how: Any) -> Future[Animation]:
        future = super().submit(request, **how)
        if self.asked[request.id] != 2:
            return future
        failed: Future[Animation] = Future()
        failed.set_exception(self._error)
        return failed


def chosen(config: CatalogConfig) -> dict[str, tuple[Any, ...]]:
    return {row["id"]: (row["accepted"], row["take"], row["seed"]) for row in rows_of(config)}


def flickers(row: dict[str, Any]) -> list[float]:
    return [take["flicker"] for take in json.loads(row["takes"])]


def test_bounds_name_every_number_of_a_judgement() -> None:
    assert set(NUMBERS) == set(Judgement.__dataclass_fields__)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("likenes_min>=0.7", 'Did you mean "likeness_min"'),
        ("flicker=0.03", "write >= or <="),
        ("flicker<0.03", "write >= or <="),
        ("flicker<=low", "write a number"),
        ("flicker", "is not a bound"),
        ("likeness>=0.8, likeness<=0.7", "cannot be met"),
        ("likeness>=1.5", "cannot be met"),
        ("flicker<=-1", "cannot be met"),
    ],
)
def test_a_bound_that_cannot_be_meant_is_refused_with_what_is_right(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        configure(tmp_path / "m.parquet", tmp_path / "out", accept=[text])


def test_the_best_take_is_accepted_then_nearest_then_earliest() -> None:
    strict = policy("flicker<=0.1")
    assert best_take(takes(0.3, 0.05, 0.01), strict) == takes(0.3, 0.05)[1]
    assert best_take(takes(0.3, None, 0.2, 0.2), strict) == takes(0.3, None, 0.2)[2]
    assert best_take(takes(None), strict) is None


def test_take_zero_has_the_rows_own_seed_and_the_others_seeds_of_their_own() -> None:
    seeds = [take_seed(7, number) for number in range(17)]
    assert seeds[0] == 7
    assert len(set(seeds)) == 17
    assert seeds[1] == 17182967060565163971


def test_takes_go_on_after_those_that_were_tried_until_one_is_accepted_or_none_is_left() -> None:
    strict = policy("flicker<=0.1", retakes=2)
    assert next_take([], strict, published=None) == 0
    assert next_take(takes(0.05), strict, published=0) is None
    assert next_take(takes(0.3, None), strict, published=0) == 2
    assert next_take(takes(0.3, 0.2, 0.4), strict, published=1) is None
    assert next_take(takes(0.3, 0.2, 0.4), strict, published=0) == 1, "the best is made again where it is not there"
    assert next_take(takes(0.3, 0.2, 0.4), strict, published=0, made={1}) is None
    assert next_take(takes(0.3), policy("flicker<=0.1", retakes=0, unaccepted="fail"), published=None) is None


def test_takes_survive_their_cell() -> None:
    found = [Take(0, 2**64 - 1, {"flicker": 0.1}, gpu_s=2.0, run_id="r"), Take(1, 5, error="nan_frames")]
    assert list(takes_from_json(takes_to_json(found))) == found
    assert takes_from_json("not ours") == ()


def test_rows_that_miss_are_taken_again_and_the_best_take_is_published(tmp_path: Path) -> None:
    config = uneven(tmp_path, accept=["flicker<=0.06"], retakes=3)
    asked = go(config)
    rows = by_id(config)
    assert {row["take"] for row in rows.values()} > {0}, "some rows need a retake"
    for row in rows.values():
        tried = flickers(row)
        assert len(tried) == asked[row["id"]] <= 4
        assert row["flicker"] == tried[row["take"]]
        assert row["accepted"] == (row["flicker"] <= 0.06)
        assert row["flicker"] == min(tried)
        assert probe(Path(row["video_uri"]).read_bytes()).provenance["seed"] == str(row["seed"])
        first = json.loads(row["takes"])[0]["seed"]
        assert row["seed"] == take_seed(int(first), row["take"])


def test_the_same_row_and_policy_choose_the_same_take_whatever_the_batch(tmp_path: Path) -> None:
    several = [
        uneven(tmp_path, output=f"out{n}", accept=["flicker<=0.06"], retakes=3, prefetch=n, sample=ROWS - n)
        for n in range(2)
    ]
    for config in several:
        go(config)
    first, other = map(chosen, several)
    assert other.items() <= first.items()
    assert len(other) == ROWS - 1


def test_a_policy_is_no_part_of_the_work_key_and_a_run_without_one_has_no_verdicts(tmp_path: Path) -> None:
    config = uneven(tmp_path)
    go(config)
    assert {row["accepted"] for row in rows_of(config)} == {None}
    before = {row["id"]: row["work_key"] for row in rows_of(config)}
    config = uneven(tmp_path, output="other", accept=["flicker<=0.06"], retakes=1)
    go(config)
    assert {row["id"]: row["work_key"] for row in rows_of(config)} == before


def test_a_changed_policy_animates_those_alone_whose_video_misses_and_no_seed_twice(tmp_path: Path) -> None:
    go(uneven(tmp_path))
    stored = by_id(uneven(tmp_path))
    strict = uneven(tmp_path, accept=["flicker<=0.06"], retakes=3)
    asked = go(strict)
    assert set(asked) == {name for name, row in stored.items() if row["flicker"] > 0.06}
    assert go(strict) == {}
    whole = uneven(tmp_path, output="whole", accept=["flicker<=0.06"], retakes=3)
    go(whole)
    verdicts = chosen(strict)
    assert {name: verdicts[name] for name in asked} == {name: chosen(whole)[name] for name in asked}
    for row in by_id(strict).values():
        seeds = [take["seed"] for take in json.loads(row["takes"] or "[]")]
        assert len(set(seeds)) == len(seeds)
    assert go(uneven(tmp_path, accept=["flicker<=0.9"], retakes=3)) == {}


def test_more_retakes_go_on_after_those_that_were_tried(tmp_path: Path) -> None:
    go(uneven(tmp_path, accept=["flicker<=0.0005"], retakes=1))
    more = uneven(tmp_path, accept=["flicker<=0.0005"], retakes=2)
    assert set(go(more).values()) == {1}
    assert {len(flickers(row)) for row in rows_of(more)} == {3}


def test_a_row_of_unaccepted_fail_has_no_video_and_is_final_until_the_policy_changes(tmp_path: Path) -> None:
    config = uneven(tmp_path, accept=["flicker<=0.0005"], retakes=1, unaccepted="fail")
    go(config)
    (code,) = {row["error_code"] for row in rows_of(config)}
    assert code == "not_accepted"
    assert not list(Path(config.output).glob("videos/**/*.mp4"))
    assert go(config) == {}
    assert go(config.model_copy(update={"retry": ("not_accepted",)})) == {}, "no seed is tried twice"
    eased = uneven(tmp_path, accept=["flicker<=0.9"], retakes=1, unaccepted="fail")
    assert set(go(eased).values()) == {1}
    assert {(row["status"], row["accepted"], row["take"]) for row in rows_of(eased)} == {("succeeded", True, 0)}


def test_a_row_has_a_policy_of_its_own_where_its_cells_say_one(tmp_path: Path) -> None:
    cells = [("flicker<=0.0005", 2), ("none", None), (None, None), ("flickr<=1", 1), ("flicker<=0.0005", 99)]
    rows = [
        {"id": f"r{n}", "image": f"r{n}.png", "prompt": "uneven", "seed": 50, "accept": accept, "retakes": retakes}
        for n, (accept, retakes) in enumerate(cells)
    ]
    config = configure(write(tmp_path, rows), tmp_path / "out", accept=["flicker<=0.006"], retakes=1)
    assert go(config) == {"r0": 3, "r1": 1, "r2": 2}
    found = by_id(config)
    assert [found[f"r{n}"]["accepted"] for n in range(3)] == [False, None, False]
    assert [found[f"r{n}"]["error_code"] for n in (3, 4)] == ["bad_parameter"] * 2
    assert "Did you mean" in found["r3"]["error_message"]
    for fetch in (False, True):
        findings = {each.id: each.message for each in validate(config, fetch=fetch) if each.code is not None}
        assert findings == {name: found[name]["error_message"] for name in ("r3", "r4")}


def test_a_cell_whose_bounds_no_video_can_meet_is_found_before_the_run(tmp_path: Path) -> None:
    cell = "flicker>=0.5; flicker<=0.1"
    rows = [{"id": "r", "image": "r.png", "prompt": "a cat", "accept": cell}]
    (finding,) = validate(configure(write(tmp_path, rows), tmp_path / "out"), fetch=False)
    assert finding.code == "bad_parameter"
    assert finding.message == "accept: flicker>=0.5 and flicker<=0.1 cannot be met by any video"


def test_bounds_that_contradict_those_of_the_model_are_refused(tmp_path: Path) -> None:
    model = DEMO.model_copy(update={"accept": ("flicker<=0.1",)})
    rows = [{"id": "r", "image": "r.png", "prompt": "a cat"}]
    with pytest.raises(ConfigError, match=r"flicker<=0\.1 and flicker>=0\.5 cannot be met"):
        configure(write(tmp_path, rows), tmp_path / "out", accept=["model", "flicker>=0.5"], model=model)


STRICT: dict[str, Any] = {"accept": ["flicker<=0.0005"], "retakes": 2}


def test_a_crash_costs_the_take_at_work_alone(tmp_path: Path) -> None:
    whole, config = uneven(tmp_path, output="whole", **STRICT), uneven(tmp_path, **STRICT, limit=1)
    go(whole)
    with FailingAnimator(DeviceLost("gone")) as animator, pytest.raises(DeviceLost):
        run_local(config, animator=animator)
    assert go(config) == {"r0": 2}, "take 0 is there, and takes 1 and 2 are made"
    assert chosen(config)["r0"] == chosen(whole)["r0"]


def test_a_retake_that_fails_is_a_take_without_a_video_and_a_transient_failure_is_tried_again(tmp_path: Path) -> None:
    for error, asked, codes in (
        (NonFiniteFrames("nan"), 3, [None, "nan_frames", None]),
        (OutOfMemory("oom"), 4, [None, None, None]),
    ):
        config = uneven(tmp_path, output=error.code, **STRICT, limit=1)
        with FailingAnimator(error) as animator:
            run_local(config, animator=animator)
        (row,) = rows_of(config)
        assert animator.asked["r0"] == asked
        assert row["status"] == "succeeded"
        assert [take.get("error") for take in json.loads(row["takes"])] == codes


def test_a_stop_keeps_the_best_take_so_far_and_the_next_run_goes_on(tmp_path: Path) -> None:
    whole, config = uneven(tmp_path, output="whole", **STRICT), uneven(tmp_path, **STRICT)
    go(whole)
    with CountingAnimator(seconds_per_step=0.02) as animator:
        run_local(config.model_copy(update={"deadline_s": 0.6, "grace_s": 0.0}), animator=animator)
    go(config)
    assert chosen(config) == chosen(whole)


def test_the_counts_of_a_run_its_summary_and_its_report_agree(tmp_path: Path) -> None:
    config = uneven(tmp_path, accept=["flicker<=0.06"], retakes=3)
    with CountingAnimator() as animator:
        found = run_local(config, animator=animator).progress.takes
    rows = rows_of(config)
    assert found.num_accepted == sum(row["accepted"] for row in rows)
    assert found.num_retaken == sum(len(flickers(row)) > 1 for row in rows)
    assert found.num_given_up == len(rows) - found.num_accepted
    assert found.retake_gpu_s > 0
    assert json.loads((Path(config.output) / "summary.json").read_text())["num_retaken"] == found.num_retaken
    assert ledger.summary(ledger.Ledger.open(config.output)).takes == found
    assert calibrate_from_output(config.output, config).takes > 1


def test_judge_says_which_videos_miss_other_bounds_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = uneven(tmp_path)
    go(config)
    before = sorted(Path(config.output).rglob("*"))
    flicker = {row["id"]: row["flicker"] for row in rows_of(config)}
    assert main(["judge", config.output, "--accept", "flicker<=0.06", "--accept", "closure>=0.5", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    worst_first = sorted((name for name in flicker if flicker[name] > 0.06), key=lambda name: -flicker[name])
    assert [each["id"] for each in told["missing"]] == worst_first
    assert told["num_accepted"] == ROWS - len(worst_first)
    assert told["num_unmeasured"] == {"closure": ROWS}
    assert main(["judge", config.output, "--accept", "flicker<=0.06", "--csv", str(tmp_path / "miss.csv")]) == 0
    assert [line.split(",")[0] for line in (tmp_path / "miss.csv").read_text().splitlines()] == ["id", *worst_first]
    assert main(["judge", config.output, "--accept", "flikker<=0.06"]) == 2
    assert sorted(Path(config.output).rglob("*")) == before
