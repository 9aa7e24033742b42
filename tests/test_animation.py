"""What a notebook shows of an animation: the video itself, inside the page."""

from __future__ import annotations

import base64
import re

import numpy as np
import pytest
from IPython.core.formatters import DisplayFormatter
from PIL import Image

from pia_ray.animation import Animation
from pia_ray.config.knobs import AnimationParams
from pia_ray.errors import VideoError
from pia_ray.media import video


def animation(prompt: str = "waves", *, num_frames: int = 4, **knobs) -> Animation:
    frames = np.linspace(0, 255, num_frames * 48 * 64 * 3).reshape(num_frames, 48, 64, 3).astype(np.uint8)
    params = AnimationParams(prompt=prompt, num_frames=max(num_frames, 1), seed=2**64 - 1, **knobs)
    return Animation(
        frames=frames, params=params, model="demo@1", id="a", gpu_s=0.5, animate_s=1.0, motion=0.0314, output=None
    )


def test_the_figure_holds_the_video_with_its_provenance():
    encoded = re.search(r'src="data:video/mp4;base64,([^"]+)"', animation(fps=12).to_html())[1]
    facts = video.probe(base64.b64decode(encoded))
    assert (facts.num_frames, facts.width, facts.height, facts.fps) == (4, 64, 48, pytest.approx(12, rel=0.01))
    assert facts.provenance["seed"] == str(2**64 - 1)


def test_the_caption_says_what_was_asked_for_and_what_was_measured():
    assert "waves · motion loop-small, measured 0.031" in animation(motion_scale="loop-small").to_html()
    assert "motion of its own affinity" in animation(affinity=(1, 0.5)).to_html()


def test_a_prompt_is_text_and_never_markup():
    assert "&lt;script&gt;&quot;" in animation('<script>"').to_html()
    assert "<script" not in animation('<script>"').to_html()


def test_a_small_video_is_shown_larger_unless_a_width_is_given():
    assert 'width="192"' in animation().to_html()
    assert 'width="48"' in animation().to_html(width=48)
    with pytest.raises(VideoError, match="width"):
        animation().to_html(width=0)


def test_a_notebook_shows_the_video_and_a_console_one_line():
    shown, _ = DisplayFormatter().format(animation())
    assert shown["text/plain"] == "<Animation: 4 frames of 64 x 48 px, 'waves'>"
    assert shown["text/html"] == animation().to_html()


def test_an_animation_that_was_left_as_latents_is_shown_as_text():
    shown, _ = DisplayFormatter().format(animation(num_frames=0))
    assert shown.keys() == {"text/plain"}
    with pytest.raises(VideoError, match="frames"):
        animation(num_frames=0).to_html()


@pytest.mark.parametrize("extension", ["mp4", "webp", "gif", "webm"])
def test_the_file_in_memory_is_the_file_that_is_saved(extension, tmp_path):
    made = animation()
    encoded = made.encode(extension)
    made.save(tmp_path / f"saved.{extension}")
    assert encoded.content == (tmp_path / f"saved.{extension}").read_bytes()
    assert (encoded.format, encoded.num_frames) == (extension, 4)
    assert video.probe(encoded.content).provenance["params"]["prompt"] == "waves"


def test_a_saved_video_is_finished_and_its_poster_lies_beside_it(tmp_path):
    made = animation(playback_fps=24, repeat=2, aspect="1:1", fit="blur", poster="jpg")
    made.save(tmp_path / "a.mp4")
    facts = video.probe(tmp_path / "a.mp4")
    assert (facts.num_frames, facts.width, facts.height, facts.fps) == (24, 64, 64, pytest.approx(24, rel=0.01))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a-poster.jpg", "a.mp4"]
    with Image.open(tmp_path / "a-poster.jpg") as poster:
        assert poster.size == (64, 64)
