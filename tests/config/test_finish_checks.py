"""Knobs of finishing that contradict each other, and the length of the finished video."""

from __future__ import annotations

from typing import Any

import pytest

from pia_ray.config.knobs import AnimationParams
from pia_ray.config.resolving import canonical_params, resolve
from pia_ray.config.timeline import timeline_of
from pia_ray.errors import BadParameter

LOOP = {"motion_scale": 3}


def params(**knobs: Any) -> AnimationParams:
    return resolve(AnimationParams(prompt="-", **knobs), {}, model_defaults={})


@pytest.mark.parametrize(
    ("knobs", "field"),
    [
        ({"fps": 30, "playback_fps": 24}, "playback_fps"),
        ({"repeat": 2, "min_duration": 6}, "min_duration"),
        ({"num_frames": 100, "repeat": 100}, "repeat"),
        ({"fps": 1, "num_frames": 200, "playback_fps": 60}, "playback_fps"),
        ({"fps": 60, "min_duration": 200}, "min_duration"),
    ],
)
def test_contradictory_knobs_of_finishing_are_refused_by_the_knob_to_change(knobs: dict[str, Any], field: str) -> None:
    with pytest.raises(BadParameter) as refused:
        params(**knobs)
    assert refused.value.field == field


@pytest.mark.parametrize(
    ("knobs", "num_frames"),
    [
        ({}, 16),
        ({"repeat": 3}, 48),
        ({"repeat": 3, **LOOP}, 46),  # 15 + 15 + 16: the closing frame is the first again
        ({"repeat": 3, "seam": "drop", **LOOP}, 45),
        ({"repeat_mode": "there-and-back"}, 30),
        ({"repeat_mode": "there-and-back", "repeat": 2}, 60),
        ({"repeat_mode": "there-and-back", "num_frames": 2}, 2),
        ({"repeat_mode": "there-and-back", "num_frames": 1}, 1),
        ({"min_duration": 6}, 48),
        ({"min_duration": 6.1}, 64),
        ({"min_duration": 0.5}, 16),
        ({"min_duration": 6, **LOOP}, 61),
        ({"min_duration": 6, "playback_fps": 24}, 144),
        ({"playback_fps": 24, "repeat": 2, **LOOP}, 96),
        ({"playback_fps": 24, "interpolate": "none", "repeat_mode": "there-and-back"}, 90),
    ],
)
def test_the_frames_of_a_repeated_video(knobs: dict[str, Any], num_frames: int) -> None:
    timeline = timeline_of(params(**knobs))
    assert timeline.num_frames == len(timeline.order) == num_frames


def test_knobs_of_finishing_at_their_defaults_are_not_in_the_work_key() -> None:
    assert "repeat" not in canonical_params(params())
    assert '"playback_fps":24' in canonical_params(params(playback_fps=24))
