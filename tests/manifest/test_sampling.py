"""A sample of a manifest: spread over all rows, the same each time, and part of the whole run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pia_ray import manifest
from pia_ray.catalog.local import run_local
from pia_ray.config.catalog import CatalogConfig
from pia_ray.config.model import ModelConfig, build
from pia_ray.errors import ConfigError, ManifestError
from pia_ray.manifest import open_manifest
from pia_ray.testing import FakeAnimator, draw_picture


def config_of(source: Path, **settings: Any) -> CatalogConfig:
    output = str(source.parent / "out")
    return build(CatalogConfig, {"manifest": str(source), "output": output, "model": "demo", **settings})


def items_of(source: Path, **settings: Any) -> list[dict[str, Any]]:
    config = config_of(source, **settings)
    tables = manifest.plan(open_manifest(config), config, model_version="v1")
    return [item for table in tables for item in table.to_pylist()]


def write_rows(path: Path, num_rows: int) -> Path:
    rows = "".join(f"r{number},a.png,p,s{number}\n" for number in range(num_rows))
    path.write_text(f"id,image,prompt,sku\n{rows}bad,,p,s\n")
    return path


def test_a_sample_is_drawn_from_all_rows_and_a_larger_one_holds_it(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "m.csv", 60_000)  # more than one table
    every = {item["id"]: item for item in items_of(path)}
    sample = items_of(path, sample=40)
    assert len(sample) == 40
    assert all(item == every[item["id"]] for item in sample)
    numbers = [int(item["id"][1:]) for item in sample]
    assert numbers == sorted(numbers)
    assert sum(number < 30_000 for number in numbers) in range(10, 31)
    larger = items_of(path, sample=60)
    assert all(item in larger for item in sample)


def test_a_sample_beyond_the_rows_is_all_valid_ones(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "m.csv", 3)
    assert [item["id"] for item in items_of(path, sample=99)] == ["r0", "r1", "r2"]
    with pytest.raises(ConfigError):
        config_of(path, sample=0)


def test_ids_that_occur_twice_are_refused_in_a_sample_too(tmp_path: Path) -> None:
    path = tmp_path / "m.csv"
    path.write_text("id,image,prompt\n" + "a,a.png,p\n" * 2 + "b,a.png,p\n")
    with pytest.raises(ManifestError, match=r"occurs? more than once"):
        items_of(path, sample=1)


def test_the_whole_run_finds_the_sample_done(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(draw_picture((64, 48), seed=1))
    path = write_rows(tmp_path / "m.csv", 12)
    animator = FakeAnimator(ModelConfig.named("demo"))
    first = run_local(config_of(path, sample=3), animator=animator)
    assert (first.progress.num_items, first.progress.num_succeeded) == (3, 3)
    assert run_local(config_of(path, sample=3), animator=animator).progress.num_before == 3
    whole = run_local(config_of(path), animator=animator)
    assert (whole.progress.num_before, whole.progress.num_succeeded, whole.progress.num_rejected) == (3, 9, 1)
