"""Several models side by side: rows name one as their style, each is as if alone, and what is equal is held once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from pia_ray import Animation, AnimationParams, AnimationRequest, Animator, ModelConfig, manifest, read_results, weights
from pia_ray.catalog import estimate
from pia_ray.catalog.local import run_local
from pia_ray.catalog.validate import validate
from pia_ray.cli.main import main
from pia_ray.config.catalog import CatalogConfig, load
from pia_ray.config.model import build, parse_styles
from pia_ray.errors import BadParameter, ConfigError, ModelUnavailable, WeightsError
from pia_ray.pia.admission import PATIENCE, PRIORITY_STEP, AdmissionQueue
from pia_ray.pia.loading.load import assemble
from pia_ray.pia.loading.weight_sharing import WeightPool
from pia_ray.testing import FakeAnimator, draw_picture, make_pipeline_folder, make_split_checkpoint

STYLES = ("ink", "oil", "clay")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelConfig]:
    """Three bases with UNets and text encoders of their own, one adapter and one VAE for all, and a whole pipeline."""
    root = tmp_path_factory.mktemp("checkpoints")
    models = {}
    for number, style in enumerate(STYLES):
        base, adapter, vae = make_split_checkpoint(root / style, seed=number, vae_factor=4)
        first = root / STYLES[0]
        if number:  # as where users download them: other folders, equal files
            for folder, origin in ((adapter, first / "motion-adapter"), (vae, first / "vae")):
                shutil.rmtree(folder)
                shutil.copytree(origin, folder)
        models[style] = tiny(style, base, motion_adapter=str(adapter), vae=str(vae))
    models["plain"] = tiny("plain", make_pipeline_folder(root / "plain", seed=7, vae_factor=4))
    return models


def tiny(name: str, base: Path, **settings: Any) -> ModelConfig:
    defaults = {"num_inference_steps": 2, "num_frames": 4, "negative_prompt": ""}
    values: dict[str, Any] = {"device": "cpu", "long_edge": 32, "size_step": 16, "defaults": defaults, **settings}
    return ModelConfig(name=name, base=str(base), **values)


def ask(style: str | None = None, seed: int = 1, **knobs: Any) -> AnimationRequest:
    named = {} if style is None else {"style": style}
    values = np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    picture = Image.fromarray(values).resize((32, 32), Image.Resampling.BICUBIC)
    return AnimationRequest(picture, AnimationParams(prompt="a cat", seed=seed, **named, **knobs))


def frames(outcome: object) -> np.ndarray:
    assert isinstance(outcome, Animation), outcome
    return outcome.frames.astype(int)


@pytest.fixture(scope="module")
def alone(checkpoints: dict[str, ModelConfig]) -> dict[str, np.ndarray]:
    """What each model makes in an animator of its own."""
    made = {}
    for style, model in checkpoints.items():
        with Animator(model) as animator:
            made[style] = frames(animator.animate([ask()])[0])
    return made


@pytest.fixture(scope="module")
def animator(checkpoints: dict[str, ModelConfig]) -> Iterator[Animator]:
    styles = {style: checkpoints[style] for style in STYLES}
    with Animator(checkpoints["plain"], styles=styles, keep_models=4, batch_size=4) as animator:
        yield animator


def test_a_row_is_animated_by_the_model_its_style_names_as_if_that_were_alone(
    animator: Animator, checkpoints: dict[str, ModelConfig], alone: dict[str, np.ndarray]
) -> None:
    order = [None, "ink", "oil", "clay", "ink", "default"]
    outcomes = animator.animate([ask(style) for style in order])
    for style, outcome in zip(order, outcomes, strict=True):
        name = "plain" if style in (None, "default") else style
        assert np.abs(frames(outcome) - alone[name]).max() <= 1
        assert isinstance(outcome, Animation)
        assert outcome.model == weights.version(checkpoints[name])
        assert outcome.params.style == (style or "default")
    assert np.abs(alone["ink"] - alone["oil"]).max() > 10, "the models differ"


def test_a_style_that_is_not_there_fails_its_row_and_names_those_there_are(animator: Animator) -> None:
    unknown, fine = animator.animate([ask("inc"), ask("ink")])
    assert isinstance(unknown, BadParameter)
    assert unknown.field == "style"
    assert "default, ink, oil, clay" in unknown.message
    assert 'Did you mean "ink"?' in unknown.message
    assert isinstance(fine, Animation)


def test_knobs_and_sizes_that_are_not_given_are_those_of_the_styles_model(checkpoints: dict[str, ModelConfig]) -> None:
    small = checkpoints["ink"].model_copy(
        update={"long_edge": 16, "defaults": {"num_inference_steps": 1, "num_frames": 3}}
    )
    with Animator(checkpoints["plain"], styles={"small": small}) as animator:
        (made,) = animator.animate([ask("small")])
    assert frames(made).shape == (3, 16, 16, 3)


def test_models_with_equal_parts_hold_them_once(checkpoints: dict[str, ModelConfig]) -> None:
    pool = WeightPool()
    ink, oil = (assemble(weights.resolve(checkpoints[style]), checkpoints[style], pool) for style in STYLES[:2])
    assert addresses(ink.vae) == addresses(oil.vae)
    for name, address in addresses(ink.unet).items():
        assert (address == addresses(oil.unet)[name]) == ("motion_modules" in name), name
    assert not set(addresses(ink.text_encoder).values()) & set(addresses(oil.text_encoder).values())
    same = checkpoints["ink"].model_copy(update={"name": "same"})
    twin = assemble(weights.resolve(same), same, pool)
    assert addresses(twin.unet) == addresses(ink.unet)
    assert addresses(twin.text_encoder) == addresses(ink.text_encoder)
    assert twin.unet is not ink.unet


def addresses(module: torch.nn.Module) -> dict[str, int]:
    return {name: parameter.data_ptr() for name, parameter in module.named_parameters()}


def test_loading_a_second_model_on_the_same_adapter_does_not_change_the_first(
    checkpoints: dict[str, ModelConfig],
) -> None:
    pool = WeightPool()
    ink = assemble(weights.resolve(checkpoints["ink"]), checkpoints["ink"], pool)
    before = {name: value.clone() for name, value in ink.unet.state_dict().items()}
    oil = assemble(weights.resolve(checkpoints["oil"]), checkpoints["oil"], pool)
    assert all(torch.equal(value, before[name]) for name, value in ink.unet.state_dict().items())
    assert not torch.equal(ink.unet.conv_in.weight, oil.unet.conv_in.weight)
    unshared = assemble(weights.resolve(checkpoints["oil"]), checkpoints["oil"])
    assert all(torch.equal(value, unshared.unet.state_dict()[name]) for name, value in oil.unet.state_dict().items())


def test_weights_in_another_precision_are_not_shared(checkpoints: dict[str, ModelConfig]) -> None:
    pool = WeightPool()
    full = assemble(weights.resolve(checkpoints["ink"]), checkpoints["ink"], pool)
    half_model = checkpoints["ink"].model_copy(update={"dtype": "bfloat16"})
    half = assemble(weights.resolve(half_model), half_model, pool)
    assert {parameter.dtype for parameter in half.unet.parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in full.unet.parameters()} == {torch.float32}


def test_the_pool_forgets_weights_when_the_last_model_that_holds_them_is_gone(
    checkpoints: dict[str, ModelConfig],
) -> None:
    pool = WeightPool()
    ink = assemble(weights.resolve(checkpoints["ink"]), checkpoints["ink"], pool)
    oil = assemble(weights.resolve(checkpoints["oil"]), checkpoints["oil"], pool)
    assert len(pool) == 8  # of both one VAE and one adapter; two text encoders, UNets and inputs of UNets
    del ink
    assert len(pool) == 5
    del oil
    assert len(pool) == 0


def test_rows_that_alternate_load_each_model_once_where_only_one_is_kept(checkpoints: dict[str, ModelConfig]) -> None:
    styles = {style: checkpoints[style] for style in STYLES[1:]}
    with Animator(checkpoints["ink"], styles=styles, keep_models=1, batch_size=2) as animator:
        outcomes = animator.animate([ask(style, seed=n) for n in range(3) for style in (None, "oil", "clay")])
        assert all(isinstance(outcome, Animation) for outcome in outcomes)
        assert [outcome.model.partition("@")[0] for outcome in outcomes] == ["ink", "oil", "clay"] * 3
        assert animator.num_loads == 3


def test_a_model_that_cannot_be_loaded_fails_its_rows_alone(
    checkpoints: dict[str, ModelConfig], tmp_path: Path
) -> None:
    gone = tiny("gone", tmp_path / "nowhere")
    with Animator(checkpoints["plain"], styles={"gone": gone}) as animator:
        lost, fine = animator.animate([ask("gone"), ask()])
        assert isinstance(lost, ModelUnavailable)
        assert "nowhere" in lost.message
        assert isinstance(fine, Animation)
        assert animator.version_of("gone") == "gone"


def test_a_prompt_is_encoded_by_the_model_of_its_style(checkpoints: dict[str, ModelConfig]) -> None:
    with Animator(checkpoints["plain"], styles={"ink": checkpoints["ink"]}, keep_models=1) as animator:
        plain, ink = animator.encode_prompt("a cat"), animator.encode_prompt("a cat", style="ink")
        assert np.abs(plain - ink).max() > 0.1
        assert np.array_equal(animator.encode_prompt("a cat"), plain)
        with pytest.raises(BadParameter, match="one of default, ink"):
            animator.encode_prompt("a cat", style="oil")


def test_rows_of_models_in_memory_go_first_but_pass_no_row_for_ever() -> None:
    queue: AdmissionQueue[int] = AdmissionQueue()
    queue.add("away", 0)
    for number in range(1, 2 * PATIENCE):
        queue.add("here", number)
    gone = []
    while (entry := queue.next(ready={"here"}, loading=())) is not None:
        assert queue.pop("here") == entry
        gone.append(entry)
    assert gone == list(range(1, PATIENCE + 1))
    assert queue.next(ready={"here"}, loading={"away"}) == PATIENCE + 1, "its model is being loaded: no need to wait"
    assert queue.next(ready={"here", "away"}, loading=()) == 0
    queue.pop("away")
    assert queue.next(ready={"here"}, loading=()) == PATIENCE + 1


def test_rows_that_fit_go_before_one_that_does_not_but_do_not_pass_it_for_ever() -> None:
    queue: AdmissionQueue[int] = AdmissionQueue()
    for number in range(2 * PATIENCE):
        queue.add("model", number)
    gone = []
    while (row := queue.next(ready={"model"}, loading=(), fits=lambda row: row > 0)) is not None:
        assert queue.pop("model", row) == row
        gone.append(row)
    assert gone == list(range(1, PATIENCE + 1))
    assert queue.next(ready={"model"}, loading=()) == 0


def test_urgent_rows_go_first_but_no_row_waits_for_ever() -> None:
    queue: AdmissionQueue[str] = AdmissionQueue()
    queue.add("model", "batch", priority=1)
    for number in range(PRIORITY_STEP + 9):
        queue.add("model", str(number))
    order = [queue.pop("model") for _ in range(len(queue))]
    assert order.index("batch") == PRIORITY_STEP
    assert [each for each in order if each != "batch"] == [str(number) for number in range(PRIORITY_STEP + 9)]


def test_rows_that_have_gone_leave_the_line_wherever_they_stand() -> None:
    queue: AdmissionQueue[int] = AdmissionQueue()
    for number in range(9):
        queue.add("ab"[number % 2], number)
    assert sorted(queue.remove(lambda number: number < 2 or number == 5)) == [0, 1, 5]
    assert queue.models == ["a", "b"]
    assert [queue.pop("b"), queue.pop("b")] == [3, 7]
    assert queue.models == ["a"]
    assert [queue.pop("a") for _ in range(len(queue))] == [2, 4, 6, 8]


def write(folder: Path, styles: list[str | None]) -> Path:
    rows = []
    for number, style in enumerate(styles):
        (folder / f"{number}.png").write_bytes(draw_picture((64, 48), seed=number))
        rows.append({"id": str(number), "image": f"{number}.png", "prompt": "p", "style": style})
    pq.write_table(pa.Table.from_pylist(rows), folder / "manifest.parquet")
    return folder / "manifest.parquet"


def configure(manifest: Path, output: Path, **settings: Any) -> CatalogConfig:
    styles = {"ink": {"base": "embedded", "defaults": {"num_frames": 3}}, "oil": "demo"}
    values = {"manifest": str(manifest), "output": str(output), "model": "demo", "styles": styles, **settings}
    return build(CatalogConfig, values)


def test_a_catalogue_of_styles_loads_each_model_once_and_keeps_the_manifests_order(tmp_path: Path) -> None:
    order = [None, "ink", "oil"] * 3
    # One row at a time: rows of two styles that are in hand together would have the models change addresses.
    alone = {"batch_size": 1, "prefetch": 0}
    config = configure(write(tmp_path, [*order, "inc"]), tmp_path / "out", keep_models=1, **alone)
    with FakeAnimator(config.model, styles=config.styles, keep_models=1) as animator:
        summary = run_local(config, animator=animator)
        assert animator.num_loads == 3
    rows = read_results(config.output).to_pylist()
    assert [row["id"] for row in rows] == [str(number) for number in range(10)]
    assert [row["model"] for row in rows[:3]] == ["demo@fake", "ink@fake", "demo@fake"]
    assert [row["num_frames"] for row in rows[:3]] == [16, 3, 16]
    assert [json.loads(row["params"])["style"] for row in rows[:3]] == ["default", "ink", "oil"]
    assert (rows[9]["status"], rows[9]["error_code"]) == ("failed", "bad_parameter")
    assert "default, ink, oil" in rows[9]["error_message"]
    assert summary.exit_code == 1
    with FakeAnimator(config.model, styles=config.styles) as animator:
        assert run_local(config, animator=animator).progress.num_pending == 0


def test_work_keys_name_the_model_of_the_rows_style_also_on_the_fast_way(tmp_path: Path) -> None:
    config = configure(write(tmp_path, [None, "ink", "oil"]), tmp_path / "out")
    opened = manifest.open_manifest(config)

    def keys(**versions: str) -> list[str]:
        style_versions = {"ink": "i1", "oil": "o1", **versions}
        (table,) = manifest.plan(opened, config, model_version="m1", style_versions=style_versions)
        for item in table.to_pylist():
            row = manifest.row_from_item(item)
            version = "m1" if item["style"] == "default" else style_versions[item["style"]]
            spec = {"row_id": row.id, "video_index": 0, "image_identity": row.image_identity, "params": row.params}
            assert manifest.work_key(**spec, config=config, model_version=version) == row.work_key
        return table["work_key"].to_pylist()

    before, after = keys(), keys(ink="i2")
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, False, True]


def test_validate_and_estimate_know_the_styles(tmp_path: Path) -> None:
    config = configure(write(tmp_path, [None, "ink", "ink", "inc"]), tmp_path / "out")
    found = list(validate(config, fetch=False))
    assert [finding.code for finding in found] == [None, None, None, "bad_parameter"]
    estimated = estimate.estimate(config)
    assert estimated.workload.styles == {"ink": 2, "default": 1}
    assert "styles     2 ink, 1 default" in estimate.text_of(estimated)


def test_styles_come_from_flags_and_files_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert parse_styles(["demo,a=x.yaml", "b = y"]) == {"demo": "demo", "a": "x.yaml", "b": "y"}
    (tmp_path / "run.yaml").write_text("model: demo\nstyles: {ink: {base: embedded}}\n")
    given = {"manifest": "m", "output": "o", "styles": {"oil": ModelConfig.named("demo")}}
    assert set(load(tmp_path / "run.yaml", given).styles) == {"ink", "oil"}
    for wrong in ({"default": "demo"}, {"a=b": "demo"}, {"": "demo"}):
        with pytest.raises(ConfigError, match="styles"):
            build(CatalogConfig, {"manifest": "m", "output": "o", "model": "demo", "styles": wrong})
    with pytest.raises(ConfigError, match="style must be one of default"):
        build(CatalogConfig, {"manifest": "m", "output": "o", "model": "demo", "defaults": {"style": "ink"}})
    with pytest.raises(ConfigError, match="no model can have one"):
        build(ModelConfig, {"base": "embedded", "defaults": {"style": "ink"}})
    path = write(tmp_path, ["ink", "demo"])
    assert main(["validate", str(path), "--model", "demo", "--styles", "ink=demo,demo", "--json"]) == 0
    assert main(["validate", str(path), "--model", "demo", "--styles", "ink=demo"]) == 1
    assert main(["validate", str(path), "--model", "demo", "--styles", "ink="]) == 2
    assert "NAME=MODEL" in capsys.readouterr().err


def test_a_run_wide_lora_that_no_model_has_is_refused_before_the_run() -> None:
    inked = ModelConfig(name="inked", base="embedded", loras={"pixar": "pixar.safetensors"})
    values = {"manifest": "m", "output": "o", "model": "demo", "styles": {"ink": inked}}
    assert build(CatalogConfig, {**values, "defaults": {"lora": "pixar:0.5"}}).defaults["lora"] == "pixar:0.5"
    with pytest.raises(ConfigError, match='no LoRA "pixr"; this model has pixar'):
        build(CatalogConfig, {**values, "defaults": {"lora": "pixr"}})


@pytest.mark.parametrize(
    ("file", "name", "value"),
    [
        ("scheduler/scheduler_config.json", "num_train_timesteps", 0),
        ("scheduler/scheduler_config.json", "steps_offset", "some"),
        ("scheduler/scheduler_config.json", "timestep_spacing", "dense"),
        ("vae/config.json", "scaling_factor", "large"),
        ("vae/config.json", "scaling_factor", 0),
    ],
)
def test_settings_that_no_row_can_be_animated_with_are_refused_when_the_model_is_loaded(
    file: str, name: str, value: Any, checkpoints: dict[str, ModelConfig], tmp_path: Path
):
    base = tmp_path / "base"
    shutil.copytree(checkpoints["plain"].base, base)
    path = base / file
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    with pytest.raises(WeightsError, match=f"{name}|{path.name}"):
        Animator(tiny("plain", base))
