"""`dtype: tf32`: all parts of a model run with products in TF32, and nothing else in the process does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pia_ray.animation import Animation
from pia_ray.config.catalog import CatalogConfig
from pia_ray.config.model import ModelConfig
from pia_ray.manifest.items import run_spec
from pia_ray.pia.components import Components
from pia_ray.pia.engine import Engine
from pia_ray.pia.loading.load import assemble
from pia_ray.testing import make_pipeline_folder
from pia_ray.weights import resolve
from tests.pia.test_engine import ask, model_of, run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pipeline_folder(tmp_path_factory.mktemp("checkpoint"), vae_factor=4)


def precisions(components: Components, model: ModelConfig) -> set[tuple[str, str]]:
    """The parts that run while a row is animated, each with torch's precision of products meanwhile."""
    found: set[tuple[str, str]] = set()
    for name in ("text_encoder", "unet"):
        getattr(components, name).register_forward_hook(
            lambda *_, name=name: found.add((name, torch.get_float32_matmul_precision()))
        )
    for name in ("encoder", "decoder"):
        getattr(components.vae, name).register_forward_hook(
            lambda *_, name=name: found.add((name, torch.get_float32_matmul_precision()))
        )
    (outcome,) = run(Engine(components, batch_size=1), [ask(model, num_frames=2, num_inference_steps=1)])
    assert isinstance(outcome, Animation)
    return found


@pytest.mark.parametrize("allowed", [True, False])
def test_every_part_runs_in_tf32_where_the_model_says_so(allowed: bool, folder: Path) -> None:
    model = model_of(folder)
    components = replace(assemble(resolve(model), model), tf32=allowed)  # as on a GPU
    expected = "high" if allowed else "highest"
    parts = ("text_encoder", "unet", "encoder", "decoder")
    assert precisions(components, model) == {(part, expected) for part in parts}
    assert torch.get_float32_matmul_precision() == "highest"


def test_on_a_cpu_tf32_is_float32(folder: Path) -> None:
    model = model_of(folder, dtype="tf32")
    components = assemble(resolve(model), model)
    assert not components.tf32
    assert (components.dtype, components.vae_dtype) == (torch.float32, torch.float32)


def test_tf32_has_a_work_key_of_its_own() -> None:
    demo = ModelConfig.named("demo")
    specs = []
    for dtype in ("auto", "float32", "tf32"):
        model = demo.model_copy(update={"dtype": dtype})
        config = CatalogConfig(manifest="m.csv", output="out", model=model)
        specs.append(run_spec(config, model, "version"))
    assert len({str(spec) for spec in specs}) == 3
