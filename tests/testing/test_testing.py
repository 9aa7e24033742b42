"""The shipped test parts do what tests elsewhere rely on."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pia_ray.animation import Animation
from pia_ray.config.knobs import AnimationParams
from pia_ray.config.model import ModelConfig
from pia_ray.errors import Cancelled, NonFiniteFrames, OutOfMemory, Timeout
from pia_ray.testing import FakeAnimator, draw_picture, make_catalog, make_pipeline_folder, make_split_checkpoint
from pia_ray.types import AnimationRequest

MODEL = ModelConfig(name="fake", base="embedded", long_edge=64, size_step=16, defaults={"num_inference_steps": 3})


def request(
    prompt: str = "a red sea", *, row: str = "r", deadline_s: float | None = None, **knobs: object
) -> AnimationRequest:
    picture = Image.open(io.BytesIO(draw_picture((64, 64), seed=1)))
    return AnimationRequest(picture, AnimationParams(prompt=prompt, **knobs), id=row, deadline_s=deadline_s)


def opened(path: Path) -> Image.Image:
    return Image.open(io.BytesIO(path.read_bytes()))


def frames(outcome: object) -> np.ndarray:
    assert isinstance(outcome, Animation), outcome
    return outcome.frames


@pytest.fixture(scope="module")
def pipeline_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pipeline_folder(tmp_path_factory.mktemp("pipeline"))


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_equal_arguments_give_equal_checkpoint_files_and_another_seed_others(pipeline_folder: Path, tmp_path: Path):
    again = make_pipeline_folder(tmp_path / "again")
    other = make_pipeline_folder(tmp_path / "other", seed=1)
    assert files_of(again) == files_of(pipeline_folder)
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert files_of(other)[weights] != files_of(again)[weights]


def test_making_a_checkpoint_leaves_the_global_random_state_alone(tmp_path: Path):
    import torch

    before = torch.get_rng_state()
    make_pipeline_folder(tmp_path / "p")
    assert torch.equal(torch.get_rng_state(), before)


def test_diffusers_own_pipeline_animates_a_tiny_checkpoint(pipeline_folder: Path):
    import torch
    from diffusers import PIAPipeline

    pipeline = PIAPipeline.from_pretrained(pipeline_folder)
    pipeline.set_progress_bar_config(disable=True)

    def run(prompt: str, motion_scale: int = 0) -> np.ndarray:
        return pipeline(
            image=request().image,
            prompt=prompt,
            motion_scale=motion_scale,
            num_frames=4,
            num_inference_steps=3,
            generator=torch.Generator().manual_seed(0),
            output_type="np",
        ).frames[0]

    made = run("red waves")
    assert made.shape == (4, 64, 64, 3)
    assert np.isfinite(made).all()
    assert 0.1 < made.std() < 0.4
    assert np.mean((made <= 0) | (made >= 1)) < 0.3  # a picture, not a clipped one
    assert np.abs(made - run("a cat")).mean() > 0.01
    assert np.abs(made - run("red waves", 8)).mean() > 0.001
    assert np.abs(made[1:] - made[:-1]).mean() > 0.01


def test_no_weight_of_a_tiny_checkpoint_is_constant(pipeline_folder: Path):
    from safetensors.torch import load_file

    for path in pipeline_folder.rglob("*.safetensors"):
        for name, weight in load_file(path).items():
            assert weight.float().std() > 1e-3, f"{path.name}: {name}"


def test_a_split_checkpoint_assembles_into_the_whole_one(pipeline_folder: Path, tmp_path: Path):
    import torch
    from diffusers import AutoencoderKL, MotionAdapter, UNet2DConditionModel, UNetMotionModel

    base, adapter, vae = make_split_checkpoint(tmp_path)
    unet = UNetMotionModel.from_unet2d(
        UNet2DConditionModel.from_pretrained(base, subfolder="unet"), MotionAdapter.from_pretrained(adapter)
    )
    whole = UNetMotionModel.from_pretrained(pipeline_folder, subfolder="unet").state_dict()
    assert unet.config["in_channels"] == 9
    assert all(torch.equal(weight, whole[name]) for name, weight in unet.state_dict().items())
    separate, own = AutoencoderKL.from_pretrained(vae), AutoencoderKL.from_pretrained(base, subfolder="vae")
    assert not torch.equal(separate.decoder.conv_in.weight, own.decoder.conv_in.weight)


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_the_other_kinds_of_checkpoint_say_so_in_their_configs(tmp_path: Path, factor: int):
    folder = make_pipeline_folder(
        tmp_path,
        prediction_type="v_prediction",
        zero_snr=True,
        vae_factor=factor,
        motion_mid_block=True,
        dtype="float16",
    )
    scheduler = json.loads((folder / "scheduler/scheduler_config.json").read_text())
    assert scheduler["prediction_type"] == "v_prediction"
    assert scheduler["rescale_betas_zero_snr"] is True
    assert json.loads((folder / "unet/config.json").read_text())["use_motion_mid_block"] is True
    assert len(json.loads((folder / "vae/config.json").read_text())["block_out_channels"]) == factor.bit_length()


def test_the_tokenizer_reads_the_same_from_its_new_and_its_old_files(pipeline_folder: Path, tmp_path: Path):
    from transformers import CLIPTokenizer

    new = CLIPTokenizer.from_pretrained(pipeline_folder / "tokenizer")
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((pipeline_folder / "tokenizer" / name).read_bytes())
    old = CLIPTokenizer.from_pretrained(tmp_path)
    text = "Red waves, a xylophone é 猫"
    assert old(text).input_ids == new(text).input_ids
    assert new("red").input_ids[1:-1] == [new.convert_tokens_to_ids("red</w>")]


def test_fake_frames_depend_on_image_params_and_seed_alone():
    with FakeAnimator(MODEL, batch_size=3) as animator:
        first, again, other = animator.animate([request(seed=1), request("else", seed=1), request(seed=2)])
    with FakeAnimator(MODEL) as animator:
        alone = animator.animate([request(seed=1)])[0]
    assert frames(first).shape == (16, 64, 64, 3)
    assert np.array_equal(frames(first), frames(again))
    assert np.array_equal(frames(first), frames(alone))
    assert not np.array_equal(frames(first), frames(other))


def test_fake_frames_move_with_the_motion_scale():
    with FakeAnimator(MODEL) as animator:
        still, large = (frames(one) for one in animator.animate([request(motion_scale=0), request(motion_scale=2)]))
    assert np.array_equal(still[3], np.roll(still[0], 3, axis=1))
    assert np.array_equal(large[3], np.roll(large[0], 9, axis=1))


def test_a_fake_animation_states_its_resolved_params():
    with FakeAnimator(MODEL) as animator:
        made = animator.animate([request(row="x", num_frames=2)])[0]
    assert isinstance(made, Animation)
    assert made.params.num_inference_steps == 3
    assert (made.params.width, made.params.height) == (64, 64)
    assert made.params.seed is not None
    assert made.model == animator.model_version
    assert made.id == "x"


def test_faults_by_prompt_fail_their_own_row_only():
    prompts = ["oom please", "fine", "nan", "an omen of doom"]
    with FakeAnimator(MODEL, batch_size=2) as animator:
        outcomes = animator.animate([request(prompt, row=prompt) for prompt in prompts])
    assert [type(one) for one in outcomes] == [OutOfMemory, Animation, NonFiniteFrames, Animation]


def test_a_hanging_row_ends_by_its_deadline():
    with FakeAnimator(MODEL) as animator:
        assert isinstance(animator.animate([request("hang", deadline_s=0.05)])[0], Timeout)


def test_hang_once_hangs_only_the_first_time_for_a_row(tmp_path):
    with FakeAnimator(MODEL, marks=tmp_path) as animator:
        outcomes = [animator.animate([request("hang-once", deadline_s=limit)])[0] for limit in (0.05, 60)]
    assert [type(one) for one in outcomes] == [Timeout, Animation]


def test_a_hanging_row_ends_by_being_taken_back_and_frees_its_place():
    with FakeAnimator(MODEL) as animator:
        hanging = animator.submit(request("hang"))
        assert hanging.cancel()
        assert isinstance(animator.animate([request()])[0], Animation)


def test_a_hanging_row_ends_by_close():
    animator = FakeAnimator(MODEL)
    hanging = animator.submit(request("hang"))
    animator.close()
    assert isinstance(hanging.exception(), Cancelled)
    assert isinstance(animator.submit(request()).exception(), Cancelled)


def test_steps_are_reported_in_order():
    steps: list[tuple[int, int]] = []
    with FakeAnimator(MODEL) as animator:
        animator.submit(request(), on_step=lambda done, total: steps.append((done, total))).result()
    assert steps == [(1, 3), (2, 3), (3, 3)]


def test_rows_of_a_batch_are_at_work_side_by_side():
    together = threading.Barrier(2, timeout=60)
    with FakeAnimator(MODEL, batch_size=2) as animator:
        both = [
            animator.submit(request(num_inference_steps=1), on_step=lambda *_: together.wait() and None) for _ in "ab"
        ]
        assert all(isinstance(one.result(), Animation) for one in both)


def test_a_row_takes_its_seconds_for_each_step():
    with FakeAnimator(MODEL, seconds_per_step=0.05) as animator:
        started = time.monotonic()
        animator.animate([request()])
    assert time.monotonic() - started >= 0.15


DIE = """
import sys
from pathlib import Path
import numpy as np
from pia_ray import AnimationParams, AnimationRequest, ModelConfig
from pia_ray.testing import FakeAnimator

