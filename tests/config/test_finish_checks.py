"""Knobs of finishing that contradict each other, and the length of the finished video."""

from __future__ import annotations

from typing import Any

import pytest

from pia_ray.config.finish_checks import check_file_size
from pia_ray.config.knobs import AnimationParams
from pia_ray.config.resolving import canonical_params, parse_params, resolve
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
        ({"fit": "pad"}, "fit"),
        ({"fit": "blur", "aspect": "1:1", "focus": (0.5, 0.2)}, "focus"),
        ({"aspect": "9:16", "width": 512, "height": 512}, "aspect"),
        ({"aspect": "9:16", "fit": "pad", "width": 512, "height": 512}, "height"),
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


def test_an_aspect_that_a_multiple_of_8_comes_near_is_no_contradiction() -> None:
    assert params(aspect="4:5", width=408, height=512).aspect == "4:5"


@pytest.mark.parametrize(
    ("given", "one"), [("1080:1920", "9:16"), (" 4 : 5 ", "4:5"), ("1.91:1", "1.91:1"), ("16x9", "16:9")]
)
def test_an_aspect_has_one_spelling_in_the_work_key(given: str, one: str) -> None:
    assert parse_params({"prompt": "-", "aspect": given}).aspect == one


@pytest.mark.parametrize(
    ("knob", "value"),
    [
        *(("aspect", value) for value in ("0:1", "13:1", "square", 556, 1.78, "1:", "nan:1")),
        *(("focus", value) for value in ("0.5", "0,2", "a,b", "nan,0.5", [0, 10**400], [0.1, 0.2, 0.3], 0.5)),
        *(("pad_colour", value) for value in ("white", "#fff", 0)),
        *(("playback_fps", value) for value in (0, 61, "fast")),
        *(("repeat", value) for value in (0, 101)),
        ("min_duration", -1),
        ("poster", "png"),
    ],
)
def test_values_out_of_bounds_are_refused_by_their_knob(knob: str, value: Any) -> None:
    with pytest.raises(BadParameter) as refused:
        parse_params({"prompt": "-", knob: value})
    assert refused.value.field == knob
    assert knob in refused.value.message


def test_frames_that_take_too_much_memory_are_refused_with_their_size() -> None:
    asked = params(num_frames=256, fps=8, playback_fps=60, width=1024, height=1024)
    with pytest.raises(BadParameter, match="GiB of memory"):
        check_file_size(asked)
    check_file_size(params(num_frames=256, width=2048, height=2048))  # as large as before there was finishing


def test_motion_is_refused_for_frames_too_small_for_it() -> None:
    with pytest.raises(BadParameter) as refused:
        check_file_size(params(playback_fps=24, width=24, height=512))
    assert refused.value.field == "interpolate"
    check_file_size(params(playback_fps=24, width=24, height=512, interpolate="blend"))
    check_file_size(params(width=24, height=512))


def test_knobs_of_finishing_at_their_defaults_are_not_in_the_work_key() -> None:
    assert "repeat" not in canonical_params(params())
    assert '"playback_fps":24' in canonical_params(params(playback_fps=24))
