"""Few-step models: LoRAs merged into the model for every row, and the sampling that their authors state."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file, save_file

from pia_ray.config.few_step import FEW_STEP, FewStep
from pia_ray.config.knobs import AnimationParams
from pia_ray.config.model import ModelConfig
from pia_ray.config.resolving import lora_strengths, parse_params
from pia_ray.config.resolving import resolve as resolve_params
from pia_ray.errors import BadParameter
from pia_ray.pia.loading.load import assemble
from pia_ray.pia.loading.weight_sharing import WeightPool
from pia_ray.prepare import prepare
from pia_ray.testing import make_lora, make_pipeline_folder
from pia_ray.types import AnimationRequest
from pia_ray.weights import resolve, version
from tests.pia.test_engine import alone, assert_same, model_of, picture, reference


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pipeline_folder(tmp_path_factory.mktemp("tiny") / "pipeline", vae_factor=4)


@pytest.fixture(scope="module")
def file(plain: Path) -> Path:
    return make_lora(plain.parent / "few.safetensors", plain, parts=("unet",), alpha=2.0, rank=4, seed=3)


@pytest.fixture(scope="module")
def by_hand(plain: Path, file: Path) -> Path:
    """The same checkpoint as a folder whose UNet has the LoRA merged in at 0.5."""
    folder = shutil.copytree(plain, plain.parent / "by-hand")
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights, lora = load_file(path), load_file(file)
    flat = {name.removesuffix(".weight").replace(".", "_"): name for name in weights if name.endswith(".weight")}
    for key, up in lora.items():
        if key.endswith(".lora_up.weight"):
            down = lora[key.replace("lora_up", "lora_down")]
            name = flat[key.removeprefix("lora_unet_").removesuffix(".lora_up.weight")]
            delta = 0.5 * (2.0 / 4) * (up.flatten(1) @ down.flatten(1))
            weights[name] = weights[name] + delta.reshape(weights[name].shape)
    save_file(weights, path)
    return folder


def few_step(folder: Path, file: Path, kind: str, **settings: Any) -> ModelConfig:
    loras = {"few": {"path": str(file), "weight": 0.5, "merge": True}}
    return model_of(folder, loras=loras, few_step=kind, **settings)


def ask(model: ModelConfig, **knobs: Any) -> AnimationRequest:
    given = {"prompt": "a red cat", "negative_prompt": "dark", "num_frames": 4, "seed": 1, "width": 32, "height": 32}
    return prepare(AnimationRequest(picture(1), AnimationParams(**{**given, **knobs}), id="row"), model)


AS_PUBLISHED: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "hyper-8": ("DDIMScheduler", {"timestep_spacing": "trailing"}, {"num_inference_steps": 8}),
    "hyper-8-cfg": (
        "DDIMScheduler",
        {"timestep_spacing": "trailing"},
        {"num_inference_steps": 8, "guidance_scale": 5.0},
    ),
    "lightning-4": ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}, {"num_inference_steps": 4}),
    "lcm-4": ("LCMScheduler", {}, {"num_inference_steps": 4}),
    "tcd-4": ("TCDScheduler", {}, {"num_inference_steps": 4, "eta": 0.3}),
}


@pytest.mark.parametrize(
    "kind",
    [pytest.param(name, marks=[pytest.mark.heavy] if index > 1 else []) for index, name in enumerate(AS_PUBLISHED)],
)
def test_a_few_step_model_makes_the_frames_of_the_weights_merged_by_hand_sampled_as_published(
    kind: str, plain: Path, by_hand: Path, file: Path
) -> None:
    import diffusers

    name, settings, knobs = AS_PUBLISHED[kind]

    def published(pipe: Any) -> None:
        own = {**pipe.scheduler.config, "timestep_spacing": "leading", **settings}
        pipe.scheduler = getattr(diffusers, name).from_config(own)

    model = few_step(plain, file, kind)
    stated = ask(model_of(by_hand), guidance_scale=1.0).params.model_copy(update=knobs)
    asked = ask(model)
    assert asked.params.num_inference_steps == knobs["num_inference_steps"]
    theirs = reference(by_hand, AnimationRequest(asked.image, stated), tune=published)
    assert_same(alone(assemble(resolve(model), model), asked).frames, theirs)


def test_every_kind_states_the_same_knobs_with_valid_values() -> None:
    assert tuple(FEW_STEP) == get_args(FewStep)
    for knobs in FEW_STEP.values():
        assert set(knobs) == {"scheduler", "num_inference_steps", "guidance_scale", "eta"}
        parse_params({"prompt": "-", **knobs})


def test_a_few_step_model_has_its_sampling_and_a_row_has_the_last_word() -> None:
    model = ModelConfig(base="x", few_step="lcm-8", defaults={"num_inference_steps": 6})

    def steps(**knobs: Any) -> tuple[str, int]:
        params = parse_params({"prompt": "-", **knobs})
        found = resolve_params(params, {}, model_defaults=model.defaults, sampling=model.sampling)
        return found.scheduler, found.num_inference_steps

    assert steps() == ("lcm", 6)
    assert steps(preset="fast") == ("lcm", 6)
    assert steps(num_inference_steps=2) == ("lcm", 2)


def test_a_merged_lora_is_no_rows_choice_and_counts_in_the_version(plain: Path, file: Path) -> None:
    model = few_step(plain, file, "hyper-8")
    with pytest.raises(BadParameter, match="this model has none"):
        lora_strengths(parse_params({"prompt": "-", "lora": "few"}), model.lora_weights)
    chosen = model_of(plain, loras={"few": {"path": str(file), "weight": 0.5}})
    assert len({version(model), version(chosen), version(model_of(plain))}) == 3
    assert version(model) == version(few_step(plain, file, "lcm-4")), "sampling is in the knobs, not in the weights"


def test_models_that_share_a_base_share_what_the_merged_lora_leaves_alone(plain: Path, file: Path) -> None:
    pool, model = WeightPool(), few_step(plain, file, "hyper-8")
    models = [assemble(resolve(each), each, pool) for each in (model, model, model_of(plain))]
    first, again, other = (components.unet.state_dict() for components in models)
    own = dict(models[-1].unet.named_parameters())
    file_weights = load_file(plain / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(other[name], file_weights[name]) for name in own)
    shared = {name for name in own if first[name].data_ptr() == other[name].data_ptr()}
    assert "conv_in.weight" in shared
    assert {name for name in own if not torch.equal(first[name], other[name])} == set(own) - shared
    assert all(first[name].data_ptr() == again[name].data_ptr() for name in own)


def test_offload_of_single_layers_takes_merged_loras(plain: Path, file: Path) -> None:
    few_step(plain, file, "hyper-8", offload="sequential")
    with pytest.raises(ValueError, match="merge"):
        model_of(plain, loras={"few": str(file)}, offload="sequential")


def test_a_named_model_says_its_kind_in_a_yaml_file(tmp_path: Path, plain: Path, file: Path) -> None:
    from pia_ray.config.model import load_model

    text = {"base": str(plain), "loras": {"few": {"path": str(file), "merge": True}}, "few_step": "lcm-8"}
    (tmp_path / "fast.yaml").write_text(json.dumps(text), "utf-8")
    model = load_model(str(tmp_path / "fast.yaml"))
    assert model.sampling == {"scheduler": "lcm", "num_inference_steps": 8, "guidance_scale": 1.0, "eta": 0.0}
