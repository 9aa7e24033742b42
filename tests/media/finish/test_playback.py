"""Frames between frames: counts, times, seams and cuts, in memory and in decoded files."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image

from pia_ray.config.knobs import AnimationParams
from pia_ray.config.resolving import resolve
from pia_ray.config.timeline import timeline_of
from pia_ray.media import video
from pia_ray.media.finish import encode_finished, finish
from pia_ray.media.video_facts import Frames

LOOP = {"motion_scale": 3}


def params(**knobs: Any) -> AnimationParams:
    return resolve(AnimationParams(prompt="-", **knobs), {}, model_defaults={})


def round_trip(num_frames: int, *, side: int = 64) -> Frames:
    """A bright square on a dark ground that goes once round in so many frames."""
    ground = np.asarray(Image.effect_noise((side, side), 24).convert("RGB"), np.uint8) // 3
    frames = np.repeat(ground[None], num_frames, axis=0).copy()
    for frame, turn in zip(frames, np.arange(num_frames) * 2 * np.pi / num_frames, strict=True):
        x, y = (round(side / 2 + side / 5 * f(turn)) for f in (np.cos, np.sin))
        frame[y - 8 : y + 8, x - 8 : x + 8] = (230, 210, 90)
    return frames


def distances(frames: Frames) -> np.ndarray[Any, Any]:
    """The mean difference of each frame to the next one, of the last to the first."""
    following = np.roll(frames, -1, axis=0)
    return np.abs(frames.astype(float) - following).mean(axis=(1, 2, 3))


@pytest.mark.parametrize("playback_fps", [8, 24, 25, 30, 50, 60])
@pytest.mark.parametrize("interpolate", ["motion", "blend", "none"])
def test_a_clip_lasts_as_long_at_every_playback_rate(playback_fps: int, interpolate: str) -> None:
    asked = params(num_frames=4, playback_fps=playback_fps, interpolate=interpolate)
    finished = finish(round_trip(4, side=32), asked)
    facts = video.probe(encode_finished(finished, "mp4", provenance={}).content)
    assert facts.num_frames == int(4 * playback_fps / 8 + 0.5)
    assert facts.num_frames / facts.fps == pytest.approx(0.5, abs=0.501 / playback_fps)


def test_generated_frames_stay_at_their_times_unchanged() -> None:
    frames = round_trip(6)
    finished = finish(frames, params(num_frames=6, playback_fps=24)).frames
    assert (finished[::3] == frames).all()


def test_the_last_frame_of_a_clip_is_shown_until_the_clip_ends() -> None:
    frames = round_trip(6)
    finished = finish(frames, params(num_frames=6, playback_fps=24)).frames
    assert len(finished) == 18
    assert np.abs(finished[15:].astype(int) - frames[-1]).max() <= 4


@pytest.mark.parametrize("interpolate", ["motion", "blend"])
@pytest.mark.parametrize("seam", ["keep", "drop"])
@pytest.mark.parametrize("playback_fps", [24, 25])
def test_a_loop_is_interpolated_round_its_seam_without_a_doubled_frame(
    interpolate: str, seam: str, playback_fps: int
) -> None:
    around = round_trip(8)
    frames = around if seam == "drop" else np.concatenate([around, around[:1]])
    asked = params(num_frames=9, playback_fps=playback_fps, interpolate=interpolate, seam=seam, **LOOP)
    finished = finish(frames, asked).frames
    assert len(finished) == int(len(frames) * playback_fps / 8 + 0.5)
    steps = distances(finished)
    assert steps[-2:].max() < 2.5 * np.median(steps)
    assert steps.min() > 0.2 * np.median(steps)


def test_a_clip_that_is_no_loop_is_not_interpolated_from_its_end_to_its_start() -> None:
    frames = round_trip(6)
    frames[-1] = 255 - frames[-1]
    finished = finish(frames, params(num_frames=6, playback_fps=24)).frames
    assert np.abs(finished[-1].astype(int) - frames[-1]).max() <= 4


def test_motion_puts_a_moving_square_between_its_places_and_blend_shows_it_twice() -> None:
    ground = np.full((64, 64, 3), 40, np.uint8)
    frames = np.stack([ground] * 6)
    for place, frame in enumerate(frames):
        frame[24:40, 4 + 8 * place : 20 + 8 * place] = 220
    between = {}
    for interpolate in ("motion", "blend"):
        finished = finish(frames, params(num_frames=6, playback_fps=16, interpolate=interpolate)).frames
        between[interpolate] = finished[5][32, :, 0].astype(int)  # half way from the 3rd to the 4th frame
    half_bright = {name: int(((row > 90) & (row < 170)).sum()) for name, row in between.items()}
    assert half_bright["blend"] >= 14
    assert half_bright["motion"] <= 4
    assert between["motion"][26:36].min() > 200


@pytest.mark.parametrize("interpolate", ["motion", "blend"])
def test_no_frame_mixes_the_two_sides_of_a_cut(interpolate: str) -> None:
    dark, bright = round_trip(4), 255 - round_trip(4)
    frames = np.concatenate([dark, bright])
    finished = finish(frames, params(num_frames=8, playback_fps=24, interpolate=interpolate)).frames
    means = finished.mean(axis=(1, 2, 3))
    assert all(abs(mean - dark.mean()) < 12 or abs(mean - bright.mean()) < 12 for mean in means)


def test_without_finishing_the_frames_are_the_generated_ones_themselves() -> None:
    frames = round_trip(4)
    finished = finish(frames, params(num_frames=4))
    assert finished.frames is frames
    assert list(finished.order) == [0, 1, 2, 3]
    assert finished.fps == 8


@pytest.mark.parametrize("num_frames", [1, 2])
@pytest.mark.parametrize("interpolate", ["motion", "blend", "none"])
def test_one_frame_and_two_are_interpolated(num_frames: int, interpolate: str) -> None:
    asked = params(num_frames=num_frames, playback_fps=24, interpolate=interpolate)
    assert len(finish(round_trip(2)[:num_frames], asked).frames) == 3 * num_frames


def test_the_numbers_of_the_timeline_are_those_of_the_file() -> None:
    for fps in (7, 8, 23):
        for playback_fps in (24, 25, 60):
            asked = params(num_frames=5, fps=fps, playback_fps=playback_fps, interpolate="none")
            finished = finish(round_trip(5), asked)
            assert timeline_of(asked).num_frames == len(finished.order) == len(finished.frames)
            assert finished.fps == playback_fps


@pytest.mark.parametrize(("height", "width"), [(32, 32), (33, 47), (32, 120)])
@pytest.mark.parametrize("interpolate", ["motion", "blend"])
def test_frames_of_any_size_from_32_px_are_interpolated(height: int, width: int, interpolate: str) -> None:
    frames = np.random.default_rng(0).integers(0, 255, (4, height, width, 3), dtype=np.uint8)
    asked = params(num_frames=4, playback_fps=24, interpolate=interpolate)
    assert finish(frames, asked).frames.shape == (12, height, width, 3)
