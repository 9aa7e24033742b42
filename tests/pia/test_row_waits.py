"""All waits of a whole row, from its start to its frames: the named ones, and no other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from pia_ray.animation import Animation
from pia_ray.config.model import ModelConfig
from pia_ray.pia.components import Components
from pia_ray.pia.engine import Engine, Row
from pia_ray.pia.loading.load import assemble
from pia_ray.prepare import prepare
from pia_ray.testing import make_pipeline_folder
from pia_ray.types import AnimationRequest
from pia_ray.weights import resolve
from tests.pia.fake_cuda import FakeRuntime
from tests.pia.fake_gpu import FakeGPU
from tests.pia.test_engine import ask, model_of
from tests.pia.test_gpu_waits import on_gpu


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    return model_of(make_pipeline_folder(tmp_path_factory.mktemp("checkpoint"), vae_factor=4))


@pytest.fixture(scope="module")
def components(model: ModelConfig) -> Components:
    return assemble(resolve(model), model)


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> FakeRuntime:
    runtime = FakeRuntime()
    runtime.install(monkeypatch)
    return runtime


@pytest.fixture
def gpu(runtime: FakeRuntime) -> Iterator[FakeGPU]:
    with FakeGPU() as fake:
        yield fake


def denoise(engine: Engine, request: AnimationRequest, model: ModelConfig) -> Row:
    """The row of the request after its last step; its frames are queued on the device."""
    row = engine.join(prepare(request, model))
    while engine.rows:
        engine.advance()
    return row


def test_a_row_waits_for_a_gpu_at_named_points_only(
    components: Components, model: ModelConfig, gpu: FakeGPU, runtime: FakeRuntime
) -> None:
    engine = Engine(on_gpu(components), batch_size=2)
    request = ask(model, num_inference_steps=2, num_frames=2)
    denoise(engine, request, model)
    assert gpu.waits == []
    assert set(runtime.waits) == {"seconds_on_gpu"}, "the first row of a size times the ways of its operators"
    runtime.waits.clear()

    row = denoise(engine, request, model)
    assert gpu.waits == []
    assert set(runtime.waits) == {"RunAheadLimit.step"}, "each step may wait for the one of two steps before"
    runtime.waits.clear()

    # On a thread of its own, with a stream of its own, while the next rows are denoised.
    assert isinstance(engine.finish(row), Animation)
    # Frames were copied to the host by then; the motion score reads whether its edges grow no more, and its value.
    assert runtime.waits == {"PendingFrames.wait": 1, "Stopwatch.seconds": len(row.times)}
    assert operators(gpu.waits) == ["equal", "equal", "__float__"]
    gpu.waits.clear()

    exact, latents = (denoise(engine, replace(request, output_type=output), model) for output in ("np", "latent"))
    assert gpu.waits == []
    assert isinstance(engine.finish(exact), Animation)
    assert gpu.waits == []
    assert isinstance(engine.finish(latents), Animation)
    assert operators(gpu.waits) == ["__bool__", "_to_copy"], "whether latents are finite, and their copy"


def operators(waits: list[str]) -> list[str]:
    return [wait.partition(" of ")[0] for wait in waits]
