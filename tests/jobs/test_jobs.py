"""The programs of jobs/ as `ray job submit` starts them: what they animate, mend and copy, and how they exit."""

from __future__ import annotations

import ast
import os
import re
import runpy
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import yaml

from pia_ray import CatalogConfig, ModelConfig, ledger, read_results, storage, weights
from pia_ray.catalog.local import run_local
from pia_ray.config.catalog import load
from pia_ray.config.model import build
from pia_ray.config.yaml_files import read_yaml
from pia_ray.errors import StorageError, WeightsError
from pia_ray.testing import (
    make_catalog,
    make_fake,
    make_ip_adapter,
    make_lora,
    make_pipeline_folder,
    make_split_checkpoint,
    make_textual_inversion,
    put_catalog,
)
from tests.cli.test_commands import fake_actors, pia
from tests.s3_server import S3Server, s3, s3_server

__all__ = ["fake_actors", "pia", "s3", "s3_server"]  # fixtures

JOBS = Path(__file__).parents[2] / "jobs"
SCRIPTS = sorted(JOBS.glob("*.py"))
CONFIGS = sorted(JOBS.glob("configs/*.yaml"))


def run(script: str, *words: object, expect: int = 0, timeout_s: float = 300) -> str:
    """What the job prints, when it exits as expected."""
    environment = {**os.environ, "RAY_ADDRESS": ""}
    command = [sys.executable, str(JOBS / script), *map(str, words)]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=timeout_s, stdin=subprocess.DEVNULL
    )
    assert done.returncode == expect, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


def test_there_is_a_job_for_everything_that_is_submitted():
    assert {path.stem for path in SCRIPTS} == {
        "animate_catalog",
        "benchmark",
        "compact_ledger",
        "make_demo_catalog",
        "warm_weights",
    }


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_job_is_short_and_uses_public_names_only(path: Path):
    text = path.read_text()
    assert len(text.splitlines()) <= 60
    tree = ast.parse(text)
    assert ast.get_docstring(tree)
    for node in ast.walk(tree):
        assert not (isinstance(node, ast.Import) and any("pia_ray" in alias.name for alias in node.names))
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "pia_ray":
            for alias in node.names:
                assert not alias.name.startswith("_")
                assert hasattr(import_module(node.module or ""), alias.name) or import_module(
                    f"{node.module}.{alias.name}"
                )
        if isinstance(node, ast.Attribute):
            assert not node.attr.startswith("_")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_sample_config_is_one_that_a_run_takes(path: Path):
    values = yaml.safe_load(path.read_text())
    config = load(path, {})
    assert set(values) <= set(CatalogConfig.model_fields)
    assert (config.manifest, config.output) == (values["manifest"], values["output"])
    assert config.gpus_per_actor == 1  # a cluster that adds GPU nodes on demand has none when it is asked
    commands = re.findall(r"jobs/(\S+\.py) --config \S*jobs/configs/(\S+)", path.read_text())
    assert commands == [("animate_catalog.py", path.name)]


def test_the_samples_cover_the_four_ways_to_run():
    assert {path.stem for path in CONFIGS} == {"one_gpu", "s3_four_gpus", "spot_workers", "nightly"}
    assert load(JOBS / "configs" / "s3_four_gpus.yaml", {}).actors == (4, 4)
    assert load(JOBS / "configs" / "spot_workers.yaml", {}).actors == (1, 16)
    nightly = load(JOBS / "configs" / "nightly.yaml", {})
    assert nightly.detect_changes
    assert nightly.deadline_s == 6 * 3600


def test_the_help_of_the_main_job_tells_how_to_submit_it_again():
    text = run("animate_catalog.py", "--help")
    assert "--submission-id" in text
    assert "--fail-on-rows" in text


def test_make_demo_catalog_draws_the_same_catalogue_each_time(tmp_path: Path):
    printed = run("make_demo_catalog.py", "--output", tmp_path / "a", "--rows", 5, "--seed", 3)
    assert printed.strip() == str(tmp_path / "a" / "manifest.parquet")
    make_catalog(tmp_path / "b", rows=5, seed=3)
    files = [sorted(path for path in (tmp_path / name).rglob("*.*")) for name in "ab"]
    assert [path.read_bytes() for path in files[0]] == [path.read_bytes() for path in files[1]]
    assert len(files[0]) == 6
    run("make_demo_catalog.py", "--output", tmp_path / "c", "--rows", 0, expect=2)


