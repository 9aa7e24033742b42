"""Each stage of the demo model's training takes steps, resumes exactly, and leaves a model that Animator loads."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pia_ray import AnimationParams, AnimationRequest, Animator, ModelConfig
from pia_ray.pia.denoising.affinity import TABLES, affinity
from training import export, registration, unet, vae
from training.draws import Draws
from training.masks import AMOUNTS, masks
from training.models import make_tokenizer
from training.motions import render
from training.optimizer import orthogonal
from training.prompts import MOTIONS, PHRASES, prompt, words
from training.worlds import Worlds, make_worlds, views


@pytest.fixture(scope="module")
def worlds() -> Worlds:
    return make_worlds(8, Draws(1), side=160, together=4)


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory, worlds):
    folder = tmp_path_factory.mktemp("training")
    torch.save({"pictures": worlds.pictures, "kinds": worlds.kinds}, folder / "worlds.pt")
    vae.main(["--out", str(folder), "--steps", "2", "--every", "9"])
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory, vae_folder):
    """A folder with two steps of the UNet's training and their log, and the state at their end."""
    folder = tmp_path_factory.mktemp("unet")
    return folder, unet_main(folder, vae_folder, "--every", "1")


@pytest.fixture(scope="module")
def exported(tmp_path_factory, vae_folder, trained):
    """The folder of the model that was trained."""
    out = tmp_path_factory.mktemp("exported") / "model"
    export.main(["--vae", str(vae_folder), "--unet", str(trained[0] / "unet.pt"), "--out", str(out)])
    return out


