"""Schedulers by name: few steps, step counts that one cannot do, and many of them in one batch.

That each equals diffusers', in a batch of them, is in test_engine, where its list of names is.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from pia_ray.animation import Animation
from pia_ray.catalog.validate import validate
from pia_ray.config.catalog import CatalogConfig
from pia_ray.config.knob_types import Scheduler
from pia_ray.config.model import ModelConfig
from pia_ray.errors import BadParameter
from pia_ray.pia.components import Components
from pia_ray.pia.denoising.schedulers import SCHEDULERS, make_scheduler
from pia_ray.pia.engine import Engine
from pia_ray.pia.loading.load import assemble
from pia_ray.testing import make_pipeline_folder
from pia_ray.weights import resolve
from tests.pia.test_engine import ask, model_of, run

OWN = {
    "epsilon": {"prediction_type": "epsilon", "steps_offset": 1, "timestep_spacing": "leading"},
    "zero SNR": {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    return model_of(make_pipeline_folder(tmp_path_factory.mktemp("checkpoint"), vae_factor=4))


@pytest.fixture(scope="module")
def components(model: ModelConfig) -> Components:
    return assemble(resolve(model), model)


def test_every_name_has_a_scheduler() -> None:
    assert tuple(SCHEDULERS) == get_args(Scheduler)


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("own", OWN)
def test_betas_are_linear_and_samples_are_not_clipped_whatever_the_checkpoint_says(name: str, own: str) -> None:
    scheduler = make_scheduler(
        {**OWN[own], "beta_schedule": "scaled_linear", "clip_sample": True, "thresholding": False}, name, steps=4
    )
    assert (scheduler.config["beta_schedule"], scheduler.config["beta_start"]) == ("linear", 0.00085)
    assert not scheduler.config.get("clip_sample", False)
    assert scheduler.config["prediction_type"] == OWN[own]["prediction_type"]


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("own", OWN)
def test_a_number_of_steps_is_done_or_refused(name: str, own: str) -> None:
    for steps in (1, 2, 3, 50, 51, 999, 1000):
        try:
            scheduler = make_scheduler(OWN[own], name, steps=steps)
        except BadParameter as error:
            assert steps > 50, error
            assert error.field == "num_inference_steps"
        else:
            assert 0 <= float(scheduler.timesteps.min()) <= float(scheduler.timesteps.max()) <= 999


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("own", OWN)
def test_a_scheduler_is_what_diffusers_own_class_becomes_with_these_timesteps(name: str, own: str) -> None:
    made = make_scheduler(OWN[own], name, steps=7)
    plain = SCHEDULERS[name][0].from_config(made.config)
    plain.set_timesteps(7, device="cpu")
    assert vars(made).keys() == vars(plain).keys()
    for attribute, value in vars(plain).items():
        if isinstance(value, torch.Tensor):
            assert torch.allclose(getattr(made, attribute), value, equal_nan=True), attribute


SOLVERS = [name for name in SCHEDULERS if name.startswith(("dpm", "unipc", "deis", "sa-"))]


@pytest.mark.parametrize("spacing", ["leading", "linspace"])
@pytest.mark.parametrize("name", SOLVERS)
def test_as_many_steps_as_were_trained_are_refused_where_two_of_them_are_one(name: str, spacing: str) -> None:
    try:
        scheduler = make_scheduler({"timestep_spacing": spacing, "steps_offset": 1}, name, steps=1000)
    except BadParameter as error:
        assert "below 1000" in error.message
    else:
        assert len(scheduler.sigmas.unique()) == len(scheduler.sigmas)
        assert torch.isfinite(scheduler.sigmas).all()


@pytest.mark.parametrize("setting", ["use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"])
def test_a_name_says_the_sigmas_whatever_the_checkpoint_says(setting: str) -> None:
    own = {**OWN["epsilon"], setting: True}
    for name in ("euler", "dpm++2m", "unipc-karras", "heun"):
        plain, other = (make_scheduler(config, name, steps=5) for config in (OWN["epsilon"], own))
        assert torch.equal(plain.timesteps, other.timesteps), name
    euler, karras = (make_scheduler(own, name, steps=5).sigmas for name in ("euler", "euler-karras"))
    assert not torch.allclose(euler, karras)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_settings_of_another_class_are_left_out_without_a_log_line(name: str) -> None:
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("diffusers")
    logger.addHandler(handler)
    try:
        own = {"_class_name": "PNDMScheduler", "skip_prk_steps": True, "set_alpha_to_one": False, "made_up": 1}
        make_scheduler({**OWN["epsilon"], **own}, name, steps=4)
    finally:
        logger.removeHandler(handler)
    assert not records


@pytest.mark.parametrize("steps", [1, 2])
def test_all_of_them_in_one_batch_with_few_steps_give_frames(
    steps: int, components: Components, model: ModelConfig
) -> None:
    requests = [
        ask(model, seed=n, scheduler=name, num_inference_steps=steps, guidance_scale=1.0, num_frames=2)
        for n, name in enumerate(SCHEDULERS)
    ]
    outcomes = run(Engine(components, batch_size=8), requests)
    for request, outcome in zip(requests, outcomes, strict=True):
        assert isinstance(outcome, Animation), (request.params.scheduler, outcome)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "lcm": ({"scheduler": "lcm", "num_inference_steps": 51}, "scheduler lcm cannot do 51 steps, at most 50"),
    "overlap": ({"num_frames": 20, "context_frames": 4}, "context_overlap must be below context_frames (got 4 and 4)"),
    "loop": ({"num_frames": 40, "long_video": "chain", "motion_scale": 4}, "long_video chain cannot close a loop"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_knobs_cannot_do_together_is_told_of_every_row_before_the_run(case: str, tmp_path: Path) -> None:
    knobs, text = BAD[case]
    manifest = tmp_path / "manifest.csv"
    manifest.write_text(f"image,prompt,{','.join(knobs)}\na.png,sea,{','.join(map(str, knobs.values()))}\n", "utf-8")
    config = CatalogConfig(manifest=str(manifest), output=str(tmp_path / "out"), model=ModelConfig.named("demo"))
    (finding,) = validate(config, fetch=False)
    assert finding.code == "bad_parameter"
    assert text in str(finding.message)
    with pytest.raises(BadParameter, match=text.replace("(", r"\(").replace(")", r"\)")):
        ask(ModelConfig.named("demo"), **knobs)
