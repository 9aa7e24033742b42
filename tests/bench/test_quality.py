"""The quality card: PSNR and SSIM as defined, and presets of the bundled model within their bounds."""

from __future__ import annotations

import json

import numpy as np
import pytest

from pia_ray.bench.quality import MOST_ROWS, QualitySettings, quality, text_of
from pia_ray.bench.similarity import psnr, ssim
from pia_ray.config.model import ModelConfig
from pia_ray.errors import ConfigError


def test_psnr_is_of_the_mean_square_over_all_frames() -> None:
    frames = np.full((2, 9, 9, 3), 100, np.uint8)
    assert psnr(frames, frames) == float("inf")
    assert psnr(frames, frames + np.uint8(1)) == pytest.approx(48.1308, abs=1e-3)


def test_ssim_is_1_for_equal_videos_and_falls_with_noise() -> None:
    dice = np.random.default_rng(0)
    frames = dice.integers(0, 256, (2, 16, 20, 3), np.uint8)
    noisy = np.clip(frames + dice.normal(0, 8, frames.shape), 0, 255).astype(np.uint8)
    assert ssim(frames, frames) == pytest.approx(1.0)
    assert 0.9 < ssim(frames, noisy) < 0.999
    assert ssim(frames, dice.integers(0, 256, frames.shape, np.uint8)) < 0.2


def test_presets_of_the_bundled_model_are_within_their_bounds_and_better_than_fewer_steps() -> None:
    settings = QualitySettings(steps=(8,), rows=1, num_frames=2, side=32)
    card = quality(ModelConfig.named("demo"), settings)
    ways = {way.name: way for way in card.ways[8]}
    exact, balanced, fast = (ways[f"preset {preset}"] for preset in ("exact", "balanced", "fast"))
    assert (exact.evaluations, balanced.evaluations, fast.evaluations) == (8, 5, 4)
    assert (exact.psnr_db, exact.least_ssim) == (None, pytest.approx(1.0))
    assert balanced.least_psnr_db is not None
    assert balanced.least_psnr_db >= 45
    assert balanced.least_ssim >= 0.99
    assert fast.least_psnr_db is not None
    assert fast.least_psnr_db >= 38
    for rival in ("ddim", "dpm++2m", "unipc"):
        same_cost = ways[f"{rival}, 5 steps"].least_psnr_db
        assert same_cost is not None
        assert balanced.least_psnr_db > same_cost
    assert "preset balanced" in text_of(card)
    assert json.loads(card.to_json())["ways"]["8"][1]["evaluations"] == 5


def test_rows_beyond_the_bundled_pictures_are_refused() -> None:
    with pytest.raises(ConfigError, match=f"at most {MOST_ROWS}"):
        quality(ModelConfig.named("demo"), QualitySettings(rows=MOST_ROWS + 1))
