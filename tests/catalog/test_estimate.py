"""Estimates: work is counted as the engine does it, speeds come from measurements only, and sums come out right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pyarrow.compute as pc
import pytest
import torch
from PIL import Image

from pia_ray import read_results
from pia_ray.catalog.estimate import Estimate, estimate, facts_of, text_of
from pia_ray.catalog.local import run_local
from pia_ray.catalog.workload import evaluated_frames, evaluations
from pia_ray.cli.main import main
from pia_ray.config.catalog import CatalogConfig
from pia_ray.config.knob_types import Scheduler
from pia_ray.config.knobs import AnimationParams
from pia_ray.config.model import ModelConfig, build
from pia_ray.errors import ConfigError, OutputError
from pia_ray.pia.denoising.conditions import Conditions
from pia_ray.pia.denoising.row_program import row_program
from pia_ray.pia.loading.load import assemble
from pia_ray.prepare import prepare
from pia_ray.testing import FakeAnimator, make_catalog
from pia_ray.types import AnimationRequest
from pia_ray.weights import resolve

# The demo model at a size and steps of these tests' own, whatever its defaults are.
DEFAULTS = {"num_inference_steps": 10, "guidance_scale": 2.0, "motion_scale": 1, "negative_prompt": ""}
DEMO = ModelConfig.named("demo").model_copy(update={"long_edge": 64, "defaults": DEFAULTS})
STEP_S = 0.02


def configure(manifest: Path, output: Path, **settings: Any) -> CatalogConfig:
    return build(CatalogConfig, {"manifest": str(manifest), "output": str(output), "model": DEMO, **settings})


@pytest.fixture(scope="module")
def animated(tmp_path_factory: pytest.TempPathFactory) -> CatalogConfig:
    """A catalogue of 8 rows that was animated at a known speed."""
    folder = tmp_path_factory.mktemp("animated")
    config = configure(make_catalog(folder, rows=8), folder / "out")
    with FakeAnimator(DEMO, batch_size=4, seconds_per_step=STEP_S) as animator:
        assert run_local(config, animator=animator).exit_code == 0
    return config


@pytest.fixture(scope="module")
def conditions() -> Conditions:
    return Conditions(assemble(resolve(DEMO), DEMO))


COSTS: list[dict[str, Any]] = [{}, {"guidance_scale": 1.0}, {"strength": 0.45}, {"num_inference_steps": 1}]
FEWER: list[dict[str, Any]] = [
    {"preset": "fast", "num_inference_steps": 12},
    {"preset": "balanced", "num_inference_steps": 20, "strength": 0.6},
    {"preset": "balanced", "num_inference_steps": 9, "guidance_scale": 1.0, "free_init": "ideal"},
]
LONG: list[dict[str, Any]] = [
    {"free_init": "butterworth", "free_init_iters": 2},
    {"free_init": "ideal", "free_init_fast_sampling": "on", "strength": 0.7},
    {"num_frames": 9, "context_frames": 4, "context_overlap": 1, "guidance_scale": 1.0},
    {"num_frames": 9, "context_frames": 4, "context_schedule": "uniform", "context_overlap": 2},
    {
        "num_frames": 19,
        "context_frames": 4,
        "context_schedule": "uniform-loop",
        "context_overlap": 1,
        "context_stride": 3,
        "free_init": "gaussian",
    },
    {"num_frames": 9, "context_frames": 4, "long_video": "chain", "free_init": "ideal"},
]


@pytest.mark.parametrize(
    ("scheduler", "changes"),
    [
        *((scheduler, changes) for scheduler in get_args(Scheduler) for changes in COSTS),
        *((scheduler, changes) for scheduler in ("ddim", "heun", "dpm++2s", "pndm", "lcm") for changes in FEWER),
        *((scheduler, changes) for scheduler in ("ddim", "heun", "pndm") for changes in LONG),
    ],
    ids=str,
)
def test_evaluations_are_those_that_the_engine_makes(
    conditions: Conditions, scheduler: str, changes: dict[str, Any]
) -> None:
    knobs = {"prompt": "sea", "scheduler": scheduler, "num_inference_steps": 7, "num_frames": 2, **changes}
    params = AnimationParams(**{"width": 16, "height": 16, "seed": 1, **knobs})
    request = prepare(AnimationRequest(Image.new("RGB", (16, 16)), params), DEMO)
    count = frames = 0
    with torch.inference_mode():
        program = row_program(request, conditions.components, conditions)
        evaluation = next(program)
        while True:
            sides = len(evaluation.branches)
            count += sides
            frames += sides * evaluation.shape[0]
            height, width = evaluation.latents.shape[2:]
            try:
                evaluation = program.send(torch.zeros(sides, 4, evaluation.shape[0], height, width))
            except StopIteration:
                break
    assert evaluations(request.params) == count
    assert evaluated_frames(request.params) == frames


def test_the_estimate_shows_what_free_init_costs(animated: CatalogConfig) -> None:
    steady = animated.model_copy(update={"defaults": {"free_init": "butterworth", "free_init_iters": 3}})
    plain, thrice = estimate(animated), estimate(steady)
    assert plain.workload.cost_factor == 2, "guidance"
    assert thrice.workload.cost_factor == 6
    assert thrice.workload.work == 3 * plain.workload.work
    assert "6.00 times that of one evaluation per step" in text_of(thrice)


def test_without_a_calibration_no_time_is_claimed(animated: CatalogConfig) -> None:
    estimated = estimate(animated)
    assert (estimated.gpu_s, estimated.wall_s, estimated.cost, estimated.storage_bytes) == (None, None, None, None)
    assert estimated.workload.num_pending == 8
    assert estimated.workload.evaluations == 8 * 2 * 10
    assert "--measure" in text_of(estimated)


def test_the_estimate_of_the_calibrating_manifest_is_what_it_took(animated: CatalogConfig) -> None:
    estimated = estimate(animated, calibrate=animated.output, price_per_hour=3600.0)
    results = read_results(animated.output)
    assert estimated.gpu_s == pytest.approx(pc.sum(results["gpu_s"]).as_py(), rel=0.01)
    assert estimated.cost == pytest.approx(estimated.wall_s)
    thumbnails = sum(
        Path(uri).stat().st_size
        for column in ("thumbnail_uri", "input_thumbnail_uri")
        for uri in results[column].to_pylist()
    )
    assert estimated.storage_bytes == pytest.approx(pc.sum(results["size_bytes"]).as_py() + thumbnails, rel=0.01)
    assert estimated.calibration is not None
    assert estimated.calibration.num_rows == 8


def test_twice_the_steps_take_about_twice_as_long(animated: CatalogConfig) -> None:
    once = estimate(animated, calibrate=animated.output)
    twice = animated.model_copy(update={"defaults": {"num_inference_steps": 20}})
    assert estimate(twice, calibrate=animated.output).gpu_s == pytest.approx(2 * _gpu_s(once), rel=0.05)


def test_rows_of_two_lengths_tell_the_fixed_part_from_the_work(tmp_path: Path, animated: CatalogConfig) -> None:
    manifest = tmp_path / "manifest.jsonl"
    image = str(Path(animated.manifest).parent / "images" / "000000.jpg")
    lines = [{"id": str(n), "image": image, "prompt": "sea", "num_inference_steps": 2 + 6 * (n % 2)} for n in range(6)]
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = configure(manifest, tmp_path / "out")
    with FakeAnimator(DEMO, batch_size=2, seconds_per_step=STEP_S) as animator:
        run_local(config, animator=animator)
    longer = config.model_copy(update={"output": str(tmp_path / "none")})
    manifest.write_text("".join(json.dumps({**line, "num_inference_steps": 40}) + "\n" for line in lines))
    estimated = _gpu_s(estimate(longer, calibrate=config.output))
    # Steps alone take 6 x 40 x STEP_S; other processes on the machine can only add to what was measured.
    assert estimated > 0.9 * 6 * 40 * STEP_S
    measured = {row["id"]: row["gpu_s"] for row in read_results(config.output).to_pylist()}
    few, many = (sum(measured[str(n)] for n in range(first, 6, 2)) / 3 for first in (0, 1))
    per_step = (many - few) / 6
    fixed = few - 2 * per_step
    if min(fixed, per_step) <= 0:
        pytest.skip("other processes took more of the machine than the rows")
    assert estimated == pytest.approx(6 * (fixed + 40 * per_step), rel=0.01)


def test_more_actors_take_less_time_and_the_same_gpu_hours(animated: CatalogConfig) -> None:
    one = estimate(animated, calibrate=animated.output)
    four = estimate(animated.model_copy(update={"actors": (1, 4)}), calibrate=animated.output)
    assert one.wall_s is not None
    assert four.wall_s == pytest.approx(one.wall_s / 4)
    assert four.gpu_s == one.gpu_s


def test_what_an_earlier_run_has_done_is_left_out(tmp_path: Path) -> None:
    config = configure(make_catalog(tmp_path, rows=6, broken=0.34), tmp_path / "out", limit=4)
    with FakeAnimator(DEMO) as animator:
        run_local(config, animator=animator)
    whole = config.model_copy(update={"limit": None})
    before = read_results(config.output)
    failed = pc.sum(pc.equal(before["status"], "failed")).as_py()
    rest = estimate(whole, resume=True).workload
    assert (rest.num_items, rest.num_before, rest.num_pending) == (6, 4, 2)
    retried = estimate(whole.model_copy(update={"retry": ("failed",)}), resume=True).workload
    assert failed
    assert retried.num_pending == 2 + failed


def test_sizes_left_to_the_picture_are_those_a_run_would_make(animated: CatalogConfig) -> None:
    results = read_results(animated.output).to_pylist()
    assert estimate(animated).workload.pixel_frames == sum(
        row["width"] * row["height"] * row["num_frames"] for row in results
    )


def test_pictures_that_cannot_be_opened_leave_the_square_and_say_so(tmp_path: Path) -> None:
    config = configure(make_catalog(tmp_path, rows=3, broken=1.0), tmp_path / "out")
    load = estimate(config).workload
    assert load.pixel_frames == 3 * 16 * 64 * 64
    assert "assumed 64 x 64" in load.sizes


def test_bad_rows_are_counted_and_cost_nothing(tmp_path: Path) -> None:
    manifest = tmp_path / "manifest.jsonl"
    rows = [{"id": str(n), "image": f"{n}.png", "prompt": "sea", "motion_scale": n} for n in (7, 8, 9)]
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    load = estimate(configure(manifest, tmp_path / "out")).workload
    assert (load.num_items, load.num_bad, load.num_pending) == (3, 1, 2)


def test_rows_measured_here_and_now_calibrate(animated: CatalogConfig) -> None:
    with FakeAnimator(DEMO, seconds_per_step=STEP_S) as animator:
        estimated = estimate(animated, measure=3, animator=animator)
    assert estimated.calibration is not None
    assert estimated.calibration.num_rows == 3
    assert _gpu_s(estimated) > 0.9 * 8 * 10 * STEP_S  # rows of other sizes than the sampled ones take as long here
    assert estimated.storage_bytes


def test_the_speed_of_another_model_is_refused(animated: CatalogConfig) -> None:
    other = animated.model_copy(update={"model": ModelConfig(name="mine", base="embedded")})
    with pytest.raises(ConfigError, match="not by mine"):
        estimate(other, calibrate=animated.output)


def test_an_output_without_a_success_calibrates_nothing(tmp_path: Path) -> None:
    config = configure(make_catalog(tmp_path, rows=2, broken=1.0), tmp_path / "out")
    with pytest.raises(OutputError, match="no results"):
        estimate(config, calibrate=config.output)
    with FakeAnimator(DEMO) as animator:
        run_local(config, animator=animator)
    with pytest.raises(OutputError, match="no row has succeeded"):
        estimate(config, calibrate=config.output)


def test_storage_is_not_guessed_from_another_format(animated: CatalogConfig) -> None:
    estimated = estimate(animated.model_copy(update={"format": "gif"}), calibrate=animated.output)
    assert estimated.gpu_s is not None
    assert estimated.storage_bytes is None


def test_the_command_prints_json_and_text(
    animated: CatalogConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model.yaml"
    model.write_text(json.dumps(DEMO.model_dump(exclude_none=True)))  # JSON is YAML
    given = ["estimate", animated.manifest, "--model", str(model), "--calibrate", animated.output]
    assert main([*given, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts == json.loads(json.dumps(facts_of(estimate(animated, calibrate=animated.output))))
    assert main([*given, "--price-per-hour", "2"]) == 0
    text = capsys.readouterr().out
    assert "8 to make" in text
    assert "GPU-hours" in text


def _gpu_s(estimated: Estimate) -> float:
    assert estimated.gpu_s is not None
    return estimated.gpu_s
