"""The reference check on tiny checkpoints in the layouts that real ones have, run as its users run it."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import yaml

from pia_ray.testing import (
    draw_picture,
    make_ip_adapter,
    make_lora,
    make_pipeline_folder,
    make_single_file_checkpoint,
    make_split_checkpoint,
    make_textual_inversion,
)

pytestmark = pytest.mark.heavy

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
QUICK = ("--steps", "3", "--frames", "4", "--guidance-scale", "5")

Outcome = tuple[int, dict[str, Any], str]
"""Exit code, the JSON line, and all that was printed."""


@pytest.fixture(scope="module")
def program() -> Iterator[ModuleType]:
    sys.path.insert(0, str(BENCHMARKS))
    yield importlib.import_module("reference_check")
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture
def check(program: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Runs the program on a model of the given settings."""

    def run(*flags: str, **settings: Any) -> Outcome:
        code = program.main(arguments(tmp_path, *flags, **settings))
        printed = capsys.readouterr().out
        return code, json.loads(printed.splitlines()[-1]), printed

    return run


def arguments(folder: Path, *flags: str, **settings: Any) -> list[str]:
    path, picture = folder / "model.yaml", folder / "picture.png"
    shown = {name: str(value) if isinstance(value, Path) else value for name, value in settings.items()}
    path.write_text(yaml.safe_dump({"device": "cpu", "long_edge": 32, "size_step": 16, **shown}))
    picture.write_bytes(draw_picture((80, 64), seed=3))
    return ["--model", str(path), "--image", str(picture), *QUICK, *flags]


def assert_equal(outcome: tuple[int, dict[str, Any], str]) -> None:
    code, result, printed = outcome
    assert code == 0, printed
    assert result["verdict"] == "equal to a level of 255", printed
    assert len(result["psnr_db"]) == 4
    assert result["worst_psnr_db"] is None or result["worst_psnr_db"] > 48


def test_a_whole_pipeline_folder_gives_the_videos_of_diffusers(check: Any, tmp_path: Path) -> None:
    base, videos = make_pipeline_folder(tmp_path / "pipeline", vae_factor=4), tmp_path / "videos"
    outcome = check("--output", str(videos), base=base)
    assert_equal(outcome)
    assert {path.name for path in videos.iterdir()} == {"pia-ray.mp4", "diffusers.mp4"}
    assert "PSNR of frames  0.." in outcome[2]


def test_base_adapter_and_vae_in_folders_of_their_own_do(check: Any, tmp_path: Path) -> None:
    base, adapter, vae = make_split_checkpoint(tmp_path, vae_factor=4)
    assert_equal(check("--scheduler", "euler", base=base, motion_adapter=adapter, vae=vae))


def test_an_ip_adapter_file_does_with_and_without_a_picture(check: Any, tmp_path: Path) -> None:
    base, adapter, vae = make_split_checkpoint(tmp_path, vae_factor=4)
    path, encoder = make_ip_adapter(tmp_path / "ip-adapter", base, kind="plus")
    parts = {"base": base, "motion_adapter": adapter, "vae": vae, "ip_adapter": path, "image_encoder": encoder}
    look = tmp_path / "look.png"
    look.write_bytes(draw_picture((64, 90), seed=8))
    assert_equal(check("--ip-adapter-image", str(look), "--ip-adapter-scale", "0.7", **parts))
    assert_equal(check(**parts))


def test_base_and_vae_in_single_files_do(check: Any, tmp_path: Path) -> None:
    base, adapter, vae, config = make_single_file_checkpoint(tmp_path, vae_factor=4)
    assert_equal(check("--scheduler", "unipc", base=base, motion_adapter=adapter, vae=vae, config=config))


def test_a_kohya_lora_and_a_textual_inversion_do(check: Any, tmp_path: Path) -> None:
    base = make_pipeline_folder(tmp_path / "pipeline", vae_factor=4)
    lora = make_lora(tmp_path / "lora.safetensors", base, layout="kohya")
    token = make_textual_inversion(tmp_path / "token.safetensors", num_vectors=2)
    settings = {
        "loras": {"sketch": {"path": str(lora), "weight": 0.7}},
        "textual_inversions": {"<style>": {"path": str(token)}},
    }
    assert_equal(check("--prompt", "a cat in <style>", base=base, **settings))
    plain, changed = (check(base=base, **some)[1]["sha256"] for some in ({}, settings))
    assert plain != changed


def test_half_precision_counts_as_the_same_video(check: Any, tmp_path: Path) -> None:
    base = make_pipeline_folder(tmp_path / "pipeline", vae_factor=4)
    code, result, printed = check(base=base, dtype="float16")
    assert code == 0, printed
    assert result["dtype"] == "float16"


def test_another_video_counts_as_different_and_names_the_worst_frame(program: ModuleType) -> None:
    one = np.random.default_rng(0).integers(0, 200, (4, 16, 16, 3), dtype=np.uint8)
    other = one.copy()
    other[2] += 16
    found = program.compare(one, other, least_psnr=40.0)
    assert found["verdict"] == "different"
    assert found["psnr_db"] == [None, None, pytest.approx(24.05, abs=0.01), None]
    assert (found["worst_psnr_db"], found["most_levels"], found["mean_levels"]) == (found["psnr_db"][2], 16, 4.0)
    assert program.compare(one, other, least_psnr=20.0)["verdict"] == "same up to rounding"
    assert program.compare(one, one, least_psnr=40.0)["verdict"] == "equal to a level of 255"
