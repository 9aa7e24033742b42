"""`warm`, the sizes that workers and engines prepare for: their spelling, their bounds, their knobs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from pia_ray.config.catalog import CatalogConfig, load
from pia_ray.config.model import ModelConfig
from pia_ray.config.serve import ServeConfig, load_serve
from pia_ray.errors import ConfigError


def run_with(tmp_path: Path, warm: object, **more: object) -> CatalogConfig:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"manifest": "rows.csv", "output": "out", "model": "demo", "warm": warm, **more}))
    return load(path, {})


@pytest.mark.parametrize("warm", [["512x512x16", "512X768x16"], "512x512x16, 512x768x16"])
def test_sizes_are_a_list_or_a_text_with_commas(warm: object, tmp_path: Path) -> None:
    config = run_with(tmp_path, warm)
    assert [str(size) for size in config.warm] == ["512x512x16", "512x768x16"]
    assert CatalogConfig.model_validate(config.model_dump(mode="json")).warm == config.warm


@pytest.mark.parametrize(
    ("warm", "message"),
    [
        (["512x512"], '"512x512" is not a valid size: write WIDTHxHEIGHTxFRAMES, such as 512x512x16'),
        (["512x512x16@fast"], "is not a valid size"),
        (["500x512x16"], "500x512x16: width must be a multiple of 8"),
        (["4096x512x16"], "4096x512x16: width must be a whole number from 8 to 2048"),
        (["512x512x0"], "512x512x0: num_frames must be"),
        (7, "must be a list of sizes"),
        ([f"512x512x{frames}" for frames in range(1, 18)], "at most 16 sizes"),
    ],
)
def test_a_size_that_no_row_may_have_is_refused(warm: object, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        run_with(tmp_path, warm)
    with pytest.raises(ConfigError, match=message):
        load_serve(None, {"warm": warm})


@pytest.mark.parametrize("warm", ["2048x2048x16", "512x512x128"])
def test_an_endpoint_prepares_for_no_size_that_a_request_may_not_have(warm: str) -> None:
    with pytest.raises(ConfigError, match=f"warm: {warm} is more than a request may ask for"):
        load_serve(None, {"warm": warm})
    assert load_serve(None, {"warm": "512x512x64"}).warm == ((512, 512, 64),)


def test_rows_of_a_warm_up_have_the_guidance_of_the_run(tmp_path: Path) -> None:
    defaults: dict[str, Any] = {"guidance_scale": 1.0, "end_image": "end.png", "seed": 3}
    (params,) = run_with(tmp_path, ["64x64x16"], defaults=defaults).warm_params
    assert params.num_branches == 1
    assert params.end_image is None
    (plain,) = run_with(tmp_path, ["64x64x16"]).warm_params
    assert "guidance_scale" not in plain.model_fields_set, "the model's own default counts"


def test_settings_of_earlier_versions_have_no_sizes() -> None:
    assert ServeConfig(models={"demo": ModelConfig(name="demo", base="demo")}).warm == ()
