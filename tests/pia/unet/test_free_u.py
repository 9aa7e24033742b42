"""FreeU against diffusers, and beside rows without it."""

from __future__ import annotations

from pathlib import Path

import pytest

from pia_ray.animation import Animation
from pia_ray.config.resolving import parse_params
from pia_ray.errors import BadParameter
from pia_ray.pia.engine import Engine
from pia_ray.pia.loading.load import assemble
from pia_ray.testing import make_pipeline_folder
from pia_ray.weights import resolve
from tests.pia.test_engine import alone, ask, assert_same, model_of, reference, run

FACTORS = (0.9, 0.2, 1.5, 1.6)


def test_frames_equal_those_of_diffusers_and_no_row_feels_its_neighbours(tmp_path: Path) -> None:
    folder = make_pipeline_folder(tmp_path / "model", vae_factor=4)
    model = model_of(folder)
    components = assemble(resolve(model), model)
    requests = [
        ask(model, seed=1, free_u=FACTORS),
        ask(model, seed=1),
        ask(model, seed=1, free_u="0.6, 0.4, 1.1, 1.2"),
        ask(model, seed=2, free_u=FACTORS, guidance_scale=1.0),
    ]
    outcomes = run(Engine(components, batch_size=4), requests)
    for request, outcome in zip(requests, outcomes, strict=True):
        assert isinstance(outcome, Animation)

        def tune(pipe: object, factors: tuple[float, ...] | None = request.params.free_u) -> None:
            if factors is not None:
                pipe.unet.enable_freeu(*factors)

        assert_same(outcome.frames, reference(folder, request, tune=tune))
    with pytest.raises(AssertionError, match="off by"):
        assert_same(outcomes[0].frames, outcomes[1].frames)
    assert_same(alone(components, requests[1]).frames, outcomes[1].frames)


@pytest.mark.parametrize("cell", ["0.9,0.2,1.5,1.6", "[0.9, 0.2, 1.5, 1.6]", [0.9, 0.2, 1.5, 1.6], FACTORS])
def test_text_and_lists_are_understood(cell: object) -> None:
    assert parse_params({"prompt": "sea", "free_u": cell}).free_u == FACTORS


@pytest.mark.parametrize(
    "cell", ["0.9,0.2,1.5", "a,b,c,d", [0.9, 0.2, 1.5, 0], [1, 1, 1, float("nan")], [10**400] * 4, 3, True]
)
def test_anything_else_is_refused(cell: object) -> None:
    with pytest.raises(BadParameter, match="free_u must be four numbers"):
        parse_params({"prompt": "sea", "free_u": cell})