def video(worlds: Worlds, motion: str, *, height: int = 64, width: int = 64, seed: int = 5):
    """The rendered frames as an Animator would give them, uint8 [16, H, W, 3], and what asked for them."""
    made = render(
        worlds,
        Draws(seed),
        motions=torch.tensor([MOTIONS.index(motion)] * 6),
        frames=torch.arange(1, 16),
        num_frames=16,
        height=height,
        width=width,
    )
    plain = (~made.loops).nonzero()[0, 0]
    frames = (made.frames[plain] * 127.5 + 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return frames, float(made.amounts[plain])


def test_worlds_are_the_same_for_the_same_seed_and_not_blank(worlds):
    again = make_worlds(8, Draws(1), side=160, together=4)
    assert torch.equal(again.pictures, worlds.pictures)
    assert worlds.pictures.shape == (8, 3, 160, 160)
    assert all(picture.float().std() > 3 for picture in worlds.pictures)


def test_views_have_the_asked_size_and_range(worlds):
    seen = views(worlds, 3, 48, 64, Draws(2))
    assert seen.shape == (3, 3, 48, 64)
    assert seen.abs().max() <= 1


@pytest.mark.parametrize("motion", ["pan left", "pan right", "pan up", "pan down", "zoom in", "rotate right"])
def test_the_fitted_amount_of_a_rendered_camera_motion_is_the_asked_one(worlds, motion):
    frames, amount = video(worlds, motion)
    fitted, _ = registration.fitted_amount(frames, motion, 10)
    assert fitted == pytest.approx(amount, abs=0.08)


@pytest.mark.parametrize("motion", ["sway", "waves", "flicker", "pulse"])
def test_the_fitted_amount_of_a_rendered_effect_is_near_the_asked_one(worlds, motion):
    frames, amount = video(worlds, motion)
    assert registration.effect_amount(frames, motion) == pytest.approx(amount, abs=0.2)


def test_a_motion_is_as_large_relative_to_the_picture_at_every_size(worlds):
    small, amount = video(worlds, "pan right", height=64, width=64)
    large, again = video(worlds, "pan right", height=96, width=128)
    assert again == amount
    assert registration.fitted_amount(large, "pan right", 10)[0] == pytest.approx(
        registration.fitted_amount(small, "pan right", 10)[0], abs=0.08
    )


def test_frame_zero_of_every_motion_is_the_picture_itself(worlds):
    made = render(
        worlds,
        Draws(3),
        motions=torch.arange(len(MOTIONS)),
        frames=torch.tensor([0, 7]),
        num_frames=16,
        height=32,
        width=32,
    )
    assert torch.allclose(made.frames[:, 0], made.frames[:, 1], atol=1e-5)


@pytest.mark.parametrize("num_frames", [8, 16, 24])
def test_loops_end_where_they_began(worlds, num_frames):
    made = render(
        worlds,
        Draws(4),
        motions=torch.arange(len(MOTIONS)).repeat(3),
        frames=torch.tensor([num_frames // 2, num_frames - 1]),
        num_frames=num_frames,
        height=32,
        width=32,
    )
    assert made.loops.any()
    last = (made.frames[:, 2] - made.frames[:, 0]).abs().mean((1, 2, 3))
    assert last[made.loops].max() < 1e-3
    assert made.masks[made.loops, 1].eq(1).all()


@pytest.mark.parametrize("scale", range(len(TABLES)))
def test_masks_at_the_knots_are_the_tables_of_inference(scale):
    kind = scale // 3
    made = masks(
        torch.tensor([AMOUNTS[scale % 3]]), torch.tensor([kind == 1]), torch.tensor([kind == 2]), num_frames=16
    )
    assert made[0].tolist() == pytest.approx(affinity(scale, 16), abs=1e-6)


def test_no_motion_has_the_mask_of_ones():
    no = torch.tensor([False])
    assert masks(torch.tensor([0.0]), no, no, 12).eq(1).all()


def test_every_word_is_one_token_and_unknown_words_are_spelt_out():
    tokenizer = make_tokenizer()
    assert all(len(tokenizer.tokenize(word)) == 1 for word in words())
    ids = tokenizer("xylophone", add_special_tokens=False).input_ids
    assert len(ids) > 1
    assert tokenizer.decode(ids).strip() == "xylophone"


def test_prompts_hold_a_phrase_of_their_motion():
    draws = Draws(6)
    for motion in MOTIONS:
        text = prompt(motion, 0, draws)
        assert any(phrase in text for phrase in PHRASES[motion])


def test_newton_schulz_evens_out_singular_values():
    matrices = torch.randn(3, 12, 40, generator=torch.Generator().manual_seed(1)) * torch.logspace(-1, 1, 12)[:, None]
    values = torch.linalg.svdvals(orthogonal(matrices))
    assert values.min() > 0.5 and values.max() < 1.5


def test_the_autoencoder_resumes_exactly(tmp_path, vae_folder):
    quality = []
    for folder, runs in ((tmp_path / "once", (2,)), (tmp_path / "twice", (1, 1))):
        folder.mkdir()
        (folder / "worlds.pt").symlink_to(vae_folder / "worlds.pt")
        worlds = vae.kept_worlds(folder, 8, seed=7, device="cpu")
        for number in runs:
            torch.manual_seed(0)
            training = vae.Training(vae.models.make_vae((8, 16)), worlds, steps=9, rate=1e-3, decoder=False, seed=7)
            if (folder / "vae.pt").exists():
                training.restore(vae.checkpoints.load(folder / "vae.pt"))
            for _ in range(number):
                training.step()
            vae.checkpoints.save(training.state(), folder / "vae.pt")
        quality.append(training.validate(64))
    assert quality[0] == quality[1]
    once, twice = (vae.checkpoints.load(tmp_path / name / "vae.pt") for name in ("once", "twice"))
    assert once["done"] == twice["done"] == 2
    for name, value in once["average"].items():
        assert torch.equal(value, twice["average"][name])


def test_latents_are_standardized_without_changing_the_picture(worlds):
    torch.manual_seed(0)
    autoencoder = vae.models.make_vae((8, 16)).eval()
    pictures = views(worlds, 2, 32, 32, Draws(8))
    with torch.no_grad():
        before = autoencoder.decode(autoencoder.encode(pictures).latent_dist.mode()).sample
        vae.standardize(autoencoder, worlds, seed=1)
        posterior = autoencoder.encode(views(worlds, 64, 64, 64, Draws(9))).latent_dist
        after = autoencoder.decode(autoencoder.encode(pictures).latent_dist.mode()).sample
    assert torch.allclose(before, after, atol=1e-4)
    assert posterior.mean.mean((0, 2, 3)).abs().max() < 0.5
    assert posterior.mean.std((0, 2, 3)).sub(1).abs().max() < 0.4


def test_training_the_decoder_alone_leaves_the_latents(tmp_path, vae_folder):
    (tmp_path / "worlds.pt").symlink_to(vae_folder / "worlds.pt")
    vae.main(["--out", str(tmp_path), "--decoder-of", str(vae_folder), "--steps", "1", "--every", "9"])
    old, new = (vae.models.load_vae(folder) for folder in (vae_folder, tmp_path))
    picture = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(old.encode(picture).latent_dist.mean, new.encode(picture).latent_dist.mean)
    assert any(not torch.equal(a, b) for a, b in zip(old.parameters(), new.parameters(), strict=True))


def unet_main(folder, vae_folder, *options):
    folder.mkdir(exist_ok=True)
    if not (folder / "worlds.pt").exists():
        (folder / "worlds.pt").symlink_to(vae_folder / "worlds.pt")
    start = ["--model", str(vae_folder), "--out", str(folder), "--pixels", "4096", "--every", "99"]
    unet.main(["--phase", "effects", "--steps", "2", *start, *options])
    return unet.checkpoints.load(folder / "unet.pt")


@pytest.mark.heavy
def test_the_unet_resumes_exactly(tmp_path, vae_folder, trained):
    folder, once = trained
    worlds = vae.kept_worlds(folder, 8, seed=7, device="cpu")
    phase = replace(unet.PHASES["effects"], steps=2)
    stopped = unet.Training(phase, vae_folder, worlds, seed=7, device="cpu", pixels=4096)
    stopped.step()
    (tmp_path / "twice").mkdir()
    unet.save(stopped, "effects", tmp_path / "twice")
    twice = unet_main(tmp_path / "twice", vae_folder, "--resume")
    assert once["done"] == twice["done"] == 2
    for name, value in once["average"].items():
        assert torch.equal(value, twice["average"][name]), name


@pytest.mark.heavy
def test_training_exports_a_small_model_without_paths_that_animator_loads(exported):
    files = [path for path in exported.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 16_000_000
    folder = str(exported.parent.parent)  # of this run's tests
    assert not any(folder in path.read_text() for path in files if path.suffix == ".json")
    model = ModelConfig(name="fresh", base=str(exported), device="cpu", long_edge=32, size_step=16)
    with Animator(model) as animator:
        params = AnimationParams(prompt="pan left", num_inference_steps=2, num_frames=4, guidance_scale=1.0)
        [animation] = animator.animate([AnimationRequest(Image.new("RGB", (32, 32), "teal"), params)])
    assert animation.frames.shape == (4, 32, 32, 3)


@pytest.mark.heavy
def test_training_goes_on_from_an_exported_model(exported, trained):
    folder, state = trained
    worlds = vae.kept_worlds(folder, 8, seed=7, device="cpu")
    training = unet.Training(unet.PHASES["whole"], exported, worlds, seed=1, device="cpu", pixels=4096)
    for name, value in training.average.module.state_dict().items():
        if not name.startswith("guide."):  # training's own
            assert torch.allclose(value, state["average"][name], atol=2e-3), name  # float16 on the way
    assert all(map(math.isfinite, training.step().values()))


@pytest.mark.heavy
def test_latents_that_a_perfect_model_samples_are_the_true_ones_with_their_noise(exported, trained):
    worlds = vae.kept_worlds(trained[0], 8, seed=7, device="cpu")
    training = unet.Training(unet.PHASES["texture"], exported, worlds, seed=1, device="cpu", pixels=4096)
    sample = training._sample()
    timesteps, noise = torch.full((len(sample.latents),), 124), torch.randn(sample.latents.shape)

    def velocity(which, module, noisy, at, sample):
        keep = training._kept(at)
        return (keep.sqrt() * noisy - sample.latents) / (1 - keep).sqrt()

    predict, training._predict = training._predict, velocity
    keep = training._kept(timesteps)
    wanted = keep.sqrt() * sample.latents + (1 - keep).sqrt() * noise
    assert training._sampled(sample, timesteps, noise).allclose(wanted, atol=1e-4)
    training._predict = predict
    assert all(map(math.isfinite, training.step().values()))


def test_errors_of_detail_count_more_and_texture_is_its_amount_wherever_it_lies():
    flat, fine = torch.ones(1, 2, 3, 8, 8), torch.ones(1, 2, 3, 8, 8)
    fine[..., ::2] = -1
    assert unet.detailed_error(flat, 3.0).tolist() == pytest.approx([1.0], abs=1e-6)
    assert unet.detailed_error(fine, 0.0).tolist() == pytest.approx([1.0], abs=1e-6)
    assert unet.detailed_error(fine, 3.0)[0] > 2
    assert unet.texture_error(-fine, fine)[0] == 0
    less, more = (float(unet.texture_error(size * fine, fine)[0]) for size in (0.5, 1.5))
    assert less == pytest.approx(more, rel=0.01)
    assert unet.texture_error(flat, fine)[0] > unet.texture_error(0.5 * fine, fine)[0] > 0.1


def test_the_log_has_a_json_line_per_interval(trained):
    lines = [json.loads(line) for line in (trained[0] / "unet.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert all(np.isfinite([line[name] for name in ("error", "pointing", "placing")]).all() for line in lines)


def test_a_motion_that_is_not_there_is_refused_by_name(tmp_path, vae_folder, capsys):
    with pytest.raises(SystemExit):
        unet_main(tmp_path, vae_folder, "--weights", "fly=2")
    assert "fly" in capsys.readouterr().err


def test_a_still_video_is_also_shown_with_the_masks_of_motion(worlds):
    motions = torch.full((64,), MOTIONS.index("still"))
    made = render(worlds, Draws(3), motions=motions, frames=torch.arange(16), num_frames=16, height=32, width=32)
    assert made.amounts.eq(0).sum() >= 50  # the others have a style's mask
    moving = made.masks[:, 8] < 0.99
    assert 20 <= int((moving & made.amounts.eq(0)).sum()) <= 50


def test_the_guide_of_training_names_the_phases_in_their_order():
    named = re.findall(r"--phase (\w+)", (Path(unet.__file__).parent / "README.md").read_text("utf-8"))
    assert named == list(unet.PHASES)
