"""Each number tells its damage from a clean video and is blind to steady motion; frames of any size have numbers."""

from __future__ import annotations

import io
import math
from dataclasses import fields

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

import pia_ray
from pia_ray import Judgement
from pia_ray.errors import BadParameter
from pia_ray.media.judgement import MOST_FRAMES, judge_frames
from pia_ray.result_row import JUDGED
from pia_ray.testing import draw_picture

SIDE = 160
NUM_FRAMES = 16


def scene() -> Image.Image:
    """A picture with colours, shapes, texture and letters, larger than a frame."""
    noise = np.random.default_rng(3).integers(0, 256, (16, 16, 3), np.uint8)
    picture = Image.fromarray(noise).resize((400, 400), Image.Resampling.BICUBIC)
    drawing = ImageDraw.Draw(picture)
    drawing.ellipse((120, 110, 230, 220), fill=(220, 60, 40))
    drawing.rectangle((210, 190, 290, 280), fill=(30, 90, 200))
    drawing.text((150, 180), "FRESH TEA", fill="white", font_size=26)
    return picture


def drawn(seed: int) -> Image.Image:
    return Image.open(io.BytesIO(draw_picture((96, 80), seed=seed))).convert("RGB")


def pan(num_frames: int = NUM_FRAMES, pixels: float = 30) -> np.ndarray:
    """A camera that moves right by so many pixels: uint8 [T, SIDE, SIDE, 3]."""
    world = scene()
    frames = []
    for share in np.linspace(0, 1, num_frames):
        left = 110 + share * pixels
        box = (left, 110, left + SIDE, 110 + SIDE)
        frames.append(np.asarray(world.resize((SIDE, SIDE), Image.Resampling.BICUBIC, box=box)))
    noise = np.random.default_rng(4).normal(0, 1, (num_frames, SIDE, SIDE, 1))
    return np.clip(np.stack(frames) + noise, 0, 255).round().astype(np.uint8)


def judged(frames: np.ndarray, image: np.ndarray | None = None, *, loop: bool = False) -> Judgement:
    return judge_frames(frames, image=Image.fromarray(pan(1)[0] if image is None else image), motion=0.1, loop=loop)


@pytest.fixture(scope="module")
def clean() -> np.ndarray:
    return pan()


def test_a_steady_pan_has_nothing_to_complain_of(clean: np.ndarray) -> None:
    judgement = judged(clean)
    assert judgement.likeness > 0.95
    assert judgement.likeness_min > 0.9
    assert judgement.likeness_part > 0.85
    assert judgement.flicker < 0.01
    assert judgement.sharpness == pytest.approx(1, abs=0.15)
    assert judgement.colour_shift < 2
    assert judgement.stillness == 0
    assert judgement.motion == 0.1
    assert judgement.closure is judgement.subject_similarity is judgement.prompt_similarity is None


def test_the_picture_itself_is_perfect(clean: np.ndarray) -> None:
    judgement = judged(clean[:1].repeat(4, axis=0), clean[0])
    assert (judgement.likeness, judgement.likeness_min, judgement.likeness_part) == pytest.approx((1, 1, 1), abs=1e-3)
    assert (judgement.flicker, judgement.stillness) == (0, 1)
    assert judgement.sharpness == pytest.approx(1, abs=1e-3)
    assert judgement.colour_shift == pytest.approx(0, abs=0.01)


def test_one_black_frame_is_the_least_like_frame(clean: np.ndarray) -> None:
    damaged = clean.copy()
    damaged[7] = 0
    assert judged(damaged).likeness_min < 0.2
    assert judged(damaged).likeness > 0.8


def test_another_picture_is_unlike(clean: np.ndarray) -> None:
    other = np.asarray(drawn(5).resize((SIDE, SIDE)))
    assert judged(clean, other).likeness < 0.6


def test_letters_that_dissolve_are_seen_in_their_part_alone(clean: np.ndarray) -> None:
    damaged = clean.copy()
    part = (slice(None), slice(66, 102), slice(20, 110))
    mixed = np.random.default_rng(1).permutation(90)
    damaged[10:][part] = damaged[10:][part][:, :, mixed]
    before, after = judged(clean), judged(damaged)
    assert after.likeness_part < before.likeness_part - 0.3
    assert after.likeness > before.likeness - 0.15


def test_flicker_counts_what_comes_and_goes_and_a_dark_end_does_not(clean: np.ndarray) -> None:
    shares = np.linspace(1, 0.6, NUM_FRAMES)[:, None, None, None]
    darker = (clean * shares).astype(np.uint8)
    blinking = (clean * np.where(np.arange(NUM_FRAMES) % 2, 0.8, 1)[:, None, None, None]).astype(np.uint8)
    assert judged(blinking).flicker > 10 * judged(darker).flicker


