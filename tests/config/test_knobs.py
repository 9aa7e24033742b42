"""Knobs that a program makes by hand: pydantic's errors in our words, where its own would mislead."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from pia_ray import AnimationParams
from pia_ray.config.knobs import KNOBS, suggest


@pytest.mark.parametrize("seed", [2**64, -1, "18446744073709551616"])
def test_a_seed_beyond_64_bits_is_refused_with_the_bound_and_not_a_rounded_one(seed: int | str) -> None:
    with pytest.raises(ValidationError, match=r"must be a whole number from 0 to 2\^64-1"):
        AnimationParams(prompt="a cat", seed=seed)
    assert AnimationParams(prompt="a cat", seed=2**64 - 1).seed == 2**64 - 1


@pytest.mark.parametrize(
    ("word", "near"),
    [("steps", "num_inference_steps"), ("frames", "num_frames"), ("promt", "prompt"), ("guidance", "guidance_scale")],
)
def test_a_word_of_a_longer_name_leads_to_it(word: str, near: str) -> None:
    assert suggest(word, KNOBS) == f' Did you mean "{near}"?'
