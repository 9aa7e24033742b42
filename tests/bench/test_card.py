"""The benchmark's card: what it says moved, and the whole of it once through the command line."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from pia_ray.bench.benchmark import settings_here
from pia_ray.bench.card import BenchSettings, Card, Timing, differences, text_of
from tests.cli.test_commands import pia

__all__ = ["pia"]  # fixture

OURS = "pia-ray, 1 row in flight"
RATIO = f"{OURS} against diffusers, resident"


def card(*, ours_s: float = 1.0, ratio: float = 1.5, spread: float = 0.02, gpu: str = "") -> Card:
    return Card(
        machine={"kind": "some-machine", "gpu": gpu},
        settings=asdict(BenchSettings()),
        ways={OURS: Timing(ours_s, ours_s * (1 - spread), ours_s * (1 + spread))},
        ratios={RATIO: ratio},
        stages={"denoise": 0.9},
        useful_tflop_per_s=1.0,
        matmul_tflop_per_s=2.0,
        share_of_matmul=0.5,
        peak_bytes={OURS: 2**30},
        step_tflop=0.5,
        decode_tflop=0.1,
    )


def earlier(found: Card) -> dict[str, Any]:
    return dict(json.loads(found.to_json()))


def test_a_ratio_that_moved_by_more_than_the_spread_is_told() -> None:
    lines = differences(card(ratio=1.2), earlier(card(ratio=1.5)))
    assert lines == [f"ratio {RATIO}: 1.5 -> 1.2 (-20%)"]


def test_what_moved_within_the_spread_of_either_run_is_not_told() -> None:
    (line,) = differences(card(ratio=1.2, spread=0.3), earlier(card(ratio=1.5)))
    assert line.startswith("nothing moved by more than 30%")
    (line,) = differences(card(ratio=1.2), earlier(card(ratio=1.5, spread=0.3)))
    assert line.startswith("nothing moved")


def test_seconds_are_compared_on_gpus_only() -> None:
    slower, before = card(ours_s=2.0), card(ours_s=1.0)
    assert "nothing moved" in differences(slower, earlier(before))[0]
    (line,) = differences(replace(slower, machine={"kind": "g", "gpu": "some GPU"}), earlier(before))
    assert line == f"seconds {OURS}: 1 -> 2 (+100%)"


def test_the_card_names_every_way_and_every_ratio() -> None:
    extra = {"attention": {"32 x 8 x 4096 x 40 float16": "CUDNN_ATTENTION"}, "cpu_ratios": {RATIO: 1.75}}
    text = text_of(replace(card(), extra=extra))
    assert "self-attention of 32 x 8 x 4096 x 40 float16: CUDNN_ATTENTION" in text
    assert OURS in text
    assert f"{RATIO}: 1.50 x, 1.75 x by CPU s" in text


def test_a_card_without_memory_of_ways_has_no_line_for_it() -> None:
    assert "peak memory" in text_of(card())
    assert "peak memory" not in text_of(replace(card(), peak_bytes={}))


def test_the_full_size_on_a_cpu_makes_one_small_row_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    settings = settings_here(size="full", steps=None, side=None)
    assert (settings.side, settings.steps, settings.batches) == (128, 2, (1,))
    assert settings_here(size="full", steps=4, side=256, batches=(2,)).side == 256
    assert settings_here(size="demo", steps=None, side=None).batches == (1, 2, 4, 8)


@pytest.mark.heavy
@pytest.mark.usefixtures("pia")  # puts back what commands set for their process
def test_the_command_and_its_job_print_a_card_and_one_json_line_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--size", "demo", "--steps", "1", "--frames", "2", "--rounds", "1", "--batches", "1,2"]
    flags += ["--offload", "model", "--json", str(tmp_path / "card.json")]
    job = Path(__file__).parents[2] / "jobs" / "benchmark.py"  # the command with these words
    monkeypatch.setattr(sys, "argv", [str(job), *flags])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(job), run_name="__main__")
    assert ended.value.code == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found == json.loads((tmp_path / "card.json").read_text("utf-8"))
    assert set(found["ways"]) == {
        "documented example, verbatim",
        "diffusers, resident",
        OURS,
        "pia-ray, 2 rows in flight",
        "pia-ray, offload model, 1 row",
    }
    assert "pia-ray, offload model, 1 row against diffusers, resident" in found["ratios"]
    assert set(found["stages"]) == {"text", "encode", "denoise", "decode", "transfer", "video encode"}
    assert all(value > 0 for value in found["ratios"].values())
    assert found["step_tflop"] > 0
    assert found["machine"]["gpu"] or not found["peak_bytes"]


@pytest.mark.heavy
def test_the_command_keeps_what_libraries_tell_developers_off_the_screen() -> None:
    program = """
from pia_ray.bench.libraries import silence_libraries
silence_libraries()
import pia_ray.bench.reference
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stderr == ""
