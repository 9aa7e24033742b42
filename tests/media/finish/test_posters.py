"""The poster of a video: the best of its frames, at the size of the file."""

from __future__ import annotations

import io
from importlib.resources import files
from typing import Any, Literal

import numpy as np
import pytest
from PIL import Image, ImageFilter

from pia_ray.config.knobs import AnimationParams
from pia_ray.config.resolving import resolve
from pia_ray.media.finish import finish, poster_of
from pia_ray.media.sizes import fit

PICTURE = fit(Image.open(files("pia_ray") / "demo/catalog/images/cat.webp").convert("RGB"), (128, 96))


def params(**knobs: Any) -> AnimationParams:
    return resolve(AnimationParams(prompt="-", num_frames=4, **knobs), {}, model_defaults={})


def poster(asked: AnimationParams, *, image: Image.Image | None = PICTURE) -> Image.Image:
    """The poster of a black frame, a blurred one, the picture, and one with another picture in it."""
    blurred = PICTURE.filter(ImageFilter.GaussianBlur(3))
    frames = np.stack([np.asarray(each) for each in (Image.new("RGB", PICTURE.size), blurred, PICTURE, PICTURE)])
    frames[3, :, 40:] = frames[3, ::-1, 40:]
    content = poster_of(finish(frames, asked), asked, judged=frames, image=image)
    assert content is not None
    return Image.open(io.BytesIO(content))


@pytest.mark.parametrize(("kind", "format_name"), [("jpg", "JPEG"), ("webp", "WEBP")])
def test_the_poster_is_the_frame_that_is_sharp_and_like_the_picture(kind: Literal["jpg", "webp"], format_name: str):
    made = poster(params(poster=kind))
    assert made.format == format_name
    assert b"compositeWithTrainedAlgorithmicMedia" in made.info["xmp"]
    difference = np.asarray(made.convert("RGB"), int) - np.asarray(PICTURE, int)
    assert np.abs(difference).mean() < 6


def test_the_poster_has_the_size_of_the_file_and_does_not_depend_on_its_speed():
    made = poster(params(poster="webp", aspect="1:1", fit="pad", pad_colour="#ffffff", playback_fps=25))
    assert made.size == (128, 128)
    assert np.abs(np.asarray(made.convert("RGB"), int)[16:112] - np.asarray(PICTURE, int)).mean() < 6


def test_without_a_picture_the_first_frame_is_the_poster_and_without_the_knob_there_is_none():
    assert np.asarray(poster(params(poster="jpg"), image=None)).max() == 0
    frames = np.zeros((4, 64, 64, 3), np.uint8)
    assert poster_of(finish(frames, params()), params(), judged=frames, image=PICTURE) is None
