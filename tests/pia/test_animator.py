"""The Animator through its public door: lists in order, futures, cancel, deadlines, rows alone, its end."""

from __future__ import annotations

import logging
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError, wait
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pia_ray import Animation, AnimationParams, AnimationRequest, Animator, ModelConfig
from pia_ray.config.resolving import seed_from_id
from pia_ray.config.serve import ServeConfig
from pia_ray.errors import BadParameter, Cancelled, ConfigError, DeviceLost, RowError, Timeout, WeightsError
from pia_ray.media.video import probe
from pia_ray.pia import make_animator
from pia_ray.pia.components import Components
from pia_ray.pia.model_cache import cache_key
from pia_ray.testing import make_pipeline_folder
from tests.safety_checkers import ALWAYS, make_checker


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    folder = make_pipeline_folder(tmp_path_factory.mktemp("model"), vae_factor=4)
    defaults = {"num_inference_steps": 3, "num_frames": 4, "motion_scale": 1}
    return ModelConfig(name="tiny", base=str(folder), device="cpu", long_edge=32, size_step=16, defaults=defaults)


@pytest.fixture(scope="module")
def animator(model: ModelConfig) -> Iterator[Animator]:
    with Animator(model, batch_size=2) as animator:
        yield animator


def picture(width: int = 40, height: int = 40) -> Image.Image:
    return Image.effect_noise((width, height), 60).convert("RGB")


def ask(prompt: str = "a cat", row_id: str = "", deadline_s: float | None = None, **knobs: object) -> AnimationRequest:
    return AnimationRequest(picture(), AnimationParams(prompt=prompt, **knobs), id=row_id, deadline_s=deadline_s)


def long_request(**how: object) -> AnimationRequest:
    return ask(num_inference_steps=900, **how)


def test_results_come_in_the_order_of_the_requests_with_errors_in_their_places(animator: Animator) -> None:
    outcomes = animator.animate([ask(seed=1), ask(clip_skip=11), ask(seed=2), ask(seed=1)])
    assert isinstance(outcomes[1], BadParameter)
    first, third, again = (outcomes[n] for n in (0, 2, 3))
    assert isinstance(first, Animation)
    assert isinstance(third, Animation)
    assert isinstance(again, Animation)
    assert first.frames.shape == (4, 32, 32, 3)
    assert first.frames.dtype == np.uint8
    assert np.abs(first.frames.astype(int) - again.frames).max() > 1, "another picture of noise"
    assert np.abs(first.frames.astype(int) - third.frames).max() > 1


def test_knobs_that_are_not_given_come_from_the_model_and_the_result_says_what_was_used(animator: Animator) -> None:
    (animation,) = animator.animate([ask(row_id="cat-7")])
    assert isinstance(animation, Animation)
    assert animation.params.num_inference_steps == 3
    assert animation.params.motion_scale == 1
    assert animation.params.seed == seed_from_id("cat-7")
    assert (animation.params.width, animation.params.height) == (32, 32)
    assert animation.model.startswith("tiny@")
    assert animation.gpu_s > 0


def test_a_picture_takes_the_nearest_bucket_and_given_sizes_are_honoured(animator: Animator) -> None:
    wide = AnimationRequest(picture(90, 45), AnimationParams(prompt="x"))
    given = AnimationRequest(np.zeros((50, 60, 3), np.uint8), AnimationParams(prompt="x", width=40, height=24))
    sizes = [animation.frames.shape[1:3] for animation in animator.animate([wide, given])]
    assert sizes == [(16, 32), (24, 40)]


def test_a_saved_animation_plays_and_says_how_it_was_made(animator: Animator, tmp_path: Path) -> None:
    (animation,) = animator.animate([ask(row_id="one", seed=2**64 - 1)])
    assert isinstance(animation, Animation)
    animation.save(tmp_path / "one.mp4")
    facts = probe(tmp_path / "one.mp4")
    assert (facts.num_frames, facts.width, facts.height) == (4, 32, 32)
    assert facts.provenance["seed"] == str(2**64 - 1)


def test_an_animation_has_the_verdict_of_the_safety_checker_which_changes_no_frame(
    animator: Animator, model: ModelConfig, tmp_path: Path
) -> None:
    checker = make_checker(tmp_path, concepts=ALWAYS)
    request = AnimationRequest(np.zeros((32, 32, 3), np.uint8), AnimationParams(prompt="x", seed=1))
    (unchecked,) = animator.animate([request])
    with Animator(model.model_copy(update={"safety_checker": str(checker)})) as other:
        (checked,) = other.animate([request])
    assert (checked.nsfw, unchecked.nsfw) == (True, None)
    assert checked.model == unchecked.model
    assert np.abs(checked.frames.astype(int) - unchecked.frames).max() <= 1


def test_a_request_joins_rows_that_are_already_running_and_ends_before_them(animator: Animator) -> None:
    started = threading.Event()
    slow = animator.submit(long_request(), on_step=lambda done, total: started.set())
    assert started.wait(30)
    quick = animator.submit(ask())
    assert isinstance(quick.result(timeout=30), Animation)
    assert not slow.done()
    assert slow.cancel()


