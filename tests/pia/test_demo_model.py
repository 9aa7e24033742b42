"""The bundled model does what its card says, with wide margins. Whatever must be exact is tested on stubs instead."""

from functools import cache

import numpy as np
import pytest

from pia_ray import AnimationParams, AnimationRequest, Animator, ModelConfig
from pia_ray.media.image import decode
from pia_ray.media.sizes import fit
from training import registration
from training.pictures.draw import CATALOG

PICTURES = ("sunset-mountains.jpg", "mug.png")


@pytest.fixture(scope="module")
def animate():
    """The frames of all PICTURES with one prompt, made once however many tests ask for them."""
    model = ModelConfig.named("demo").model_copy(update={"device": "cpu", "long_edge": 48})
    with Animator(model) as animator:

        @cache
        def made(prompt, motion_scale=1):
            params = AnimationParams(prompt=prompt, seed=1, num_inference_steps=2, motion_scale=motion_scale)
            requests = [AnimationRequest(picture(name), params) for name in PICTURES]
            return [each.frames for each in animator.animate(requests)]

        yield made


def picture(name):
    return fit(decode((CATALOG / "images" / name).read_bytes()).rgb, (48, 48))


def amounts(videos, motion):
    return [registration.fitted_amount(frames, motion, 10)[0] for frames in videos]


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("there", "back"),
    [
        ("pan left", "pan right"),
        ("pan up", "pan down"),
        ("zoom in", "zoom out"),
        ("rotate left", "rotate right"),
    ],
)
def test_opposite_prompts_move_the_camera_in_opposite_directions(animate, there, back):
    forth = amounts(animate(there), there)
    reverse = amounts(animate(back), there)
    assert min(forth) > 0 > max(reverse)
    assert np.mean(forth) > np.mean(reverse) + 0.15


@pytest.mark.heavy
def test_unknown_words_do_not_turn_a_pan_around(animate):
    assert np.mean(amounts(animate("pan right, qwrtz the blorp"), "pan right")) > 0.1


@pytest.mark.heavy
def test_frame_zero_resembles_its_picture_and_no_other(animate):
    videos = animate("pan right")
    pictures = [np.asarray(picture(name)) for name in PICTURES]
    for index, frames in enumerate(videos):
        likeness = [registration.psnr(frames[0], each) for each in pictures]
        assert likeness[index] == max(likeness)
        assert likeness[index] > 20


@pytest.mark.heavy
def test_larger_motion_scales_move_more(animate):
    means = [np.mean(amounts(animate("pan right", motion_scale=scale), "pan right")) for scale in (0, 2)]
    assert means[1] > 1.3 * means[0] > 0


@pytest.mark.heavy
def test_loops_end_nearer_their_beginning_than_they_have_been(animate):
    for frames in animate("pan right", motion_scale=5):
        away = np.abs(frames[1:].astype(int) - frames[0]).mean((1, 2, 3))
        assert away[-1] < 0.7 * away.max()


@pytest.mark.heavy
@pytest.mark.parametrize("effect", ["sway", "waves", "flicker", "pulse"])
def test_effects_move_more_than_a_still_video(animate, effect):
    moved, still = (
        np.mean([registration.effect_amount(frames, effect) for frames in animate(prompt)])
        for prompt in (effect, "still")
    )
    assert moved > still + 0.05
