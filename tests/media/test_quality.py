"""Suspicious videos are found, recorded, counted and shown; innocent ones are left alone."""

from __future__ import annotations

import dataclasses
from concurrent.futures import Future
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pia_ray import Animation, AnimationRequest, ModelConfig, ledger, read_results, storage
from pia_ray.animation import OnStep
from pia_ray.catalog.local import run_local
from pia_ray.config.catalog import CatalogConfig
from pia_ray.config.model import build
from pia_ray.media.quality import flags_of
from pia_ray.testing import FakeAnimator, draw_picture

GREY = Image.new("RGB", (48, 32), (90, 100, 110))
DARK = Image.new("RGB", (48, 32), (2, 2, 3))


def frames(*levels: float, noise: float = 0.0) -> np.ndarray:
    drawn = np.random.default_rng(0).normal(0, noise or 1e-9, (len(levels), 32, 48, 3))
    return (np.array(levels)[:, None, None, None] + drawn).round().clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize(
    ("made", "picture", "flags"),
    [
        (frames(100, 100, 100, noise=20), GREY, ()),
        (frames(100, 100, 100), GREY, ("frozen",)),
        (frames(100), GREY, ()),
        (frames(0), GREY, ("black_frames",)),
        (frames(100, 0, 50), GREY, ("black_frames",)),
        (frames(0, 0, 0), GREY, ("black_frames", "frozen")),
        (frames(2, 2, 2), DARK, ("frozen",)),
        (frames(100, 101, 102), GREY, ()),
    ],
    ids=[
        "moving",
        "frozen",
        "one frame",
        "one black frame",
        "black in the middle",
        "all black",
        "dark picture",
        "slow",
    ],
)
def test_black_frames_and_frozen_videos_are_told_from_others(made: Any, picture: Image.Image, flags: Any) -> None:
    assert flags_of(made, picture) == flags


def test_a_still_of_rounding_noise_is_frozen_and_the_smallest_real_motion_is_not() -> None:
    still = np.full((4, 32, 48, 3), 120, np.uint8)
    still[1:, ::3] += 1  # a third of the pixels, by one level
    assert flags_of(still, GREY) == ("frozen",)
    moving = np.full((4, 32, 48, 3), 120, np.uint8)
    moving[1:, :8, :8] = 200  # a spot in the corner
    assert flags_of(moving, GREY) == ()


class SuspiciousAnimator(FakeAnimator):
    """Makes frozen or black videos where the prompt says so."""

    def submit(
        self, request: AnimationRequest, *, alone: bool = False, on_step: OnStep | None = None, **how: Any
    ) -> Future[Animation]:
        made: Animation = super().submit(request, alone=alone, on_step=on_step, **how).result()
        if "frozen" in request.params.prompt:
            made = dataclasses.replace(made, frames=np.repeat(made.frames[:1], len(made.frames), axis=0))
        if "black" in request.params.prompt:
            made = dataclasses.replace(made, frames=made.frames * 0)
        future: Future[Animation] = Future()
        future.set_result(made)
        return future


def test_what_was_not_used_of_a_picture_is_in_the_flags_of_its_row(tmp_path: Path) -> None:
    first, second = (Image.open(BytesIO(draw_picture((64, 48), seed=seed))).convert("RGB") for seed in (0, 1))
    first.save(tmp_path / "a.gif", save_all=True, append_images=[second])
    first.save(tmp_path / "b.png", icc_profile=b"no profile")
    (tmp_path / "c.png").write_bytes(draw_picture((64, 48), seed=0))
    (tmp_path / "m.csv").write_text("id,image,prompt\na,a.gif,waves\nb,b.png,frozen\nc,c.png,waves\n")
    output = str(tmp_path / "out")
    config = build(CatalogConfig, {"manifest": str(tmp_path / "m.csv"), "output": output, "model": "demo"})
    with SuspiciousAnimator(ModelConfig.named("demo"), batch_size=2) as animator:
        run_local(config, animator=animator)
    assert read_results(output)["flags"].to_pylist() == ["animated_input", "frozen,icc_ignored", None]


def test_flags_are_in_the_results_the_report_the_gallery_and_a_rebuilt_ledger(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(draw_picture((64, 48), seed=0))
    prompts = ["waves", "frozen", "black and frozen"]
    rows = [{"id": str(n), "image": "a.png", "prompt": prompt} for n, prompt in enumerate(prompts)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "m.parquet")
    output = tmp_path / "out"
    config = build(CatalogConfig, {"manifest": str(tmp_path / "m.parquet"), "output": str(output), "model": "demo"})
    with SuspiciousAnimator(ModelConfig.named("demo"), batch_size=2) as animator:
        run_local(config, animator=animator)
    expected = [None, "frozen", "black_frames,frozen"]
    assert read_results(str(output))["flags"].to_pylist() == expected
    assert read_results(str(output)).schema.names == ledger.RESULTS_SCHEMA.names
    with ledger.Ledger.open(str(output)) as opened:
        assert dict(ledger.summary(opened).flags) == {"frozen": 2, "black_frames": 1}
    assert "black_frames,frozen" in (output / "index.html").read_text()
    for part in storage.list_objects(str(output / "_ledger" / "parts")):
        Path(part.uri).unlink()
    (output / "results.parquet").unlink()
    assert ledger.rebuild(str(output)).num_restored == 3
    assert read_results(str(output))["flags"].to_pylist() == expected