def test_a_cancelled_row_leaves_at_the_next_step_and_frees_its_place(animator: Animator) -> None:
    started = threading.Event()
    running = [animator.submit(long_request(), on_step=lambda done, total: started.set()) for _ in range(2)]
    assert started.wait(30)
    waiting = animator.submit(ask())
    for future in running:
        assert future.cancel()
    assert isinstance(waiting.result(timeout=30), Animation)
    with pytest.raises(CancelledError):
        running[0].result()


def test_a_row_past_its_deadline_fails_as_timeout_and_others_go_on(animator: Animator) -> None:
    late = animator.submit(long_request(deadline_s=0.2))
    fine = animator.submit(ask())
    with pytest.raises(Timeout, match=r"deadline of 0.2 s"):
        late.result(timeout=30)
    assert isinstance(fine.result(timeout=30), Animation)


def test_a_row_that_must_be_alone_waits_for_the_others_and_keeps_them_out(animator: Animator) -> None:
    order: list[str] = []
    began = threading.Event()

    def note(name: str) -> object:
        return lambda done, total: (order.append(name), began.set())

    first = animator.submit(ask(num_inference_steps=6), on_step=note("first"))
    assert began.wait(30)
    alone = animator.submit(ask(num_inference_steps=6), alone=True, on_step=note("alone"))
    last = animator.submit(ask(num_inference_steps=6), on_step=note("last"))
    for future in (first, alone, last):
        future.result(timeout=30)
    assert order == ["first"] * 6 + ["alone"] * 6 + ["last"] * 6


def test_steps_are_reported_one_by_one_up_to_the_last(animator: Animator) -> None:
    seen: list[tuple[int, int]] = []
    animator.submit(
        ask(num_inference_steps=5, scheduler="heun"), on_step=lambda done, total: seen.append((done, total))
    ).result()
    assert seen == [(n, 5) for n in range(1, 6)]


def test_rows_denoise_while_another_is_being_finished(animator: Animator) -> None:
    other_moved = threading.Event()
    waited: list[bool] = []

    def last_step(done: int, total: int) -> None:
        if done == total:
            waited.append(other_moved.wait(60))  # the frames are there; their caller keeps the last report busy

    first = animator.submit(ask(seed=1), on_step=last_step)
    second = animator.submit(
        ask(seed=2, num_inference_steps=60), on_step=lambda done, total: done > 5 and other_moved.set()
    )
    assert isinstance(first.result(timeout=90), Animation)
    assert waited == [True]
    assert isinstance(second.result(timeout=90), Animation)


def test_a_callback_may_close_the_animator(model: ModelConfig) -> None:
    animator = Animator(model, batch_size=2)

    def close(done: int, total: int) -> None:
        animator.close()

    futures = [animator.submit(long_request(), on_step=close), animator.submit(long_request())]
    for future in futures:
        with pytest.raises(Cancelled, match="closed"):
            future.result(timeout=60)
    animator.close()
    assert not [thread for thread in threading.enumerate() if thread is animator._thread]


@pytest.mark.heavy
def test_a_thread_gets_its_animation_when_the_main_thread_has_ended_and_none_outlives_the_program(
    model: ModelConfig,
) -> None:
    program = """
import atexit, sys, threading
atexit.register(lambda: print([each.name for each in threading.enumerate() if "-" in each.name]))  # runs last
from PIL import Image
from pia_ray import Animator, AnimationParams, AnimationRequest, ModelConfig

animator = Animator(ModelConfig.model_validate_json(sys.argv[1]), batch_size=1)

def work():
    threading.main_thread().join()
    request = AnimationRequest(Image.new("RGB", (32, 32)), AnimationParams(prompt="a cat"))
    print(animator.submit(request).result().frames.shape)
    long = AnimationParams(prompt="a cat", num_inference_steps=200)
    animator.submit(AnimationRequest(Image.new("RGB", (32, 32)), long))

threading.Thread(target=work).start()
"""
    done = subprocess.run(
        [sys.executable, "-c", program, model.model_dump_json()], capture_output=True, text=True, timeout=120
    )
    assert (done.stdout, done.returncode) == ("(4, 32, 32, 3)\n[]\n", 0), done.stderr


