"""Decodes that are compiled beside the stream give the frames of those that are not, and few kinds occur."""

from __future__ import annotations

import copy
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from pia_ray.config.model import ModelConfig
from pia_ray.pia.components import Components
from pia_ray.pia.decoding.decode import begin_decode_exactly
from pia_ray.pia.decoding.vae_decoder import COMPILED_FRAMES, VaeDecoder, decoder_of
from pia_ray.pia.loading.load import assemble
from pia_ray.pia.unet.background_compilation import BackgroundCompilation
from pia_ray.pia.unet.compilation import CompiledCode
from pia_ray.pia.unet.rewrites import restructure_vae
from pia_ray.testing import make_pipeline_folder
from pia_ray.weights import resolve


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Components:
    folder = make_pipeline_folder(tmp_path_factory.mktemp("checkpoint"), vae_factor=2)
    model = ModelConfig(name="tiny", base=str(folder), device="cpu", compile="off")
    parts = assemble(resolve(model), model)
    restructure_vae(parts.vae)
    return parts


@pytest.fixture
def graphs() -> list[str]:
    """The threads that compiled, one for each graph."""
    return []


@pytest.fixture
def compiling(plain: Components, graphs: list[str]) -> Components:
    """The same model, compiled by a backend that runs the graph as it is, at the second decode of a kind."""
    parts = replace(copy.deepcopy(plain), compile_mode="default")

    def count(graph: torch.fx.GraphModule, inputs: object) -> Callable[..., object]:
        graphs.append(threading.current_thread().name)
        return graph.forward

    decoder = decoder_of(parts)
    code = CompiledCode(mode="default", backend=count)  # type: ignore[arg-type]
    decoder._compilation = BackgroundCompilation(code, patience=1)
    return parts


def latents_of(frames: int, side: int = 4) -> torch.Tensor:
    return torch.randn(4, frames, side, side, generator=torch.Generator().manual_seed(frames))


def frames_of(parts: Components, latents: torch.Tensor) -> torch.Tensor:
    pending = begin_decode_exactly(parts, latents)
    pending.wait()
    return pending.to_host()


def wait_for(decoder: VaeDecoder, num: int) -> None:
    assert decoder._compilation is not None
    deadline = time.monotonic() + 60
    while len(decoder._compilation._ready) < num and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(decoder._compilation._ready) == num


def test_a_decode_runs_plain_while_another_thread_compiles_it_and_then_runs_that_code(
    plain: Components, compiling: Components, graphs: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    latents = latents_of(2 * COMPILED_FRAMES)
    expected = frames_of(plain, latents)
    for _ in range(3):
        torch.testing.assert_close(frames_of(compiling, latents), expected, rtol=0, atol=1e-6)
    wait_for(decoder_of(compiling), 1)
    for seed in (3, 4):  # other pictures: the same graph
        other = latents * seed
        torch.testing.assert_close(frames_of(compiling, other), frames_of(plain, other), rtol=0, atol=1e-6)
    assert graphs == ["compilation"], "the stream compiles nothing"
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_video_of_any_length_is_decoded_in_few_kinds_where_decodes_are_compiled(
    plain: Components, compiling: Components
) -> None:
    decoder_of(compiling)._compilation = BackgroundCompilation(
        CompiledCode(mode="default")
    )  # whose patience nothing here reaches
    kinds = set()
    for frames in (16, 7, 1):
        latents = latents_of(frames)
        decoded = begin_decode_exactly(compiling, latents)
        kinds.update(len(chunk) for chunk in decoded.on_host)
        torch.testing.assert_close(decoded.to_host(), frames_of(plain, latents), rtol=0, atol=1e-6)
    assert kinds == {COMPILED_FRAMES, 3, 1}


def test_a_model_and_its_variants_have_one_decoder_and_an_uncompiled_one_decodes_what_fits(plain: Components) -> None:
    assert decoder_of(replace(plain, version="with a LoRA")) is decoder_of(plain)
    assert decoder_of(copy.deepcopy(plain)) is not decoder_of(plain)
    assert decoder_of(plain).most_frames is None
