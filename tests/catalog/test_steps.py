"""The steps of one row by themselves: what is encoded can wait, and be committed more than once."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

from pia_ray import ledger, manifest, read_results, storage
from pia_ray.catalog import steps
from pia_ray.catalog.local import run_local
from pia_ray.catalog.validate import validate
from pia_ray.config.catalog import CatalogConfig
from pia_ray.config.model import ModelConfig, build
from pia_ray.errors import ConfigError
from pia_ray.media.video import probe
from pia_ray.testing import FakeAnimator, draw_picture, make_catalog
from pia_ray.types import ManifestRow
from tests.certificates import make_files

DEMO = ModelConfig.named("demo").model_copy(update={"long_edge": 64})


def configure(folder: Path, **settings: Any) -> CatalogConfig:
    values = {"manifest": str(make_catalog(folder, rows=1)), "output": str(folder / "out"), "model": DEMO}
    return build(CatalogConfig, {**values, **settings})


@pytest.fixture
def planned(tmp_path: Path) -> tuple[ManifestRow, CatalogConfig]:
    """One row of a catalogue, and the config of its run."""
    config = configure(tmp_path)
    opened = manifest.open_manifest(config)
    (table,) = manifest.plan(opened, config, model_version="demo@1")
    return manifest.row_from_item(table.to_pylist()[0]), config


def encode(row: ManifestRow, config: CatalogConfig) -> steps.Outputs:
    fetched = steps.fetch(row, config)
    with FakeAnimator(DEMO) as animator:
        animation = animator.submit(steps.request_of(row, fetched, deadline_s=None)).result()
    return steps.encode_outputs(animation, row, fetched=fetched, config=config, run_id="r", attempts=1)


def test_outputs_are_complete_before_anything_is_written(planned: tuple[ManifestRow, CatalogConfig]):
    row, config = planned
    outputs = encode(row, config)
    assert not Path(config.output).exists()
    assert outputs.result.status == "succeeded"
    assert (outputs.result.size_bytes, outputs.result.sha256) == (outputs.video.size_bytes, outputs.video.sha256)
    assert probe(outputs.video.content).provenance["work_key"] == row.work_key


def test_outputs_that_are_committed_again_leave_one_video_and_its_row(planned: tuple[ManifestRow, CatalogConfig]):
    row, config = planned
    outputs = encode(row, config)
    first, again = steps.commit(outputs, attempts=1), steps.commit(outputs, attempts=2)
    assert (again.video_uri, again.sha256, again.attempts) == (first.video_uri, first.sha256, 1)
    assert [found.uri for found in storage.list_objects(storage.join(config.output, "videos"))] == [first.video_uri]
    assert steps.committed(row, config) is not None
    for uri in (first.thumbnail_uri, first.input_thumbnail_uri):
        assert storage.exists(uri)


@pytest.mark.parametrize("level", ["public", "none"])
def test_a_video_that_tells_too_little_is_made_again_and_put_in_its_own_place(
    planned: tuple[ManifestRow, CatalogConfig], level: str
):
    row, config = planned
    config = config.model_copy(update={"provenance": level})
    first = steps.commit(encode(row, config), attempts=1)
    assert steps.committed(row, config) is None
    again = steps.commit(encode(row, config), attempts=1)
    assert (again.status, again.video_uri, again.work_key) == ("succeeded", first.video_uri, row.work_key)
    told = probe(Path(str(again.video_uri)).read_bytes()).provenance
    assert told == ({"model": again.model, "work_key": row.work_key} if level == "public" else {})


def test_a_run_with_a_certificate_publishes_signed_videos(tmp_path: Path):
    files = make_files(tmp_path)
    config = configure(tmp_path, c2pa_certificate=str(files.certificate), c2pa_key=str(files.key))
    with FakeAnimator(DEMO) as animator:
        assert run_local(config, animator=animator).progress.num_succeeded == 1
    (row,) = read_results(config.output).to_pylist()
    content = Path(row["video_uri"]).read_bytes()
    assert b"c2pa.created" in content
    assert hashlib.sha256(content).hexdigest() == row["sha256"]
    assert ledger.verify(config.output, deep=True).ok


def test_a_run_whose_key_does_not_fit_begins_nothing(tmp_path: Path):
    files, other = make_files(tmp_path), make_files(tmp_path / "other")
    config = configure(tmp_path, c2pa_certificate=str(files.certificate), c2pa_key=str(other.key))
    with FakeAnimator(DEMO) as animator, pytest.raises(ConfigError, match="does not fit"):
        run_local(config, animator=animator)
    with pytest.raises(ConfigError, match="does not fit"):
        list(validate(config, fetch=False))
    assert not Path(config.output).exists()


@pytest.mark.parametrize(("safety", "expected"), [("flag", ("succeeded", None)), ("fail", ("failed", False))])
def test_a_video_that_is_not_safe_is_flagged_or_fails_for_good(
    tmp_path: Path, safety: str, expected: tuple[str, bool | None]
):
    checker = tmp_path / "checker"
    checker.mkdir()
    model = DEMO.model_copy(update={"safety_checker": str(checker)})
    manifest = tmp_path / "rows.csv"
    picture = tmp_path / "picture.png"
    picture.write_bytes(draw_picture((64, 48), seed=1))
    manifest.write_text(f"id,image,prompt\na,{picture},a cat\nb,{picture},a nsfw cat\n")
    config = configure(tmp_path, manifest=str(manifest), model=model, safety=safety)
    with FakeAnimator(model) as animator:
        run_local(config, animator=animator)
    good, bad = read_results(config.output).to_pylist()
    assert (good["status"], good["nsfw"], good["flags"]) == ("succeeded", False, None)
    assert (bad["status"], bad["retryable"]) == expected
    if safety == "flag":
        assert (bad["nsfw"], bad["flags"]) == (True, "nsfw")
    else:
        assert (bad["error_code"], bad["video_uri"]) == ("content_policy_violation", None)


def test_a_check_without_weights_for_it_is_refused_before_anything_begins(tmp_path: Path):
    with pytest.raises(ConfigError, match="safety: flag needs safety_checker in the settings of model demo"):
        configure(tmp_path, safety="flag")
