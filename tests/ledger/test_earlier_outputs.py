"""What an earlier version planned and left behind stays valid: work keys, and an output that is done."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from pia_ray import CatalogConfig, manifest, read_results
from pia_ray.catalog.local import run_local
from pia_ray.config.catalog import load
from pia_ray.config.model import build
from pia_ray.ledger import rebuild
from pia_ray.testing import FakeAnimator

STORED = Path(__file__).parents[1] / "data" / "output-0.1.0"
"""Planned, animated with `FakeAnimator` and stored by version 0.1.0 (commit 231700f). Never to be made anew."""


@pytest.fixture
def stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the stored catalogue, elsewhere than where it was made; the working directory."""
    folder = tmp_path / "elsewhere"
    shutil.copytree(STORED, folder)
    monkeypatch.chdir(folder)
    return folder


def test_ten_fixed_rows_have_the_keys_that_they_had(stored: Path) -> None:
    settings = {"name": "m", "base": "model", "defaults": {"num_inference_steps": 8, "guidance_scale": 2}}
    values = {"manifest": "keys.jsonl", "output": "nowhere", "model": settings, "format": "webm"}
    config = build(CatalogConfig, {**values, "defaults": {"fps": 10}})
    opened = manifest.open_manifest(config)
    planned = manifest.plan(opened, config, model_version="m@0123456789ab", style_versions={})
    rows = [[row["id"], row["video_index"], row["work_key"]] for table in planned for row in table.to_pylist()]
    assert rows == json.loads((stored / "keys.json").read_text())


def test_an_output_of_an_earlier_version_has_nothing_to_do(stored: Path) -> None:
    config = load("run.yaml", {})
    before = {path: path.read_bytes() for path in (stored / "output" / "videos").rglob("*.mp4")}
    table = read_results("output")
    with FakeAnimator(config.model) as animator:
        summary = run_local(config, animator=animator)
    progress = summary.progress
    assert (progress.num_items, progress.num_before, progress.num_pending) == (7, 5, 0)
    assert (progress.num_failed_before, progress.num_rejected) == (1, 1)
    assert {path: path.read_bytes() for path in (stored / "output" / "videos").rglob("*.mp4")} == before
    again = read_results("output")
    assert again.select(table.column_names).equals(table)


def test_the_videos_of_an_earlier_version_restore_their_rows(stored: Path) -> None:
    succeeded = [row["work_key"] for row in read_results("output").to_pylist() if row["status"] == "succeeded"]
    shutil.rmtree(stored / "output" / "_ledger" / "parts")
    rebuild("output")
    assert [row["work_key"] for row in read_results("output").to_pylist() if row["status"] == "succeeded"] == succeeded
