"""Enlarged videos: the file has the size, the numbers are those of the generated frames, too large ones are refused."""

from __future__ import annotations

import asyncio
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pia_ray import storage
from pia_ray.animation import Animation
from pia_ray.config.finish_checks import check_file_size
from pia_ray.config.knobs import AnimationParams
from pia_ray.config.resolving import parse_params, resolve
from pia_ray.errors import BadParameter
from pia_ray.media.finish import finish, poster_of
from pia_ray.media.video import probe
from pia_ray.types import AnimationRequest
from tests.catalog.test_local import DEMO, CountingAnimator, by_id, configure, go, write
from tests.online.rendering.test_local_renderer import ask, events_of, renderer


def mirrored(frames: np.ndarray[Any, Any], factor: int) -> np.ndarray[Any, Any]:
    """A network that can be told from Lanczos: pixels repeated, the frame upside down."""
    return np.ascontiguousarray(frames.repeat(factor, axis=1).repeat(factor, axis=2)[:, ::-1])


def animation(**how: Any) -> Animation:
    frames = np.linspace(0, 255, 4 * 48 * 64 * 3).reshape(4, 48, 64, 3).astype(np.uint8)
    params = AnimationParams(prompt="a", num_frames=4, seed=1, upscale=2)
    return Animation(frames=frames, params=params, model="demo@1", id="a", gpu_s=1, animate_s=1, motion=0, **how)


def test_a_row_is_enlarged_in_its_file_and_judged_before(tmp_path: Path) -> None:
    rows = [
        {"id": name, "image": "a.png", "prompt": "a", "num_frames": 4, "seed": 7, "upscale": factor}
        for name, factor in (("plain", None), ("large", 4))
    ]
    config = configure(write(tmp_path, rows), tmp_path / "out")
    go(config)
    plain, large = by_id(config)["plain"], by_id(config)["large"]
    assert [(row["width"], row["height"]) for row in (plain, large)] == [(64, 48), (256, 192)]
    facts = probe(storage.read_bytes(large["video_uri"]))
    assert (facts.width, facts.height, facts.num_frames) == (256, 192, 4)
    numbers = ("likeness", "flicker", "sharpness", "motion")
    assert [large[name] for name in numbers] == [plain[name] for name in numbers]
    assert "upscaled_lanczos" in (large["flags"] or "").split(",")
    assert "upscaled_lanczos" not in (plain["flags"] or "")


def test_the_network_of_the_model_enlarges_where_there_is_one() -> None:
    facts = probe(animation(upscale=mirrored).encode().content)
    assert (facts.width, facts.height) == (128, 96)
    made = animation()
    finished = finish(made.frames, made.params, upscale=mirrored)
    assert np.array_equal(finished.frames, mirrored(made.frames, 2))
    assert finish(made.frames, made.params.model_copy(update={"upscale": 1}), upscale=mirrored).frames is made.frames


@pytest.mark.parametrize("upscale", [mirrored, None])
def test_a_poster_and_bars_have_the_size_of_the_file(upscale: Any) -> None:
    made = animation()
    knobs = {"aspect": "1:1", "fit": "pad", "poster": "webp", "playback_fps": 16}
    params = made.params.model_copy(update=knobs)
    finished = finish(made.frames, params, upscale=upscale)
    assert (finished.width, finished.height, len(finished.frames)) == (128, 128, 8)
    content = poster_of(finished, params, judged=made.frames, image=None)
    with Image.open(io.BytesIO(content or b"")) as poster:
        assert poster.size == (128, 128)


def test_the_endpoint_enlarges_too() -> None:
    async def work() -> Any:
        async with renderer() as made:
            return (await events_of(made, ask(knobs={"upscale": 2})))[-1]

    rendered = asyncio.run(work())
    assert (rendered.video.width, rendered.video.height) == (128, 128)
    assert rendered.video.params.width == 64


@pytest.mark.parametrize("factor", [0, 3, 8, "x", 1.5])
def test_a_factor_is_1_2_or_4(factor: Any) -> None:
    with pytest.raises(BadParameter, match="upscale must be"):
        parse_params({"prompt": "a", "upscale": factor})


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        ({"width": 2048, "height": 2048, "upscale": 4}, "4096 px on a side"),
        ({"width": 1544, "height": 1536, "upscale": 2}, "9.4 million pixels"),
        ({"width": 1024, "height": 1024, "upscale": 2, "num_frames": 250}, "GiB of memory"),
    ],
)
def test_an_enlarged_video_that_no_worker_could_hold_is_refused(knobs: dict[str, int], said: str) -> None:
    with pytest.raises(BadParameter, match=said):
        check_file_size(resolve(parse_params({"prompt": "a", **knobs}), {}, model_defaults={}))


def test_a_size_that_only_the_picture_gives_is_refused_before_denoising() -> None:
    large = DEMO.model_copy(update={"long_edge": 2048})
    params = AnimationParams(prompt="a", num_frames=2, upscale=4)
    picture = np.zeros((600, 600, 3), np.uint8)
    with CountingAnimator() as animator:
        animator.model = large
        error = animator.submit(AnimationRequest(picture, params)).exception()
    assert isinstance(error, BadParameter)
    assert "8192x8192" in error.message