def test_many_threads_may_submit_at_once_and_each_gets_its_own_answer(animator: Animator) -> None:
    answers: dict[int, Animation] = {}
    image = picture()

    def call(seed: int) -> None:
        request = AnimationRequest(image, AnimationParams(prompt="a cat", seed=seed))
        answers[seed] = animator.submit(request).result()

    threads = [threading.Thread(target=call, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in range(6):
        (alone,) = animator.animate([AnimationRequest(image, AnimationParams(prompt="a cat", seed=seed))])
        assert isinstance(alone, Animation)
        assert answers[seed].params.seed == seed
        assert np.abs(answers[seed].frames.astype(int) - alone.frames).max() <= 1


def test_closing_fails_what_waits_and_what_runs_as_cancelled(model: ModelConfig) -> None:
    animator = Animator(model, batch_size=1)
    futures = [animator.submit(long_request()) for _ in range(3)]
    time.sleep(0.2)
    animator.close()
    for future in [*futures, animator.submit(ask())]:
        with pytest.raises(Cancelled, match="closed"):
            future.result(timeout=5)


def test_a_picture_that_is_none_fails_its_request_only(animator: Animator) -> None:
    bad = AnimationRequest(np.zeros((4, 4, 7), np.uint8), AnimationParams(prompt="x"))
    outcomes = animator.animate([bad, ask()])
    assert isinstance(outcomes[0], RowError)
    assert isinstance(outcomes[1], Animation)


def test_a_model_that_is_not_there_is_a_weights_error_that_says_where_it_looked(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="nowhere"):
        Animator(ModelConfig(name="none", base=str(tmp_path / "nowhere"), device="cpu"))


def test_a_warm_up_leaves_nothing_behind_and_a_row_that_cannot_be_animated_is_refused_by_its_size(
    model: ModelConfig, animator: Animator
) -> None:
    warm = [AnimationParams(prompt="warm-up", width=32, height=16, num_frames=2)]
    with Animator(model, batch_size=2, warm=warm) as warmed:
        assert not warmed._running
        assert not warmed._engine.rows
        request = ask(seed=1)
        (ours,), (theirs,) = warmed.animate([request]), animator.animate([request])
    assert isinstance(ours, Animation)
    assert isinstance(theirs, Animation)
    assert np.abs(ours.frames.astype(int) - theirs.frames).max() <= 1
    with pytest.raises(ConfigError, match=r"warm: 32x16x2: .*absent"):
        Animator(model, warm=[warm[0].model_copy(update={"lora": "absent"})])


def test_an_endpoints_engine_is_made_ready_for_the_sizes_of_its_config_before_its_first_request(
    model: ModelConfig, caplog: pytest.LogCaptureFixture
) -> None:
    """An engine is a replica's animator: Serve counts the replica as ready once it is made."""
    config = ServeConfig(models={"tiny": model}, warm="32x16x2, 16x16x2")
    sent = pickle.loads(pickle.dumps(config))  # as Serve sends it
    with caplog.at_level(logging.INFO, logger="pia_ray.pia.warm_up"), make_animator(sent, None) as engine:
        said = [record.getMessage() for record in caplog.records if record.name == "pia_ray.pia.warm_up"]
        assert [text.split(",")[0] for text in said] == ["warmed up for 32x16x2", "warmed up for 16x16x2"]
        (made,) = engine.animate([ask(seed=1)])
    assert isinstance(made, Animation)


def test_an_engine_that_cannot_animate_a_size_of_its_config_says_which_and_why(model: ModelConfig) -> None:
    deep = model.model_copy(update={"defaults": {**model.defaults, "clip_skip": 11}})  # the text encoder has 3 layers
    with pytest.raises(ConfigError, match=r"warm: 32x16x2: clip_skip"):
        make_animator(ServeConfig(models={"tiny": deep}, warm="32x16x2"), None)


def test_a_gpu_lost_while_a_row_joins_fails_that_row_and_all_later_ones_and_no_caller_waits(model: ModelConfig) -> None:
    class Lost(torch.nn.Module):
        def encode(self, values: torch.Tensor) -> object:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with Animator(model) as animator:
        key = cache_key(model)
        parts = animator._cache.get(key).components
        broken = Components(**{**parts.__dict__, "vae": _with_config(Lost(), parts.vae.config)})
        animator._cache.put(key, broken)
        with pytest.raises(DeviceLost, match="illegal memory access"):
            animator.submit(ask()).result(timeout=30)
        with pytest.raises(DeviceLost):
            animator.submit(ask()).result(timeout=30)


def _with_config(module: torch.nn.Module, config: object) -> torch.nn.Module:
    module.config = config  # type: ignore[assignment]
    return module


def test_a_callers_failing_callback_harms_nobody(animator: Animator) -> None:
    def fail(done: int, total: int) -> None:
        raise ValueError("a bug of the caller")

    careless = animator.submit(ask(seed=1), on_step=fail)
    other = animator.submit(ask(seed=2))
    assert isinstance(careless.result(timeout=30), Animation)
    assert isinstance(other.result(timeout=30), Animation)


def test_a_cancelled_future_counts_as_done_for_those_who_wait_on_it(animator: Animator) -> None:
    started = threading.Event()
    future = animator.submit(long_request(), on_step=lambda done, total: started.set())
    assert started.wait(30)
    future.cancel()
    assert wait([future], timeout=30).done == {future}


def test_what_one_request_cannot_be_is_refused(model: ModelConfig, animator: Animator) -> None:
    (outcome,) = animator.animate([ask(num_videos=3)])
    assert isinstance(outcome, BadParameter)
    with pytest.raises(ConfigError, match="batch_size"):
        Animator(model, batch_size=0)