animator = FakeAnimator(ModelConfig(name="fake", base="embedded"), marks=Path(sys.argv[1]))
picture = np.zeros((64, 64, 3), np.uint8)
animator.animate([AnimationRequest(picture, AnimationParams(prompt=sys.argv[2]), id="row/1")])
animator.close()
"""


def test_die_ends_the_process_each_time_and_die_once_only_the_first_time(tmp_path: Path):
    def exit_code(prompt: str) -> int:
        return subprocess.run([sys.executable, "-c", DIE, str(tmp_path), prompt], check=False).returncode

    assert [exit_code(prompt) for prompt in ("die", "die", "die-once", "die-once")] == [137, 137, 137, 0]


@pytest.mark.parametrize("kind", ["parquet", "csv", "tsv", "jsonl"])
def test_a_catalogue_lists_every_picture_in_every_format(tmp_path: Path, kind: str):
    manifest = make_catalog(tmp_path, rows=7, format=kind)
    if kind == "parquet":
        records = pq.read_table(manifest).to_pylist()
    elif kind == "jsonl":
        records = [json.loads(line) for line in manifest.read_text().splitlines()]
    else:
        with manifest.open(newline="") as stream:
            records = list(csv.DictReader(stream, delimiter="\t" if kind == "tsv" else ","))
    assert [record["id"] for record in records] == [f"item-{row:06d}" for row in range(7)]
    sizes = [opened(tmp_path / record["image"]).size for record in records]
    assert sizes[:4] == [(96, 64), (64, 96), (64, 64), (96, 64)]
    assert len({(tmp_path / record["image"]).read_bytes() for record in records}) == 7
    assert all(0 <= int(record["seed"]) < 2**64 for record in records)


def test_the_broken_share_of_a_catalogue_is_exact_and_of_three_kinds(tmp_path: Path):
    manifest = make_catalog(tmp_path, rows=30, broken=0.2, seed=3)
    kinds = []
    for record in pq.read_table(manifest).to_pylist():
        path = tmp_path / record["image"]
        if not path.exists():
            kinds.append("missing")
        elif path.read_bytes().startswith(b"<!doctype html>"):
            kinds.append("html")
        else:
            try:
                opened(path).load()
            except (OSError, SyntaxError):
                kinds.append("truncated")
    assert sorted(kinds) == ["html"] * 2 + ["missing"] * 2 + ["truncated"] * 2


def test_equal_arguments_give_an_equal_catalogue(tmp_path: Path):
    one, two = make_catalog(tmp_path / "1", rows=5, broken=0.4), make_catalog(tmp_path / "2", rows=5, broken=0.4)
    assert files_of(one.parent) == files_of(two.parent)