def test_compact_ledger_leaves_fewer_parts_and_the_same_results(tmp_path: Path):
    config = CatalogConfig(
        manifest=str(make_catalog(tmp_path / "in", rows=3)),
        output=str(tmp_path / "out"),
        model=ModelConfig.named("demo"),
        defaults={"num_frames": 4, "num_inference_steps": 1},
    )
    with make_fake(config, 1) as animator:
        for limit in (1, 2, 3):
            run_local(config.model_copy(update={"limit": limit}), animator=animator)
    before = read_results(config.output)
    assert "the ledger has 1 part, after 3 before" in run("compact_ledger.py", config.output)
    assert ledger.verify(config.output).ok
    assert read_results(config.output).equals(before)
    run("compact_ledger.py", tmp_path / "nothing", expect=2)


def test_a_reader_that_has_gone_is_no_failed_row(tmp_path: Path):
    config = CatalogConfig(
        manifest=str(make_catalog(tmp_path / "in", rows=1)),
        output=str(tmp_path / "out"),
        model=ModelConfig.named("demo"),
        defaults={"num_frames": 4, "num_inference_steps": 1},
    )
    with make_fake(config, 1) as animator:
        run_local(config, animator=animator)
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "pia_ray.cli", "report", config.output, "--json"]
    try:
        done = subprocess.run([*command, "--follow"], stdout=writer, stderr=subprocess.PIPE, timeout=300)
    finally:
        os.close(writer)
    # 1 would be that, which a job turns into 0.
    assert (done.returncode, done.stderr) == (141, b"")


def call(script: str, *words: object) -> int:
    """The exit code of the job's `main`, in this process."""
    return int(runpy.run_path(str(JOBS / script))["main"]([str(word) for word in words]))


@pytest.mark.heavy
@pytest.mark.usefixtures("pia", "fake_actors")  # `pia` puts back what commands set for their process
def test_a_job_ends_well_with_failed_rows_and_at_its_deadline_where_asked_and_tries_again(
    tmp_path: Path, ray_address: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("RAY_ADDRESS", ray_address)
    manifest = put_catalog(str(tmp_path / "in"), rows=3, broken=0.34)
    output = str(tmp_path / "out")
    config = tmp_path / "run.yaml"
    settings = {"manifest": manifest, "output": output, "model": "demo", "format": "gif"}
    config.write_text(yaml.safe_dump({**settings, "defaults": {"num_inference_steps": 1, "num_frames": 8}}))
    # The deadline has passed before the first worker is there.
    assert call("animate_catalog.py", "--config", config, "--deadline", "1s", "--ok-at-deadline") == 0
    assert ledger.summary(ledger.Ledger.open(output)).num_left == 3
    assert call("animate_catalog.py", "--config", config) == 0
    rows = read_results(output).to_pylist()
    assert sorted(row["status"] for row in rows) == ["failed", "succeeded", "succeeded"]
    assert call("animate_catalog.py", "--config", config, "--fail-on-rows") == 1
    run("animate_catalog.py", "--config", config, "--nonsense", expect=2)

    [failed] = [row for row in rows if row["status"] == "failed"]
    whole = Path(make_catalog(tmp_path / "whole", rows=3)).parent / "images" / Path(failed["image_uri"]).name
    (tmp_path / "in" / "images" / whole.name).write_bytes(whole.read_bytes())
    assert call("animate_catalog.py", "--config", config, "--retry", failed["error_code"], "--fail-on-rows") == 0
    assert read_results(output)["status"].to_pylist() == ["succeeded"] * 3


def test_warm_weights_copies_a_model_that_then_animates_from_there(tmp_path: Path):
    folder = make_pipeline_folder(tmp_path / "model")
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump({"base": str(folder), "long_edge": 64}))
    place = tmp_path / "shared" / "tiny"
    printed = run("warm_weights.py", tmp_path / "tiny.yaml", "--to", place)
    assert str(place / "model.yaml") in printed
    config = load(None, {"manifest": "m.csv", "output": "out", "model": str(place / "model.yaml")})
    assert config.model.base == str(place / "base")
    assert config.model.long_edge == 64
    original = ModelConfig(name="tiny", base=str(folder))
    assert weights.resolve(config.model).version == weights.version(original)


