"""How far the host may run ahead of a device, by marks made up here; and that the denoising never reads the device."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from pia_ray.config.knobs import AnimationParams
from pia_ray.pia.denoising.denoise import denoise
from pia_ray.pia.denoising.schedulers import SCHEDULERS, make_scheduler
from pia_ray.pia.device.timing import MOST_AHEAD, RunAheadLimit, Stopwatch, record_event
from pia_ray.pia.evaluation import Branch, Evaluation
from pia_ray.testing import make_pipeline_folder

CPU = torch.device("cpu")


class Point:
    """A point in a queue that records when it is waited for."""

    def __init__(self, number: int, waited: list[int]) -> None:
        self.number = number
        self.waited = waited

    def synchronize(self) -> None:
        self.waited.append(self.number)


def test_the_host_waits_for_a_step_long_before_and_never_for_the_last_ones() -> None:
    limit, waited = RunAheadLimit(), list[int]()
    for step in range(10):
        limit.step(Point(step, waited))
        assert waited == list(range(max(0, step + 1 - MOST_AHEAD)))


def test_on_a_cpu_there_is_nothing_to_wait_for_and_time_is_the_hosts() -> None:
    assert record_event(CPU) is None
    watch = Stopwatch(CPU)
    before = time.perf_counter()
    while time.perf_counter() == before:
        pass
    assert watch.stop().seconds > 0


@pytest.fixture(scope="module")
def scheduler_config(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = make_pipeline_folder(tmp_path_factory.mktemp("checkpoint"))
    return SCHEDULERS["ddim"][0].load_config(Path(folder) / "scheduler")


@pytest.mark.parametrize("scheduler", list(SCHEDULERS))
def test_no_scheduler_reads_the_latents_back_between_two_steps(scheduler: str, scheduler_config: Any) -> None:
    """On torch's meta device tensors have no values: whatever would wait for a GPU to read one raises here."""
    params = AnimationParams(prompt="sea", num_inference_steps=4, num_frames=2, scheduler=scheduler, guidance_scale=4.0)
    with torch.device("meta"):
        noise, condition = torch.empty(4, 2, 8, 8), torch.empty(4, 1, 8, 8)
        prompt, mask = torch.empty(7, 32), torch.empty(1, 2, 1, 1)
    program = denoise(
        params,
        schedulers=[make_scheduler(scheduler_config, scheduler, steps=4)],
        noise=noise,
        fresh_noise=lambda: noise,
        condition=condition,
        branches=(Branch(prompt, mask, condition, text="negative_prompt"), Branch(prompt, mask, condition)),
        generator=torch.Generator().manual_seed(0),
    )
    evaluation = next(program)
    evaluations = 0
    try:
        while True:
            assert isinstance(evaluation, Evaluation)
            assert evaluation.latents.is_meta
            evaluations += 1
            evaluation = program.send(torch.empty(2, 4, 2, 8, 8, device="meta"))
    except StopIteration as end:
        assert end.value.is_meta
    assert evaluations >= 4
