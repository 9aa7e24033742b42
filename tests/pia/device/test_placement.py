"""Sizes of forwards: nothing is lost in the cutting, and no device gets more at once than it runs well."""

from __future__ import annotations

import pytest
import torch

from pia_ray.config.model import ModelConfig
from pia_ray.pia.device.placement import CPU_FORWARD_PIXELS, SDPA_ROWS, forward_sizes, layout_of, most_evaluations

CPU = torch.device("cpu")
CUDA = torch.device("cuda")


@pytest.mark.parametrize("device", [CPU, CUDA])
@pytest.mark.parametrize("num", range(1, 40))
def test_every_evaluation_is_in_exactly_one_forward(num: int, device: torch.device) -> None:
    for limit in (1, 2, 3, 8):
        sizes = forward_sizes(num, limit, device=device)
        assert sum(sizes) == num
        assert all(1 <= size <= limit for size in sizes)


def test_forwards_on_a_gpu_are_powers_of_two() -> None:
    assert forward_sizes(11, 8, device=CUDA) == [8, 2, 1]


def test_small_rows_share_a_forward_on_a_cpu_up_to_what_its_caches_hold() -> None:
    assert most_evaluations(8, 16, 16, 16, device=CPU, most_positions=None) == CPU_FORWARD_PIXELS // 16**3
    assert most_evaluations(1, 16, 16, 16, device=CPU, most_positions=None) == 2


def test_rows_of_full_size_run_one_evaluation_at_a_time_on_a_cpu() -> None:
    assert most_evaluations(8, 16, 64, 64, device=CPU, most_positions=None) == 1


def test_attention_on_a_gpu_never_gets_more_rows_than_its_kernels_take() -> None:
    for side in (16, 64, 128, 300):
        bound = max(1, min(128, SDPA_ROWS // side**2))
        assert most_evaluations(64, 16, side, side, device=CUDA, most_positions=SDPA_ROWS) == bound
        assert most_evaluations(64, 16, side, side, device=CUDA, most_positions=None) == 128


def test_weights_are_channels_last_except_where_a_gpu_runs_the_layers_of_diffusers() -> None:
    resident, offloaded = (ModelConfig(name="tiny", base="somewhere", offload=how) for how in ("none", "model"))
    assert layout_of(resident, CUDA) is layout_of(resident, CPU) is layout_of(offloaded, CPU) is torch.channels_last
    assert layout_of(offloaded, CUDA) is torch.contiguous_format
