"""Upscalers: tiles do not show, memory decides their size, and a file that is not an upscaler is refused."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from pia_ray.animation import Animation
from pia_ray.config.knobs import AnimationParams
from pia_ray.config.model import ModelConfig
from pia_ray.errors import NonFiniteFrames, OutOfMemory, WeightsError
from pia_ray.media.video import probe
from pia_ray.pia.animator import Animator
from pia_ray.pia.device.memory import evaluations_that_fit
from pia_ray.pia.loading.load import assemble
from pia_ray.pia.loading.upscaler_file import read_upscaler
from pia_ray.pia.upscaler import LEAST_TILE, MARGIN, Upscaler
from pia_ray.testing import make_pipeline_folder
from pia_ray.types import AnimationRequest
from pia_ray.weights import resolve

CPU = torch.device("cpu")


class Blur(torch.nn.Module):
    """Nearest pixels, then a 5 x 5 mean: sees 2 px round each, which the margin of a tile covers."""

    def __init__(self, scale: int = 2, *, most_px: int = 10**9) -> None:
        super().__init__()
        self.scale = scale
        self.most_px = most_px
        self.weight = torch.nn.Parameter(torch.full((3, 1, 5, 5), 1 / 25))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        if pixels.shape[2] * pixels.shape[3] > self.most_px:
            raise torch.OutOfMemoryError("out of memory")
        if self.weight.dtype == torch.float16:
            return torch.full_like(pixels, torch.nan)
        large = torch.nn.functional.interpolate(pixels, scale_factor=self.scale)
        padded = torch.nn.functional.pad(large, (2, 2, 2, 2), mode="replicate")
        return torch.nn.functional.conv2d(padded, self.weight, groups=3)


def upscaler(network: torch.nn.Module, scale: int = 2, **how: Any) -> Upscaler:
    return Upscaler(network, scale, "blur", CPU, how.pop("dtype", torch.float32), **how)


def frames_of(height: int, width: int, count: int = 1) -> np.ndarray[Any, Any]:
    """Smooth frames with some detail, each another."""
    y, x = np.mgrid[:height, :width]
    waves = [np.stack([np.sin(x / 5 + n), np.cos(y / 7), np.sin((x + y) / 9 + n)], -1) for n in range(count)]
    return (127 + 120 * np.stack(waves)).astype(np.uint8)


@pytest.mark.parametrize(("height", "width"), [(90, 150), (64, 64), (33, 97), (8, 8)])
def test_tiles_give_what_the_whole_frame_gives(height: int, width: int) -> None:
    frames = frames_of(height, width, 2)
    whole = upscaler(Blur()).enlarge(frames, 2)
    assert whole.shape == (2, 2 * height, 2 * width, 3)
    np.testing.assert_array_equal(upscaler(Blur(), tile=32).enlarge(frames, 2), whole)


@pytest.mark.parametrize(("scale", "factor"), [(4, 2), (2, 4), (3, 2)])
def test_a_network_of_another_scale_gives_the_size_that_was_asked_for(scale: int, factor: int) -> None:
    frames = frames_of(60, 100)
    enlarged = upscaler(Blur(scale), scale).enlarge(frames, factor)
    assert enlarged.shape == (1, factor * 60, factor * 100, 3)
    tiled = upscaler(Blur(scale), scale, tile=32).enlarge(frames, factor)
    assert np.abs(tiled.astype(int) - enlarged).max() <= 1
    smooth = np.asarray(Image.fromarray(frames[0]).resize((factor * 100, factor * 60), Image.Resampling.BICUBIC))
    assert np.abs(smooth.astype(int) - enlarged[0]).mean() < 12


def test_tiles_shrink_where_memory_runs_out_and_stay_small() -> None:
    frames = frames_of(200, 300)
    small = upscaler(Blur(most_px=(64 + 2 * MARGIN) ** 2))
    np.testing.assert_array_equal(small.enlarge(frames, 2), upscaler(Blur()).enlarge(frames, 2))
    assert small.tile == 64
    assert small.reserved_bytes < upscaler(Blur()).reserved_bytes


def test_a_row_fails_where_not_even_the_smallest_tile_fits() -> None:
    with pytest.raises(OutOfMemory, match=f"{LEAST_TILE} px"):
        upscaler(Blur(most_px=10)).enlarge(frames_of(40, 40), 2)


def test_a_network_that_overflows_half_precision_goes_on_in_float32() -> None:
    half = upscaler(Blur().half(), dtype=torch.float16)
    expected = upscaler(Blur()).enlarge(frames_of(40, 40), 2)
    assert np.abs(half.enlarge(frames_of(40, 40), 2).astype(int) - expected).max() <= 1  # its weights stay rounded
    assert half.dtype == torch.float32


def test_nan_in_float32_fails_the_row() -> None:
    network = Blur()
    network.weight.data.fill_(torch.nan)
    with pytest.raises(NonFiniteFrames):
        upscaler(network).enlarge(frames_of(40, 40), 2)


@pytest.fixture(scope="module")
def spandrel() -> Any:
    """spandrel, also beside a torch for which there is no torchvision: it takes three names of that at its import."""
    pytest.importorskip("einops", reason="spandrel needs it")
    found = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "torchvision"}
    absent = not found and not _imports("torchvision")
    if absent:
        parts = {name: ModuleType(name) for name in ("torchvision", "torchvision.transforms")}
        functional: Any = ModuleType("torchvision.transforms.functional")
        functional.InterpolationMode = functional.rotate = functional.normalize = None
        sys.modules.update({**parts, functional.__name__: functional})
    try:
        return pytest.importorskip("spandrel", reason="the extra upscale is not installed")
    finally:
        for name in [name for name in sys.modules if absent and name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]  # transformers would take it for the real one


def _imports(name: str) -> bool:
    try:
        __import__(name)
    except (ImportError, RuntimeError):
        return False
    return True


def network_of(kind: str, scale: int) -> torch.nn.Module:
    """A tiny network with random weights in the layout of published files."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if kind == "compact":
            from spandrel.architectures.Compact import Compact

            compact: torch.nn.Module = Compact(num_feat=4, num_conv=1, upscale=scale)
            return compact
        from spandrel.architectures.ESRGAN import ESRGAN

        esrgan: torch.nn.Module = ESRGAN(num_filters=4, num_blocks=1, scale=scale)
        return esrgan


