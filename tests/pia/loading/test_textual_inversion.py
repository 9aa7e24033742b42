"""Textual inversions: the frames of diffusers, in both prompts and both layouts, and what is refused."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from pia_ray.animation import Animation
from pia_ray.config.knobs import AnimationParams
from pia_ray.config.model import ModelConfig
from pia_ray.errors import WeightsError
from pia_ray.pia.animator import Animator
from pia_ray.pia.loading.load import assemble
from pia_ray.pia.loading.lora import read_lora
from pia_ray.pia.loading.textual_inversion import divide, with_inversions
from pia_ray.testing import make_lora, make_pipeline_folder, make_textual_inversion
from pia_ray.types import AnimationRequest
from pia_ray.weights import resolve

KNOBS: dict[str, Any] = {
    "prompt": "a <thing> in the sea",
    "negative_prompt": "ugly, bad-art",
    "seed": 5,
    "num_frames": 4,
    "num_inference_steps": 3,
    "guidance_scale": 3.0,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pipeline_folder(tmp_path_factory.mktemp("tiny") / "pipeline", vae_factor=4)


@pytest.fixture(scope="module")
def files(folder: Path) -> dict[str, Path]:
    root = folder.parent
    return {
        "<thing>": make_textual_inversion(root / "thing.safetensors", seed=1),
        "bad-art": make_textual_inversion(root / "art.safetensors", seed=2, num_vectors=3, layout="a1111"),
    }


def model_of(folder: Path, files: dict[str, Path], **settings: Any) -> ModelConfig:
    paths = {token: str(path) for token, path in files.items()}
    sizes: dict[str, Any] = {"device": "cpu", "long_edge": 32, "size_step": 16}
    return ModelConfig(name="tiny", base=str(folder), textual_inversions=paths, **sizes, **settings)


def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(3).integers(0, 256, (32, 32, 3), dtype=np.uint8))


def frames(animator: Animator, **knobs: Any) -> np.ndarray:
    (animation,) = animator.animate([AnimationRequest(picture(), AnimationParams(**{**KNOBS, **knobs}))])
    assert isinstance(animation, Animation), animation
    return animation.frames


def test_frames_with_textual_inversions_in_both_prompts_equal_those_of_diffusers(
    folder: Path, files: dict[str, Path]
) -> None:
    from diffusers import DDIMScheduler, PIAPipeline

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the pipeline is deprecated upstream, its arithmetic is not
        pipe = PIAPipeline.from_pretrained(folder)
        pipe.set_progress_bar_config(disable=True)
        betas = {"beta_schedule": "linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False}
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, **betas)
        for token, path in files.items():
            pipe.load_textual_inversion(str(path.parent), weight_name=path.name, token=token)
        knobs = {name: value for name, value in KNOBS.items() if name != "seed"}
        generator = torch.Generator("cpu").manual_seed(5)
        result = pipe(image=picture(), width=32, height=32, generator=generator, output_type="np", **knobs)
    expected = (result.frames[0] * 255).round().astype(int)
    with Animator(model_of(folder, files)) as animator:
        ours = frames(animator)
        assert np.abs(ours - expected).max() <= 1
        np.testing.assert_array_equal(frames(animator, negative_prompt="ugly, BAD-ART"), ours)
    with Animator(model_of(folder, {})) as animator:
        assert np.abs(frames(animator) - expected).mean() > 0.5


def test_words_are_found_in_any_case_whatever_their_letters_look_like() -> None:
    words = {"Mystyle": (1, 2), "mystyle-2": (3,), "kiss": (4,)}
    assert list(divide("a MYSTYLE-2, my\u017ftyle and \u212aISS, mystyles", words)) == [
        *("a ", (3,), ", ", (1, 2), " and ", (4,), ", mystyles")
    ]


def test_a_lora_and_a_textual_inversion_work_together(folder: Path, files: dict[str, Path], tmp_path: Path) -> None:
    lora = make_lora(tmp_path / "lora.safetensors", folder, parts=("text_encoder",))
    model = model_of(folder, files, loras={"pixar": {"path": str(lora), "weight": 0}})
    with Animator(model) as animator:
        plain, with_lora = frames(animator), frames(animator, lora="pixar")
        np.testing.assert_array_equal(frames(animator), plain)
    assert np.abs(plain.astype(int) - with_lora).mean() > 0.5


def test_new_words_leave_the_model_they_were_added_to_as_it_was(folder: Path, files: dict[str, Path]) -> None:
    model = model_of(folder, {})
    plain = assemble(resolve(model), model)
    words = plain.text_encoder.get_input_embeddings().weight
    before, size = words.clone(), len(plain.tokenizer)
    more = with_inversions(plain, files)
    assert torch.equal(words, before)
    assert len(plain.tokenizer) == size
    assert sorted({token for ids in more.inversions.values() for token in ids}) == [size, size + 1, size + 2, size + 3]
    shared = dict(more.text_encoder.named_parameters())
    for name, tensor in plain.text_encoder.named_parameters():
        assert (shared[name].data_ptr() == tensor.data_ptr()) == ("token_embedding" not in name), name


def test_what_is_no_textual_inversion_for_this_model_is_refused_by_file(
    folder: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    def refusal(token: str, path: Path) -> str:
        model = model_of(folder, {token: path})
        with pytest.raises(WeightsError) as caught:
            assemble(resolve(model), model)
        assert str(path) in caught.value.message
        return caught.value.message

    other = tmp_path / "other.safetensors"
    save_file({"clip_l": torch.zeros(1, 32), "clip_g": torch.zeros(1, 64)}, other)
    assert "is not a textual inversion of Stable Diffusion 1.5" in refusal("x", other)
    for damaged in (torch.zeros(0, 32), torch.full((1, 32), torch.inf)):
        save_file({"x": damaged}, other)
        assert "is damaged" in refusal("x", other)
    assert "64 numbers" in refusal("x", make_textual_inversion(other, width=64))
    assert "already a token" in refusal("a", files["<thing>"])


def test_inversions_in_a_loras_file_are_words_of_the_model(
    folder: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    lora, vectors = load_file(make_lora(tmp_path / "plain.safetensors", folder)), torch.randn(2, 32)
    for key in ("string_to_param.*", "emb_params"):
        save_file({**lora, f"bundle_emb.charm.{key}": vectors}, tmp_path / "both.safetensors")
        model = model_of(folder, files, loras={"x": {"path": str(tmp_path / "both.safetensors"), "weight": 0}})
        parts = assemble(resolve(model), model)
        assert set(parts.inversions) > {"charm", "charm_1", "<thing>"}
        words = parts.text_encoder.get_input_embeddings().weight
        assert torch.equal(words[list(parts.inversions["charm"])], vectors)
        assert not read_lora(tmp_path / "both.safetensors", parts).unread
    own = model_of(folder, {"charm": files["<thing>"]}, loras={"x": str(tmp_path / "both.safetensors")})
    assert len(assemble(resolve(own), own).inversions["charm"]) == 1, "the model's own word goes before"


def test_a_pickled_textual_inversion_is_read_where_that_is_allowed(
    folder: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    vectors = load_file(files["bad-art"])["emb_params"]
    torch.save({"string_to_param": {"*": vectors}, "name": "art", "step": 500}, tmp_path / "art.pt")
    allowed = model_of(folder, {"bad-art": tmp_path / "art.pt"}, allow_pickle=True)
    parts = assemble(resolve(allowed), allowed)
    (token_id,) = parts.inversions["bad-art_2"]
    assert torch.equal(parts.text_encoder.get_input_embeddings().weight[token_id], vectors[2])
