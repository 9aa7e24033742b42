"""The safety checker on a tiny random checkpoint in the layout of CompVis/stable-diffusion-safety-checker."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from pia_ray import Animator, ModelConfig
from pia_ray.errors import WeightsError
from pia_ray.pia.safety_checker import read_safety_checker
from pia_ray.testing import make_pipeline_folder, make_scorer
from tests.safety_checkers import ALWAYS, NEVER, SIDE, make_checker

CPU = torch.device("cpu")


def frames(num: int = 4, height: int = SIDE, width: int = SIDE) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(1).integers(0, 255, (num, height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize(("threshold", "verdict"), [(NEVER, False), (ALWAYS, True)])
@pytest.mark.parametrize("size", [(32, 32), (48, 64), (96, 32), (20, 70)])
def test_the_thresholds_of_the_concepts_decide(tmp_path: Path, threshold: float, verdict: bool, size) -> None:
    checker = read_safety_checker(make_checker(tmp_path, concepts=threshold), CPU)
    assert checker.is_unsafe(frames(20, *size)) is verdict


def test_each_verdict_is_that_of_diffusers(tmp_path: Path) -> None:
    folder = make_checker(tmp_path)
    checker, theirs = read_safety_checker(folder, CPU), StableDiffusionSafetyChecker.from_pretrained(folder)
    processor = CLIPImageProcessorPil.from_pretrained(folder)
    seen, expected = [], []
    for threshold in (0.3, 0.4, 0.5, 0.6):
        for special in (NEVER, ALWAYS):
            for model in (checker.model, theirs):
                model.concept_embeds_weights.data.fill_(threshold)
                model.special_care_embeds_weights.data.fill_(special)
            for frame in frames(6):
                seen.append(checker.is_unsafe(frame[None]))
                pixels = processor(Image.fromarray(frame.numpy()), return_tensors="pt").pixel_values
                expected.append(bool(theirs(pixels, [np.zeros(1)])[1][0]))
    assert seen == expected
    assert set(expected) == {True, False}


def test_what_stands_at_the_edge_of_a_wide_frame_is_seen(tmp_path: Path) -> None:
    checker = read_safety_checker(make_checker(tmp_path), CPU)
    patch = frames(1)
    inner = ((patch.permute(0, 3, 1, 2) / 255) - checker.mean) / checker.std
    with torch.inference_mode():
        embed = checker.model.visual_projection(checker.model.vision_model(inner)[1])
        checker.model.concept_embeds[0] = embed[0]
    checker.model.concept_embeds_weights[0] = 0.999
    wide = torch.zeros(1, SIDE, 3 * SIDE, 3, dtype=torch.uint8)
    assert not checker.is_unsafe(wide)
    for start in (0, SIDE, 2 * SIDE):
        shown = wide.clone()
        shown[:, :, start : start + SIDE] = patch
        assert checker.is_unsafe(shown)


def test_another_model_in_its_place_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="is not a safety checker"):
        read_safety_checker(make_scorer(tmp_path / "clip"), CPU)
    with pytest.raises(WeightsError, match="cannot load the safety checker"):
        read_safety_checker(tmp_path, CPU)


def test_a_folder_without_the_weights_is_named(tmp_path: Path) -> None:
    folder = make_checker(tmp_path / "checker")
    (folder / "model.safetensors").unlink()
    base = make_pipeline_folder(tmp_path / "model", vae_factor=4)
    with pytest.raises(WeightsError, match="checker"):
        Animator(ModelConfig(base=str(base), device="cpu", safety_checker=str(folder)))
