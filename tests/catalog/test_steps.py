"""The steps of one row by themselves: what is encoded can wait, and be committed more than once."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pia_ray import ledger, manifest, read_results, storage
from pia_ray.catalog import steps
from pia_ray.catalog.local import run_local
from pia_ray.catalog.validate import validate
from pia_ray.config.catalog import CatalogConfig
from pia_ray.config.model import build
from pia_ray.errors import ConfigError
from pia_ray.media.video import probe
from pia_ray.testing import FakeAnimator, draw_picture, make_catalog
from pia_ray.types import ManifestRow
from tests.certificates import make_files
from tests.models import DEMO


def configure(folder: Path, **settings: Any) -> CatalogConfig:
    folder.mkdir(exist_ok=True)
    values = {"manifest": str(make_catalog(folder, rows=1)), "output": str(folder / "out"), "model": DEMO}
    return build(CatalogConfig, {**values, **settings})


def plan(folder: Path, **settings: Any) -> tuple[ManifestRow, CatalogConfig]:
    config = configure(folder, **settings)
    opened = manifest.open_manifest(config)
    (table,) = manifest.plan(opened, config, model_version="demo@1")
    return manifest.row_from_item(table.to_pylist()[0]), config


@pytest.fixture
def planned(tmp_path: Path) -> tuple[ManifestRow, CatalogConfig]:
    """One row of a catalogue, and the config of its run."""
    return plan(tmp_path)


def encode(row: ManifestRow, config: CatalogConfig) -> steps.Outputs:
    fetched = steps.fetch(row, config)
    with FakeAnimator(DEMO) as animator:
        animation = animator.submit(steps.request_of(row, fetched, deadline_s=None)).result()
    made = steps.encode_outputs(animation, row, fetched=fetched, config=config, run_id="r", attempts=1)
    assert isinstance(made, steps.Outputs)
    return made


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


FINISHED = {"fps": 8, "num_frames": 4, "playback_fps": 24, "repeat": 2, "aspect": "9:16", "fit": "pad", "poster": "jpg"}


@pytest.mark.parametrize("ext", ["mp4", "gif", "webp", "webm"])
def test_the_result_of_a_finished_video_tells_of_its_file_and_the_params_of_what_was_asked(tmp_path: Path, ext: str):
    row, config = plan(tmp_path, format=ext, defaults=FINISHED)
    result = steps.commit(encode(row, config), attempts=1)
    assert result.video_uri is not None
    facts = probe(storage.read_bytes(result.video_uri))
    assert (result.width, result.height, result.num_frames) == (facts.width, facts.height, facts.num_frames)
    assert result.num_frames == 24
    assert (result.fps, result.duration_s) == (24, 1.0)
    assert result.height == 2 * round(result.width * 16 / 9 / 2)
    asked = json.loads(result.params)
    assert (asked["num_frames"], asked["fps"], asked["playback_fps"], asked["width"]) == (4, 8, 24, result.width)


def test_a_poster_has_the_size_of_the_video_and_comes_back_with_an_adopted_one(tmp_path: Path):
    row, config = plan(tmp_path, defaults=FINISHED)
    result = steps.commit(encode(row, config), attempts=1)
    assert result.poster_uri is not None
    with Image.open(io.BytesIO(storage.read_bytes(result.poster_uri))) as poster:
        assert (poster.format, poster.size) == ("JPEG", (result.width, result.height))
    adopted = steps.committed(row, config)
    assert adopted is not None
    assert adopted.poster_uri == result.poster_uri


def test_a_video_is_judged_on_its_generated_frames_whatever_its_finishing(tmp_path: Path):
    plain, finished = (
        encode(*plan(tmp_path / name, defaults={"fps": 8, "num_frames": 4, "seed": 5, **more})).result
        for name, more in (("plain", {}), ("finished", {"playback_fps": 24, "repeat_mode": "there-and-back"}))
    )
    assert finished.num_frames == 18
    assert (finished.flicker, finished.likeness, finished.stillness) == (
        plain.flicker,
        plain.likeness,
        plain.stillness,
    )


def test_a_poster_that_was_deleted_is_a_missing_picture_and_a_rebuilt_row_names_the_one_that_is_there(tmp_path: Path):
    row, config = plan(tmp_path, defaults=FINISHED)
    result = steps.commit(encode(row, config), attempts=1)
    assert result.poster_uri is not None
    assert ledger.rebuild(config.output).num_restored == 1
    (found,) = ledger.read_results(config.output).to_pylist()
    assert found["poster_uri"] == result.poster_uri
    assert ledger.verify(config.output).num_missing_thumbnails == 0
    storage.delete(result.poster_uri)
    assert ledger.verify(config.output).num_missing_thumbnails == 1


def test_a_take_that_is_not_published_is_judged_and_not_encoded(tmp_path: Path):
    row, config = plan(tmp_path, defaults=FINISHED)
    fetched = steps.fetch(row, config)
    with FakeAnimator(DEMO) as animator:
        animation = animator.submit(steps.request_of(row, fetched, deadline_s=None)).result()
    made = steps.encode_outputs(
        animation, row, fetched=fetched, config=config, run_id="r", attempts=1, publishes=lambda result: False
    )
    assert not isinstance(made, steps.Outputs)
    assert made.likeness is not None
    assert (made.width, made.height, made.num_frames, made.size_bytes) == (64, 114, 24, None)
