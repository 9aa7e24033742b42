from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pia_ray.config.model import ModelConfig
from pia_ray.errors import ConfigError
from pia_ray.pia.device.cpu_time import TFLOP_PER_S_A_CORE, full_row_s, slow_on_cpu
from pia_ray.pia.device.placement import device_of
from pia_ray.weights import FULL_SIZE_BYTES, is_full_size

CARD = Path(__file__).parents[3] / "benchmarks" / "cards" / "2-cpus-x86-64-demo.json"


def test_the_time_of_a_row_on_a_cpu_is_by_the_speed_on_the_card() -> None:
    card = json.loads(CARD.read_text())
    assert pytest.approx(card["useful_tflop_per_s"] / card["machine"]["cpus"], rel=0.03) == TFLOP_PER_S_A_CORE
    assert full_row_s(2) == pytest.approx(2 * full_row_s(4))
    assert "some 2.7 hours with a full-size model on 2 cores" in slow_on_cpu(2)


def test_models_of_the_hub_and_of_a_gigabyte_are_full_size_and_the_demo_is_not(tmp_path: Path) -> None:
    assert is_full_size(ModelConfig(base="owner/model"))
    assert is_full_size(ModelConfig(base="s3://bucket/model"))
    assert not is_full_size(ModelConfig.named("demo"))
    (tmp_path / "unet").mkdir()
    with (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").open("wb") as file:
        file.truncate(FULL_SIZE_BYTES - 1)  # takes no space on the disk
        assert not is_full_size(ModelConfig(base=str(tmp_path)))
        file.truncate(FULL_SIZE_BYTES)
        assert is_full_size(ModelConfig(base=str(tmp_path)))


def test_a_worker_that_was_given_a_gpu_does_not_fall_back_to_its_cpu() -> None:
    assert ModelConfig(base="x").on_gpu.device == "cuda"
    assert ModelConfig(base="x", device="cpu").on_gpu.device == "cpu"
    assert device_of(ModelConfig(base="x", device="cpu")).type == "cpu"


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch finds a GPU here")
def test_a_gpu_that_torch_does_not_see_is_an_error_with_the_cause() -> None:
    with pytest.raises(ConfigError) as raised:
        device_of(ModelConfig(base="x").on_gpu)
    cause = "a build without CUDA" if torch.version.cuda is None else "docker run --gpus all"
    assert cause in raised.value.message
