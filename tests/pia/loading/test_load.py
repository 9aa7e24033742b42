"""Several models built from the same files leave each other alone, and leave nothing behind."""

from __future__ import annotations

import gc
import threading
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from diffusers import AutoencoderKL, MotionAdapter, UNet2DConditionModel, UNetMotionModel

from pia_ray.config.model import ModelConfig
from pia_ray.pia.components import Components
from pia_ray.pia.loading.load import assemble
from pia_ray.testing import make_single_file_checkpoint, make_split_checkpoint
from pia_ray.weights import resolve


def load(base: Path, adapter: Path, **settings: Any) -> Components:
    model = ModelConfig(base=str(base), motion_adapter=str(adapter), device="cpu", **settings)
    return assemble(resolve(model), model)


def predict(components: Components) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    sample = torch.randn(1, 9, 2, 8, 8, generator=generator)
    words = torch.randn(2, 77, 32, generator=generator)
    with torch.inference_mode():
        return components.unet(sample, 500, encoder_hidden_states=words).sample


def test_building_a_second_model_from_one_motion_adapter_leaves_the_first_unchanged(tmp_path: Path) -> None:
    base, adapter, _ = make_split_checkpoint(tmp_path / "one")
    other, _, _, config = make_single_file_checkpoint(tmp_path / "two", seed=9)
    first = load(base, adapter)
    before = predict(first)
    second = load(other, adapter, config=str(config))
    assert torch.equal(predict(first), before)
    assert not torch.allclose(predict(second), before, atol=0.1)
    ours, theirs = first.unet.conv_in.weight, second.unet.conv_in.weight
    assert torch.equal(ours[:, 4:], theirs[:, 4:]), "mask and condition come from the adapter"
    assert not torch.equal(ours[:, :4], theirs[:, :4]), "the noisy latents from each base"


def test_no_copy_of_the_motion_adapter_stays_in_memory(tmp_path: Path) -> None:
    base, adapter, _ = make_split_checkpoint(tmp_path)
    components = load(base, adapter)
    gc.collect()
    assert not [found for found in gc.get_objects() if type(found) is MotionAdapter]
    assert components.unet.conv_in.weight.shape[1] == 9


def test_the_unet_of_a_base_and_an_adapter_is_that_of_diffusers(tmp_path: Path) -> None:
    base, adapter, _ = make_split_checkpoint(tmp_path)
    plain = UNet2DConditionModel.from_pretrained(base, subfolder="unet")
    theirs = UNetMotionModel.from_unet2d(plain, MotionAdapter.from_pretrained(adapter))
    ours = load(base, adapter).unet
    assert type(ours) is UNetMotionModel
    assert dict(ours.config) == dict(theirs.config)
    expected, found = theirs.state_dict(), ours.state_dict()
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    ("stored", "wanted"), [("float16", "float32"), ("bfloat16", "float16"), ("float32", "float16")]
)
def test_files_of_another_precision_are_converted_once_and_torchs_default_stays(
    tmp_path: Path, stored: str, wanted: Literal["float16", "float32"]
) -> None:
    base, adapter, _ = make_split_checkpoint(tmp_path)
    folders: list[tuple[Any, Path]] = [
        (UNet2DConditionModel, base / "unet"),
        (MotionAdapter, adapter),
        (AutoencoderKL, base / "vae"),
    ]
    for kind, folder in folders:
        kind.from_pretrained(folder).to(getattr(torch, stored)).save_pretrained(folder)
    defaults, ended = set[torch.dtype](), threading.Event()

    def watch() -> None:
        while not ended.wait(0.0002):
            defaults.add(torch.get_default_dtype())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        unet = load(base, adapter, dtype=wanted).unet
    finally:
        ended.set()
        watcher.join()
    assert defaults == {torch.float32}, "rows of another model may be denoising"
    assert {tensor.dtype for tensor in unet.state_dict().values()} == {getattr(torch, wanted)}
    exact = UNet2DConditionModel.from_pretrained(base / "unet").state_dict()["conv_out.weight"]
    assert torch.equal(unet.conv_out.weight, exact.to(getattr(torch, stored)).to(getattr(torch, wanted)))