def test_a_copy_that_is_whole_is_left_alone_and_one_that_is_not_is_mended(tmp_path: Path):
    model = ModelConfig(base=str(make_pipeline_folder(tmp_path / "model")))
    place = tmp_path / "copy"
    copied = weights.copy(model, str(place))
    times = {path: path.stat().st_mtime_ns for path in place.rglob("*.*")}
    assert weights.copy(model, str(place)) == copied
    assert {path: path.stat().st_mtime_ns for path in place.rglob("*.*")} == times
    unet = next((place / "base" / "unet").glob("*.safetensors"))
    whole = unet.read_bytes()
    unet.write_bytes(whole[:-100])
    weights.copy(model, str(place))
    assert unet.read_bytes() == whole


def test_a_copy_that_is_not_whole_is_not_called_a_model(tmp_path: Path):
    first, second = (make_pipeline_folder(tmp_path / name, seed=seed) for name, seed in (("one", 0), ("two", 1)))
    place = tmp_path / "copy"
    weights.copy(ModelConfig(base=str(first)), str(place))
    (place / "base" / "vae").rename(place / "elsewhere")
    (place / "base" / "vae").write_bytes(b"a file where a folder must be")
    with pytest.raises(StorageError):
        weights.copy(ModelConfig(base=str(second)), str(place))
    assert not (place / "model.yaml").exists(), "it would name files of two models"


def test_a_copy_does_not_mix_with_what_another_model_left(tmp_path: Path):
    first, second = (make_pipeline_folder(tmp_path / name) for name in ("one", "two"))
    (first / "tokenizer" / "added_tokens.json").write_text("{}")
    place = tmp_path / "copy"
    copied = weights.copy(ModelConfig(base=str(first)), str(place))
    with pytest.raises(WeightsError, match=r"added_tokens\.json is of another model"):
        weights.copy(ModelConfig(base=str(second)), str(place))
    assert build(ModelConfig, read_yaml(place / "model.yaml")) == copied


def test_every_part_of_a_model_is_copied_and_found_there(tmp_path: Path):
    base, adapter, vae = make_split_checkpoint(tmp_path / "parts")
    ip_adapter, encoder = make_ip_adapter(tmp_path / "ip", base)
    model = ModelConfig(
        base=str(base),
        motion_adapter=str(adapter),
        vae=str(vae),
        ip_adapter=str(ip_adapter),
        image_encoder=str(encoder),
        loras={"soft": {"path": str(make_lora(tmp_path / "lora.safetensors", base)), "weight": 0.5}},
        textual_inversions={"../<odd>": str(make_textual_inversion(tmp_path / "word.safetensors"))},
    )
    copied = weights.copy(model, str(tmp_path / "shared"))
    shutil.rmtree(tmp_path / "parts")
    (tmp_path / "lora.safetensors").unlink()
    found = weights.resolve(copied)
    assert found.motion_adapter == tmp_path / "shared" / "motion_adapter"
    assert found.loras == {"soft": tmp_path / "shared" / "loras" / "soft" / "lora.safetensors"}
    assert copied.loras["soft"].weight == 0.5
    (odd,) = found.textual_inversions.values()
    assert odd.is_relative_to(tmp_path / "shared" / "textual_inversions")
    assert build(ModelConfig, read_yaml(tmp_path / "shared" / "model.yaml")) == copied


@pytest.mark.heavy
def test_weights_and_a_catalogue_are_put_on_s3(s3: str, s3_server: S3Server, tmp_path: Path):
    folder = make_pipeline_folder(tmp_path / "model")
    copied = weights.copy(ModelConfig(base=str(folder)), f"{s3}/models/tiny")
    assert copied.base == f"{s3}/models/tiny/base"
    assert weights.resolve(copied).base.is_dir()
    manifest = put_catalog(f"{s3}/demo", rows=2)
    assert manifest == f"{s3}/demo/manifest.parquet"
    assert len(list(storage.list_objects(f"{s3}/demo/images"))) == 2
