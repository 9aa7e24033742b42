"""Frames are found in their picture: moved, turned, scaled, under other light; what is not there does no harm."""

from __future__ import annotations

import math

import numpy as np
import pytest
from PIL import Image

from pia_ray.media.registration import register

SIDE = 64


def texture(seed: int = 0) -> Image.Image:
    """A smooth random picture, three times as large as a frame."""
    noise = np.random.default_rng(seed).integers(0, 256, (24, 24), np.uint8)
    return Image.fromarray(noise).resize((3 * SIDE, 3 * SIDE), Image.Resampling.BICUBIC)


def camera(world: Image.Image, *, zoom: float = 1.0, turn: float = 0.0, right: float = 0.0) -> np.ndarray:
    """What a camera over the middle of the world sees; `right` in half frames: float32 [SIDE, SIDE]."""
    cos, sin = math.cos(turn) * zoom, math.sin(turn) * zoom
    x, y = world.width / 2 + right * SIDE / 2, world.height / 2
    half = SIDE / 2
    places = (cos, sin, x - half * (cos + sin), -sin, cos, y - half * (cos - sin))
    seen = world.transform((SIDE, SIDE), Image.Transform.AFFINE, places, Image.Resampling.BICUBIC)
    return np.asarray(seen, np.float32) / 255


def clip(**end: float) -> np.ndarray:
    """Sixteen frames of a steady camera, the first at rest."""
    shares = np.linspace(0, 1, 16)
    start = {"zoom": 1.0, "turn": 0.0, "right": 0.0}
    moves = [{name: start[name] + share * (value - start[name]) for name, value in end.items()} for share in shares]
    return np.stack([camera(texture(), **move) for move in moves])


@pytest.mark.parametrize(
    ("end", "expected"),
    [
        ({"right": 0.5}, (1, 0, 0.5, 0, 1, 0)),
        ({"zoom": 1.4}, (1.4, 0, 0, 0, 1.4, 0)),
        ({"zoom": 0.7}, (0.7, 0, 0, 0, 0.7, 0)),
        ({"turn": 0.4}, (math.cos(0.4), math.sin(0.4), 0, -math.sin(0.4), math.cos(0.4), 0)),
    ],
    ids=["shift", "zoom out", "zoom in", "turn"],
)
def test_the_place_of_the_last_frame_is_found(end: dict[str, float], expected: tuple[float, ...]) -> None:
    frames = clip(**end)
    placed = register(frames, frames[0])
    np.testing.assert_allclose(placed.maps[-1], expected, atol=0.03)


def test_other_light_does_not_mislead() -> None:
    frames = clip(right=0.4)
    light = np.linspace(1, 0.5, 16, dtype=np.float32)[:, None, None]
    placed = register(frames * light + 0.1, frames[0])
    np.testing.assert_allclose(placed.maps[-1], (1, 0, 0.4, 0, 1, 0), atol=0.03)


def test_black_frames_do_not_lose_those_that_follow() -> None:
    frames = clip(right=0.4)
    frames[5:8] = 0
    placed = register(frames, frames[0])
    np.testing.assert_allclose(placed.maps[-1], (1, 0, 0.4, 0, 1, 0), atol=0.05)


def test_waves_are_followed_by_the_shifts() -> None:
    picture = camera(texture())
    rows, columns = np.mgrid[:SIDE, :SIDE]
    waved = np.clip(rows + 2.5 * np.sin(2 * np.pi * columns / SIDE), 0, SIDE - 1).round().astype(int)
    frame = picture[waved, columns]
    moved = register(frame[None], picture).warp(picture[None]).values[0, 0]
    assert np.abs(moved - frame).mean() < 0.5 * np.abs(picture - frame).mean()


@pytest.mark.parametrize("level", [0.0, 0.5, 1.0])
def test_a_flat_picture_and_flat_frames_have_finite_places(level: float) -> None:
    flat = np.full((3, 16, SIDE), level, np.float32)
    frames = camera(texture())[None, :16]
    for one, other in ((flat, flat[0]), (flat, frames[0]), (frames, flat[0])):
        placed = register(one, other)
        assert np.isfinite(placed.maps).all()
        assert np.isfinite(placed.shifts).all()
        assert placed.warp(other[None]).seen.mean((1, 2)).min() > 0.1


def test_an_image_of_another_size_is_warped_by_the_same_places() -> None:
    frames = clip(right=0.5)
    placed = register(frames, frames[0])
    large = np.kron(frames[0], np.ones((2, 2), np.float32))
    warped = placed.warp(np.stack([large, large]))
    assert warped.values.shape == (16, 2, 2 * SIDE, 2 * SIDE)
    inside = warped.seen[-1]
    expected = np.kron(frames[-1], np.ones((2, 2), np.float32))
    assert np.abs(warped.values[-1, 0] - expected)[inside].mean() < 0.05
    assert not inside[:, -SIDE // 4 :].any()