def test_blur_lowers_sharpness_and_noise_raises_it(clean: np.ndarray) -> None:
    blurred = np.stack([np.asarray(Image.fromarray(f).filter(ImageFilter.GaussianBlur(2))) for f in clean])
    noise = np.random.default_rng(0).normal(0, 20, clean.shape)
    noisy = np.clip(clean + noise, 0, 255).astype(np.uint8)
    assert judged(blurred).sharpness < 0.5
    assert judged(noisy).sharpness > 2


def test_colours_that_drift_are_measured_in_delta_e(clean: np.ndarray) -> None:
    gains = np.linspace(1, 1.25, NUM_FRAMES)[:, None, None]
    warm = clean.astype(float)
    warm[..., 0] *= gains
    assert judged(np.clip(warm, 0, 255).astype(np.uint8)).colour_shift > judged(clean).colour_shift + 3


def test_delta_e_of_two_flat_colours_is_that_of_the_books() -> None:
    red, green = (np.full((4, 64, 64, 3), colour, np.uint8) for colour in ((255, 0, 0), (0, 255, 0)))
    # In CIELAB they are 53.2, 80.1, 67.2 and 87.7, -86.2, 83.2.
    assert judged(green, red[0]).colour_shift == pytest.approx(170.6, abs=0.2)


def test_stillness_is_the_longest_rest_of_a_moving_video(clean: np.ndarray) -> None:
    resting = clean.copy()
    resting[4:10] = resting[4]
    assert judged(resting).stillness == pytest.approx(5 / 15, abs=1e-4)


def test_a_loop_closes_where_its_seam_is_a_usual_step(clean: np.ndarray) -> None:
    seam_dropped = np.concatenate([clean[::2], clean[::-2]])
    assert judged(seam_dropped, loop=True).closure == 1
    assert judged(np.concatenate([seam_dropped, clean[:1]]), loop=True).closure == 1
    assert 0.5 < judged(seam_dropped[:-2], loop=True).closure < 0.95
    assert judged(clean, loop=True).closure == 0
    still = clean[:1].repeat(8, axis=0)
    assert judged(still, loop=True).closure == 1


def test_the_late_third_of_a_loop_is_its_middle(clean: np.ndarray) -> None:
    blurred = clean.copy()
    blurred[6:10] = np.stack([np.asarray(Image.fromarray(f).filter(ImageFilter.GaussianBlur(3))) for f in clean[6:10]])
    assert judged(blurred, loop=True).sharpness < 0.7 < judged(blurred).sharpness


@pytest.mark.parametrize("size", [(8, 8), (64, 64), (56, 64), (96, 64), (128, 72), (72, 200), (40, 512), (512, 40)])
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_frames_of_any_size_and_number_have_finite_numbers(size: tuple[int, int], count: int) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (count, *size, 3)).astype(np.uint8)
    judgement = judge_frames(frames, image=drawn(1), motion=0.0, loop=True)
    numbers = [value for value in judgement.as_dict().values() if value is not None]
    assert all(math.isfinite(number) for number in numbers)
    assert 0 <= judgement.likeness_min <= judgement.likeness <= 1


@pytest.mark.parametrize("level", [0, 255])
def test_flat_pictures_have_finite_numbers(level: int) -> None:
    flat = np.full((3, 48, 64, 3), level, np.uint8)
    assert judged(flat, flat[0]).likeness == pytest.approx(1)
    assert judged(flat, pan(1)[0]).likeness < 0.5
    assert all(math.isfinite(value) for value in judged(pan(3), flat[0]).as_dict().values() if value is not None)


def test_a_long_video_is_judged_by_some_of_its_frames(clean: np.ndarray) -> None:
    short, long = judged(clean), judged(pan(4 * MOST_FRAMES))
    assert long.likeness == pytest.approx(short.likeness, abs=0.02)
    assert long.colour_shift == pytest.approx(short.colour_shift, abs=0.5)


@pytest.mark.parametrize(
    "frames",
    [np.zeros((0, 8, 8, 3), np.uint8), np.zeros((2, 8, 8), np.uint8), np.zeros((2, 8, 8, 3), np.float32)],
    ids=["none", "grey", "floats"],
)
def test_other_arrays_are_refused(frames: np.ndarray) -> None:
    with pytest.raises(BadParameter, match="uint8"):
        judge_frames(frames, image=drawn(0), motion=0.0)


def test_judge_measures_motion_and_takes_arrays(clean: np.ndarray) -> None:
    judgement = pia_ray.judge(clean, image=clean[0])
    assert judgement.motion > 0.01
    assert judgement.likeness == judged(clean, clean[0]).likeness
    with pytest.raises(BadParameter):
        pia_ray.judge(clean, image="picture.png")  # type: ignore[arg-type]


def test_the_numbers_are_the_columns(clean: np.ndarray) -> None:
    assert sorted(judged(clean).as_dict()) == sorted(JUDGED)
    assert {field.name for field in fields(Judgement)} == set(JUDGED)
