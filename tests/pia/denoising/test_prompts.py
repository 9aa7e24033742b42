"""Embeddings of prompts: long ones in chunks, A1111's weights, both sides of guidance of one length."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pia_ray.animation import Animation
from pia_ray.config.knobs import AnimationParams
from pia_ray.config.model import ModelConfig
from pia_ray.errors import BadParameter
from pia_ray.pia.animator import Animator
from pia_ray.pia.components import Components
from pia_ray.pia.denoising.conditions import Conditions
from pia_ray.pia.loading.load import assemble
from pia_ray.testing import make_pipeline_folder, make_textual_inversion
from pia_ray.types import AnimationRequest
from pia_ray.weights import resolve
from tests.config.test_prompt_syntax import published

LONG = "a red cat in the sea, " * 8


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    root = tmp_path_factory.mktemp("tiny")
    folder = make_pipeline_folder(root / "pipeline", vae_factor=4)
    words = {
        "art": str(make_textual_inversion(root / "art.safetensors", seed=1, num_vectors=3)),
        "art-nouveau": str(make_textual_inversion(root / "nouveau.safetensors", seed=2)),
        "<art>": str(make_textual_inversion(root / "angle.safetensors", seed=3)),
    }
    return ModelConfig(
        name="tiny", base=str(folder), device="cpu", long_edge=32, size_step=16, textual_inversions=words
    )


@pytest.fixture(scope="module")
def parts(model: ModelConfig) -> Components:
    return assemble(resolve(model), model)


def tokens_of(parts: Components, text: str) -> list[int]:
    return list(parts.tokenizer(text, add_special_tokens=False, verbose=False).input_ids)


@torch.inference_mode()
def encoded(parts: Components, tokens: list[int], weights: list[float] | None = None) -> torch.Tensor:
    """One chunk by hand: start, tokens, ends up to 77; the weights, and the mean as before."""
    bos, eos = parts.tokenizer.bos_token_id, parts.tokenizer.eos_token_id
    ids = [bos, *tokens, *[eos] * (76 - len(tokens))]
    embedding = parts.text_encoder(torch.tensor([ids])).last_hidden_state
    if weights is not None:
        mean = embedding.mean()
        factors = torch.tensor([1.0, *weights, *[1.0] * (76 - len(tokens))])
        embedding = embedding * factors[None, :, None]
        embedding = embedding * (mean / embedding.mean())
    return embedding[0]


def test_a_prompt_up_to_the_limit_is_one_pass_and_a_longer_one_several(parts: Components) -> None:
    conditions = Conditions(parts)
    word = tokens_of(parts, "red")
    assert len(word) == 1
    for count in (0, 1, 75):
        ours = conditions.prompt("red " * count, clip_skip=None)
        torch.testing.assert_close(ours, encoded(parts, word * count), rtol=0, atol=0)
    ours = conditions.prompt("red " * 160, clip_skip=None)
    expected = torch.cat([encoded(parts, word * count) for count in (75, 75, 10)])
    torch.testing.assert_close(ours, expected, rtol=0, atol=0)


def test_text_after_a_near_comma_goes_to_the_next_chunk_whole(parts: Components) -> None:
    red, cat, comma = (tokens_of(parts, text)[0] for text in ("red", "cat", ","))
    near = Conditions(parts).prompt("red " * 60 + "," + " cat" * 20, clip_skip=None)
    expected = [encoded(parts, [*[red] * 60, comma]), encoded(parts, [cat] * 20)]
    torch.testing.assert_close(near, torch.cat(expected), rtol=0, atol=0)
    far = Conditions(parts).prompt("red " * 40 + "," + " cat" * 40, clip_skip=None)
    expected = [encoded(parts, [*[red] * 40, comma, *[cat] * 34]), encoded(parts, [cat] * 6)]
    torch.testing.assert_close(far, torch.cat(expected), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("prompt", "chunks"),
    [
        ("a (red cat:1.3) [sea]", [[("a", 1), ("red cat", 1.3), ("sea", 1 / 1.1)]]),
        ("((waves)), a", [[("waves", 1.21), (", a", 1)]]),
        ("(red (cat:1.5):0.8) zoom", [[("red", 0.8), ("cat", 1.2), ("zoom", 1)]]),
        (r"a \(red\) cat", [[("a (red) cat", 1)]]),
        ("a cat BREAK (the sea:0.5)", [[("a cat", 1)], [("the sea", 0.5)]]),
        ("a cat BREAK", [[("a cat", 1)]]),
        ("BREAK a cat", [[], [("a cat", 1)]]),
        ("(cat:0) in the sea", [[("cat", 0), ("in the sea", 1)]]),
        ("(red", [[("red", 1.1)]]),
        ("pan left", [[("pan left", 1)]]),
    ],
)
def test_weighted_prompts_have_the_embeddings_of_a1111(
    parts: Components, prompt: str, chunks: list[list[tuple[str, float]]]
) -> None:
    expected = []
    for chunk in chunks:
        tokens = [(token, weight) for text, weight in chunk for token in tokens_of(parts, text)]
        expected.append(encoded(parts, [token for token, _ in tokens], [weight for _, weight in tokens]))
    ours = Conditions(parts).prompt(prompt, clip_skip=None, syntax="a1111")
    torch.testing.assert_close(ours, torch.cat(expected), rtol=1e-5, atol=1e-5)


def test_a_prompt_of_more_chunks_than_plain_text_can_have_is_refused_before_it_is_encoded(parts: Components) -> None:
    conditions = Conditions(parts)
    assert len(conditions.prompt("a BREAK " * 150, clip_skip=None, syntax="a1111")) == 150 * 77
    with pytest.raises(BadParameter, match=r"12,000 tokens at most, those of 'BREAK BREAK .*' 128,282:"):
        conditions.prompt("BREAK " * 1665 + "a", clip_skip=None, syntax="a1111")


AS_WRITTEN = (
    "masterpiece, best quality, 1girl, solo, (long hair:1.2), looking at viewer, (detailed eyes), [blurry background]",
    "RAW photo, (close up:1.3) portrait of a woman, 8k uhd, dslr, soft lighting, high quality, film grain, XT3",
    "(deformed iris, deformed pupils, semi-realistic, cgi, 3d, render, sketch, cartoon, drawing, anime:1.4), text, "
    "close up, cropped, out of frame, worst quality, low quality, jpeg artifacts, ugly, duplicate, morbid, mutilated",
    "((masterpiece)), (((best quality))), [[lowres]], (red sea",
    r"a cat \(animal\) in the sea BREAK a red sofa, BREAK (sunset:0.8)",
    "a red cat in the sea, " * 14,
    "photo of a lighthouse at dusk, 16:9, f/1.8, 35mm: waves (crashing:1.15), slow zoom in",
    "Ein Leuchtturm am Meer, sch\u00f6nes Licht, \u00e9t\u00e9, \u6d77",
    "cat,,  cat ,(cat),\n\n(sea :1.1), ",
    "<thing> (with <brackets>:0.9) & symbols #1 @home 100% -- v 5",
)


def a1111(parts: Components, prompt: str) -> torch.Tensor:
    """The embedding by the published code: its parser, its chunks with a backtrack of 20 tokens to a comma."""
    comma = tokens_of(parts, ",")[0]
    chunks: list[list[tuple[int, float]]] = []
    chunk: list[tuple[int, float]] = []
    last_comma = -1
    for text, weight in published(prompt):
        if (text, weight) == ("BREAK", -1):
            chunks, chunk, last_comma = [*chunks, chunk], [], -1
            continue
        for token in tokens_of(parts, text):
            if token == comma:
                last_comma = len(chunk)
            elif len(chunk) == 75 and last_comma != -1 and len(chunk) - last_comma <= 20:
                chunks, chunk, last_comma = [*chunks, chunk[: last_comma + 1]], chunk[last_comma + 1 :], -1
            if len(chunk) == 75:
                chunks, chunk, last_comma = [*chunks, chunk], [], -1
            chunk.append((token, weight))
    chunks += [chunk] if chunk or not chunks else []
    return torch.cat([encoded(parts, [token for token, _ in each], [weight for _, weight in each]) for each in chunks])


@pytest.mark.parametrize("prompt", AS_WRITTEN)
def test_prompts_as_people_write_them_have_the_embeddings_of_the_published_code(parts: Components, prompt: str) -> None:
    plain = replace(parts, inversions={})
    ours = Conditions(plain).prompt(prompt, clip_skip=None, syntax="a1111")
    torch.testing.assert_close(ours, a1111(plain, prompt), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("an artist in a cart", ["an artist in a cart"]),
        ("art", [0]),
        ("the ART, red", ["the", 0, ", red"]),
        ("art-nouveau", [1]),
        ("art_1 artist", [3, "artist"]),
        ("smart art", ["smart", 0]),
        ("a<art>s", ["a", 2, "s"]),
    ],
)
def test_textual_inversions_match_whole_words(parts: Components, prompt: str, words: list[str | int]) -> None:
    ids = [parts.inversions[word] for word in ("art", "art-nouveau", "<art>", "art_1")]
    tokens = [token for word in words for token in (tokens_of(parts, word) if isinstance(word, str) else ids[word])]
    ours = Conditions(parts).prompt(prompt, clip_skip=None)
    torch.testing.assert_close(ours, encoded(parts, tokens), rtol=0, atol=0)


def test_the_vectors_of_an_inversion_stay_in_one_chunk(parts: Components) -> None:
    (red,) = tokens_of(parts, "red")
    ours = Conditions(parts).prompt("red " * 74 + "art", clip_skip=None)
    expected = [encoded(parts, [red] * 74), encoded(parts, list(parts.inversions["art"]))]
    torch.testing.assert_close(ours, torch.cat(expected), rtol=0, atol=0)


def frames(animator: Animator, *, embeds: dict[str, Any] | None = None, **knobs: Any) -> np.ndarray[Any, Any]:
    params = AnimationParams(**{"prompt": "a cat", "seed": 5, "num_frames": 2, "num_inference_steps": 2, **knobs})
    picture = Image.fromarray(np.random.default_rng(3).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    (animation,) = animator.animate([AnimationRequest(picture, params, **(embeds or {}))])
    assert isinstance(animation, Animation), animation
    return animation.frames


def test_both_sides_of_guidance_may_be_of_any_length(model: ModelConfig) -> None:
    with Animator(model) as animator:
        plain = frames(animator)
        for side in ("prompt", "negative_prompt"):
            long = frames(animator, **{side: LONG})
            embeds = {f"{side}_embeds": animator.encode_prompt(LONG)}
            np.testing.assert_array_equal(frames(animator, embeds=embeds), long)
            assert (long != plain).any()
        short = {"prompt_embeds": animator.encode_prompt("a cat")}
        both = frames(animator, embeds=short, negative_prompt=LONG)
        np.testing.assert_array_equal(both, frames(animator, negative_prompt=LONG))
        end = frames(animator, prompt=LONG + " the red sea")
        assert (end != frames(animator, prompt=LONG)).any()


def test_the_knob_prompt_syntax_says_how_prompts_are_read(model: ModelConfig) -> None:
    with Animator(model) as animator:
        weighted = frames(animator, prompt="a (red:1.5) cat", prompt_syntax="a1111")
        assert (weighted != frames(animator, prompt="a (red:1.5) cat")).any()
        assert (weighted != frames(animator, prompt="a red cat")).any()
    a1111 = model.model_copy(update={"defaults": {"prompt_syntax": "a1111"}})
    with Animator(a1111) as animator:
        np.testing.assert_array_equal(frames(animator, prompt="a (red:1.5) cat"), weighted)


def test_a_folder_without_a_length_of_its_tokenizer_has_that_of_its_text_encoder(parts: Components) -> None:
    from copy import deepcopy
    from dataclasses import replace

    tokenizer = deepcopy(parts.tokenizer)
    tokenizer.model_max_length = 10**30
    ours = Conditions(replace(parts, tokenizer=tokenizer)).prompt("a cat", clip_skip=None)
    torch.testing.assert_close(ours, encoded(parts, tokens_of(parts, "a cat")), rtol=0, atol=0)