@pytest.mark.parametrize(("kind", "scale"), [("compact", 2), ("compact", 4), ("esrgan", 4)])
@pytest.mark.parametrize("wrapped", [False, True])
def test_published_layouts_are_read_and_run(
    spandrel: Any, tmp_path: Path, kind: str, scale: int, wrapped: bool
) -> None:
    network = network_of(kind, scale)
    path = tmp_path / ("x.pth" if wrapped else "x.safetensors")
    if wrapped:
        torch.save({"params": {}, "params_ema": network.state_dict()}, path)
    else:
        save_file(network.state_dict(), path)
    read = read_upscaler(path, CPU)
    assert read.scale == scale
    frames = frames_of(24, 32)
    with torch.inference_mode():
        values = network(torch.from_numpy(frames).permute(0, 3, 1, 2) / 255)
    expected = (values.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    np.testing.assert_array_equal(read.enlarge(frames, scale), expected)


def test_the_animations_of_a_model_with_an_upscaler_are_enlarged_by_it_and_leave_it_memory(
    spandrel: Any, tmp_path: Path
) -> None:
    save_file(network_of("compact", 4).state_dict(), tmp_path / "x.safetensors")
    folder = make_pipeline_folder(tmp_path / "model", vae_factor=4)
    defaults = {"num_inference_steps": 1, "num_frames": 2, "upscale": 2}
    settings: dict[str, Any] = {"device": "cpu", "long_edge": 32, "size_step": 16, "memory_gib": 1}
    model = ModelConfig(name="tiny", base=str(folder), defaults=defaults, **settings)
    with_upscaler = model.model_copy(update={"upscaler": str(tmp_path / "x.safetensors")})
    picture = Image.effect_noise((32, 32), 60).convert("RGB")
    with Animator(with_upscaler, batch_size=1) as animator:
        (animation,) = animator.animate([AnimationRequest(picture, AnimationParams(prompt="a"))])
    assert isinstance(animation, Animation)
    assert animation.frames.shape == (2, 32, 32, 3)
    assert animation.upscale is not None
    assert animation.upscale(animation.frames, 2).shape == (2, 64, 64, 3)
    facts = probe(animation.encode().content)
    assert (facts.width, facts.height) == (64, 64)
    size = {"num_frames": 2, "height": 8, "width": 8}
    parts = [assemble(resolve(each), each) for each in (model, with_upscaler)]
    plain, less = (evaluations_that_fit(each, **size) or 0 for each in parts)
    assert less < plain


def test_a_file_that_is_not_an_upscaler_is_refused(spandrel: Any, tmp_path: Path) -> None:
    def refused(said: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, tmp_path / "x.safetensors")
        with pytest.raises(WeightsError, match=said):
            read_upscaler(tmp_path / "x.safetensors", CPU)

    refused("no network that spandrel knows", {"lora_unet.alpha": torch.ones(1)})
    weights = network_of("compact", 4).state_dict()
    refused("is incomplete or damaged", {name: tensor for name, tensor in weights.items() if name != "body.2.bias"})
    refused("of scale 1 from 3 to 3 channels", network_of("compact", 1).state_dict())


def test_a_pickle_that_would_run_code_is_refused(spandrel: Any, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (print, ("ran",))

    torch.save({"body.0.weight": Evil()}, tmp_path / "x.pth")
    with pytest.raises(WeightsError):
        read_upscaler(tmp_path / "x.pth", CPU)
