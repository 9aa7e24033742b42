"""Frames on the canvas of their file, and the part of a picture that a crop keeps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image

from pia_ray.config.knobs import AnimationParams
from pia_ray.config.model import ModelConfig
from pia_ray.config.resolving import resolve
from pia_ray.media import video
from pia_ray.media.finish import encode_finished, finish
from pia_ray.media.sizes import choose_size, fit
from pia_ray.prepare import prepare
from pia_ray.types import AnimationRequest

MODEL = ModelConfig(base="base", motion_adapter="adapter", long_edge=512)
WIDE = (900, 600)


def params(**knobs: Any) -> AnimationParams:
    return resolve(AnimationParams(prompt="-", **knobs), {}, model_defaults={})


def animated_size(picture: tuple[int, int], **knobs: Any) -> tuple[int, int]:
    image = Image.new("RGB", picture)
    return prepare(AnimationRequest(image, AnimationParams(prompt="-", **knobs), id="a"), MODEL).image.size


@pytest.mark.parametrize(
    ("aspect", "size"), [("9:16", (288, 512)), ("1:1", (512, 512)), ("4:5", (408, 512)), ("16:9", (512, 288))]
)
def test_a_picture_is_cropped_to_its_aspect_before_it_is_animated(aspect: str, size: tuple[int, int]) -> None:
    assert animated_size(WIDE, aspect=aspect) == size


def test_one_given_side_and_the_aspect_make_the_other_side() -> None:
    assert animated_size(WIDE, aspect="9:16", width=360) == (360, 640)
    assert animated_size(WIDE, aspect="9:16", fit="pad", width=360) == (360, 240)


@pytest.mark.parametrize("fitting", ["pad", "blur"])
@pytest.mark.parametrize("picture", [(900, 600), (600, 900), (512, 512), (1000, 130)])
def test_the_whole_picture_is_animated_where_it_is_padded(fitting: str, picture: tuple[int, int]) -> None:
    width, height = animated_size(picture, aspect="9:16", fit=fitting)
    assert max(width, height) == 512
    assert abs(min(width, height) - 512 * min(picture) / max(picture)) <= 4


@pytest.mark.parametrize("fitting", ["pad", "blur"])
@pytest.mark.parametrize("aspect", ["9:16", "1:1", "4:5", "2.39:1", "16:9"])
@pytest.mark.parametrize("size", [(96, 64), (64, 96), (64, 64)])
@pytest.mark.parametrize("ext", ["mp4", "webm", "gif", "webp"])
def test_a_padded_file_has_its_aspect_in_every_format(
    fitting: str, aspect: str, size: tuple[int, int], ext: Any
) -> None:
    frames = np.full((2, size[1], size[0], 3), 200, np.uint8)
    finished = finish(frames, params(num_frames=2, aspect=aspect, fit=fitting))
    made = encode_finished(finished, ext, provenance={})
    facts = video.probe(made.content)
    width, height = (float(side) for side in aspect.split(":"))
    assert abs(facts.width - facts.height * width / height) <= max(1, width / height)
    assert facts.width >= size[0]
    assert facts.height >= size[1]


def test_the_frames_stand_unchanged_in_the_middle_of_bars_of_the_colour() -> None:
    frames = np.random.default_rng(0).integers(0, 255, (3, 64, 96, 3), dtype=np.uint8)
    finished = finish(frames, params(num_frames=3, aspect="1:1", fit="pad", pad_colour="#ff8000")).frames
    assert finished.shape == (3, 96, 96, 3)
    assert (finished[:, 16:80] == frames).all()
    assert (finished[:, :16] == (255, 128, 0)).all()
    assert (finished[:, 80:] == (255, 128, 0)).all()


def test_a_blurred_background_has_the_colours_of_the_frame_without_its_detail() -> None:
    frames = np.zeros((1, 64, 96, 3), np.uint8)
    frames[:, :, ::2] = (200, 100, 40)
    finished = finish(frames, params(num_frames=1, aspect="9:16", fit="blur")).frames
    top = (finished.shape[1] - 64) // 2
    assert (finished[0, top : top + 64] == frames[0]).all()
    background = finished[0, : top - 4].astype(int)
    assert np.abs(background.mean((0, 1)) - frames.mean((0, 1, 2))).max() < 6
    assert background.std((0, 1)).max() < 6


@pytest.mark.parametrize(("focus", "shown"), [((0.0, 0.0), 0), ((0.5, 0.5), 100), ((1.0, 0.5), 200), ((0.25, 0.1), 25)])
def test_a_crop_keeps_the_part_around_its_focus(focus: tuple[float, float], shown: int) -> None:
    ramp = np.repeat(np.arange(300)[None] // 2, 100, axis=0).astype(np.uint8)
    part = np.asarray(fit(Image.fromarray(np.stack([ramp] * 3, axis=-1)), (100, 100), focus=focus))
    assert part[50, 50, 0] == pytest.approx((shown + 50) / 2, abs=1)


def test_a_mask_and_an_end_image_are_cropped_where_the_picture_is() -> None:
    picture = Image.new("RGB", (300, 100))
    picture.paste((255, 255, 255), (180, 0, 300, 100))
    knobs = {"aspect": "1:1", "focus": "1,0.5", "width": 64}
    asked = AnimationRequest(
        picture, AnimationParams(prompt="-", **knobs), id="a", end_image=picture, mask_image=picture
    )
    ready = prepare(asked, MODEL)
    assert ready.mask_image is not None
    assert ready.end_image is not None
    assert np.asarray(ready.mask_image).min() > 250
    assert np.asarray(ready.end_image).min() > 250
    assert np.asarray(ready.image).min() > 250


def test_without_aspect_the_size_is_what_it_was() -> None:
    for given in ({}, {"width": 256}, {"width": 256, "height": 512}):
        sides: dict[str, Any] = {"width": None, "height": None, **given}
        assert animated_size(WIDE, **given) == choose_size(WIDE, long_edge=512, size_step=MODEL.size_step, **sides)
