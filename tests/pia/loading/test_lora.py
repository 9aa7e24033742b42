"""LoRAs: equal to diffusers with peft, chosen per row, and variants of a model that leave each other alone."""

from __future__ import annotations

import csv
import json
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from pia_ray.animation import Animation
from pia_ray.cli.parser import make_parser
from pia_ray.config.catalog import CatalogConfig
from pia_ray.config.knobs import AnimationParams
from pia_ray.config.model import ModelConfig
from pia_ray.config.resolving import parse_params
from pia_ray.errors import BadParameter, WeightsError
from pia_ray.manifest import open_manifest, plan
from pia_ray.pia.animator import Animator
from pia_ray.pia.components import Components
from pia_ray.pia.device.memory import evaluations_that_fit, variant_bytes, variant_room, weight_bytes
from pia_ray.pia.engine import Engine
from pia_ray.pia.loading.load import assemble
from pia_ray.pia.loading.lora import variant
from pia_ray.pia.model_cache import Model
from pia_ray.prepare import prepare
from pia_ray.testing import make_lora, make_pipeline_folder
from pia_ray.types import AnimationRequest
from pia_ray.weights import resolve

LAYOUTS: dict[str, dict[str, Any]] = {
    "kohya": {},
    "kohya with convolutions": {"parts": ("unet", "convolutions"), "rank": 2, "alpha": 1.0},
    "kohya without alpha": {"alpha": None},
    "diffusers": {"layout": "diffusers", "alpha": 8.0},
    "diffusers without alpha": {"layout": "diffusers", "alpha": None, "rank": 3},
    "motion alone": {"layout": "diffusers", "parts": ("motion",)},
    "text encoder alone": {"parts": ("text_encoder",)},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pipeline_folder(tmp_path_factory.mktemp("tiny") / "pipeline", vae_factor=4)


@pytest.fixture(scope="module")
def files(folder: Path) -> dict[str, Path]:
    how: dict[str, dict[str, Any]] = {
        "one": {"seed": 1},
        "two": {"seed": 2, "layout": "diffusers", "rank": 2},
        "off": {"seed": 3},
    }
    root = folder.parent
    return {name: make_lora(root / f"{name}.safetensors", folder, **settings) for name, settings in how.items()}


@pytest.fixture(scope="module")
def model(folder: Path, files: dict[str, Path]) -> ModelConfig:
    weights = {"one": 1.0, "two": 0.5, "off": 0.0}
    loras = {name: {"path": str(path), "weight": weights[name]} for name, path in files.items()}
    return model_of(folder, loras=loras)


@pytest.fixture(scope="module")
def animator(model: ModelConfig) -> Iterator[Animator]:
    with Animator(model, batch_size=8) as warm:
        yield warm


@pytest.fixture(scope="module")
def components(model: ModelConfig) -> Components:
    return assemble(resolve(model), model)


def model_of(folder: Path, **settings: Any) -> ModelConfig:
    return ModelConfig(name="tiny", base=str(folder), device="cpu", long_edge=32, size_step=16, **settings)


def ask(**knobs: Any) -> AnimationRequest:
    picture = Image.fromarray(np.random.default_rng(3).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    knobs = {"prompt": "a red cat", "num_frames": 4, "num_inference_steps": 3, "guidance_scale": 3.0, **knobs}
    return AnimationRequest(picture, AnimationParams(**{"seed": 5, **knobs}))


def frames(animator: Animator, **knobs: Any) -> np.ndarray:
    (animation,) = animator.animate([ask(**knobs)])
    assert isinstance(animation, Animation), animation
    return animation.frames


def reference(
    folder: Path, loras: dict[Path, float], request: AnimationRequest, *, scale: float = 1.0, fuse: bool = False
) -> np.ndarray:
    """diffusers' PIAPipeline with the LoRAs loaded through peft."""
    from diffusers import DDIMScheduler, PIAPipeline

    params = request.params
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the pipeline is deprecated upstream, its arithmetic is not
        pipe = PIAPipeline.from_pretrained(folder)
        pipe.set_progress_bar_config(disable=True)
        betas = {"beta_schedule": "linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False}
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, **betas)
        for path in loras:
            pipe.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name=path.stem)
        if loras:
            pipe.set_adapters([path.stem for path in loras], list(loras.values()))
        if fuse:
            pipe.fuse_lora()
        result = pipe(
            image=request.image,
            prompt=params.prompt,
            negative_prompt=params.negative_prompt,
            num_frames=params.num_frames,
            width=32,
            height=32,
            num_inference_steps=params.num_inference_steps,
            guidance_scale=params.guidance_scale,
            motion_scale=params.motion_scale,
            cross_attention_kwargs={"scale": scale} if scale != 1 else None,
            generator=torch.Generator("cpu").manual_seed(params.seed),
            output_type="np",
        )
    return (result.frames[0] * 255).round().astype(np.uint8)


def assert_same(ours: np.ndarray, theirs: np.ndarray) -> None:
    difference = np.abs(ours.astype(int) - theirs.astype(int))
    assert difference.max() <= 1, f"off by up to {difference.max()} levels of 255"
    assert difference.mean() <= 0.02, f"off by {difference.mean():.4f} levels on average"


def assert_other(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert np.abs(ours.astype(int) - theirs.astype(int)).mean() > 0.5


@pytest.fixture(scope="module")
def of_layouts(folder: Path) -> Iterator[tuple[dict[str, Path], Animator]]:
    """The file of each layout, and a model that has them all."""
    files = {
        name: make_lora(folder.parent / f"{name.replace(' ', '-')}.safetensors", folder, **settings)
        for name, settings in LAYOUTS.items()
    }
    loras = {path.stem: {"path": str(path), "weight": 0.0} for path in files.values()}
    with Animator(model_of(folder, loras=loras)) as animator:
        yield files, animator


@pytest.fixture(scope="module")
def plain(of_layouts: tuple[dict[str, Path], Animator]) -> np.ndarray:
    return frames(of_layouts[1], lora="none")


def test_frames_without_a_lora_equal_those_of_diffusers(plain: np.ndarray, folder: Path) -> None:
    assert_same(plain, reference(folder, {}, ask()))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_frames_with_a_lora_equal_those_of_diffusers(
    layout: str, folder: Path, of_layouts: tuple[dict[str, Path], Animator], plain: np.ndarray
) -> None:
    file = of_layouts[0][layout]
    ours = frames(of_layouts[1], lora=f"{file.stem}:0.8")
    assert_other(ours, plain)
    assert_same(ours, reference(folder, {file: 0.8}, ask()))


@pytest.mark.parametrize("fuse", [False, True], ids=["beside", "fused"])
def test_several_loras_with_weights_add_up_as_in_diffusers(
    fuse: bool, folder: Path, files: dict[str, Path], animator: Animator
) -> None:
    ours = frames(animator, lora="one:0.7+two:-0.4+off")
    weights = {files["one"]: 0.7, files["two"]: -0.4, files["off"]: 1.0}
    assert_same(ours, reference(folder, weights, ask(), fuse=fuse))


def test_lora_scale_is_the_cross_attention_scale_of_diffusers_and_does_not_leak(
    folder: Path, files: dict[str, Path], animator: Animator
) -> None:
    before = frames(animator, lora="one")
    assert_same(frames(animator, lora="one", lora_scale=0.3), reference(folder, {files["one"]: 1.0}, ask(), scale=0.3))
    np.testing.assert_array_equal(frames(animator, lora="one"), before)
    np.testing.assert_array_equal(frames(animator, lora_scale=0), frames(animator, lora="none"))


def test_rows_that_choose_nothing_get_the_models_loras_at_its_weights(
    folder: Path, files: dict[str, Path], animator: Animator
) -> None:
    ours = frames(animator)
    np.testing.assert_array_equal(ours, frames(animator, lora="one:1 + two:0.5"))
    np.testing.assert_array_equal(ours, frames(animator, lora="default"))
    assert_same(ours, reference(folder, {files["one"]: 1.0, files["two"]: 0.5}, ask()))


def test_rows_with_different_loras_in_one_engine_equal_their_single_runs(animator: Animator) -> None:
    choices = ["none", "one", "two", "one:0.5+two", "none", "default", "off:0.3", "two"]
    requests = [ask(lora=choice, seed=index, prompt="the sea") for index, choice in enumerate(choices)]
    for request, animation in zip(requests, animator.animate(requests), strict=True):
        assert isinstance(animation, Animation)
        (single,) = animator.animate([request])
        assert isinstance(single, Animation)
        assert_same(animation.frames, single.frames)


def test_a_variant_shares_all_it_does_not_change_and_changes_nothing_of_the_base(components: Components) -> None:
    before = {name: tensor.clone() for name, tensor in components.unet.state_dict().items()}
    first, second = variant(components, (("one", 1.0),)), variant(components, (("two", 1.0),))
    changed, variants = 0, [parts.unet.state_dict() for parts in (first, second)]
    for name, tensor in components.unet.state_dict().items():
        assert torch.equal(tensor, before[name]), name
        others = [weights[name] for weights in variants]
        if torch.equal(others[0], tensor):
            assert others[0].data_ptr() == others[1].data_ptr() == tensor.data_ptr(), name
        else:
            changed += 1
            assert len({tensor.data_ptr(), others[0].data_ptr(), others[1].data_ptr()}) == 3, name
            assert others[0].stride() == tensor.stride()
    assert 0 < changed < len(before)
    assert first.vae is components.vae
    assert first.text_encoder is not components.text_encoder


def bounded(model: ModelConfig, components: Components, *, variants: int) -> ModelConfig:
    """The model with a bound of memory that has room for so many variants with the LoRA `one`."""
    one = variant_bytes(components, components.loras["one"].places)
    most = weight_bytes(vars(components).values()) + 2 * variants * one + one
    return model.model_copy(update={"memory_gib": most / 2**30})


def choice(weight: float) -> AnimationParams:
    return parse_params({"prompt": "-", "lora": f"one:{weight}"})


def test_a_variant_counts_the_bytes_that_it_has_of_its_own(components: Components) -> None:
    for name in ("one", "two"):
        made, own = variant(components, ((name, 1.0),)), []
        for part in ("unet", "text_encoder"):
            base = getattr(components, part).state_dict()
            weights = getattr(made, part).state_dict()
            own += [tensor for key, tensor in weights.items() if tensor.data_ptr() != base[key].data_ptr()]
        size = sum(tensor.numel() * tensor.element_size() for tensor in own)
        assert size == variant_bytes(components, components.loras[name].places) > 0


def test_variants_are_bounded_in_bytes_and_leave_the_rest_to_activations(
    model: ModelConfig, components: Components
) -> None:
    parts = assemble(resolve(bounded(model, components, variants=3)), bounded(model, components, variants=3))
    whole, room = Model(parts), variant_room(parts)
    fit = evaluations_that_fit(parts, num_frames=4, height=8, width=8)
    for weight in range(1, 6):
        whole.with_loras(choice(weight / 10))
        assert 0 < parts.variants.num_bytes <= room == variant_room(parts)
    assert parts.variants.num_bytes == 3 * variant_bytes(parts, parts.loras["one"].places)
    less = evaluations_that_fit(parts, num_frames=4, height=8, width=8)
    assert fit is not None and less is not None and less < fit


def test_a_row_waits_where_the_variants_of_rows_in_flight_take_all_room(
    model: ModelConfig, components: Components
) -> None:
    parts = assemble(resolve(bounded(model, components, variants=2)), bounded(model, components, variants=2))
    whole = Model(parts)
    in_flight = [whole.with_loras(choice(weight)) for weight in (0.1, 0.2)]
    assert not whole.make_room(choice(0.3)), "two rows hold their variants"
    assert whole.make_room(choice(0.2)), "a row of the same variant shares it"
    assert whole.with_loras(choice(0.2)) is in_flight[1], "also after the cache has dropped it"
    in_flight.pop(0)
    assert whole.make_room(choice(0.3))


def test_rows_of_many_weights_in_little_memory_equal_their_single_runs(
    model: ModelConfig, components: Components
) -> None:
    weights = [0.1, 0.2, 0.1, 0.3]
    with Animator(bounded(model, components, variants=1), batch_size=4) as animator:
        found = animator.animate([ask(lora=f"one:{weight}", num_inference_steps=2) for weight in weights])
        assert all(isinstance(each, Animation) for each in found), found
        singles = {weight: frames(animator, lora=f"one:{weight}", num_inference_steps=2) for weight in set(weights)}
        for weight, animation in zip(weights, found, strict=True):
            np.testing.assert_array_equal(animation.frames, singles[weight])


def test_sets_of_loras_beyond_those_kept_give_the_same_frames_again(model: ModelConfig, components: Components) -> None:
    bound = bounded(model, components, variants=2)
    engine = Engine(assemble(resolve(bound), bound), batch_size=1)

    def run(lora: str) -> np.ndarray:
        row = engine.join(prepare(ask(lora=lora, num_inference_steps=1), model))
        while engine.rows:
            outcomes = dict(engine.step())
        animation = outcomes[row]
        assert isinstance(animation, Animation)
        return animation.frames

    choices = [f"one:{index / 10}" for index in range(1, 5)]
    first = {choice: run(choice) for choice in choices}
    for choice in (choices[0], choices[-1]):
        np.testing.assert_array_equal(run(choice), first[choice])


@pytest.mark.parametrize("layout", ["diffusers-old", "animatediff"])
def test_older_names_mean_the_same_as_todays(layout: Any, folder: Path, components: Components, tmp_path: Path) -> None:
    part: Any = ("motion",) if layout == "animatediff" else ("unet", "text_encoder")
    today = load_file(make_lora(tmp_path / "today.safetensors", folder, parts=part, layout="diffusers", alpha=None))
    attention = {name: tensor for name, tensor in today.items() if "attn" in name}
    save_file(attention, tmp_path / "attention.safetensors")
    # The same random numbers under the older names: written by hand, name by name.
    older = {}
    for name, tensor in attention.items():
        words = {"lora_A": "down", "lora_B": "up"}
        head, _, tail = name.partition(".lora_")
        head = head.removesuffix(".0") if head.endswith("to_out.0") else head
        new = f"{head}_lora.{words['lora_' + tail[0]]}.weight"
        if "text_encoder" in new:
            for modern, old in (("q_proj", "to_q"), ("k_proj", "to_k"), ("v_proj", "to_v"), ("out_proj", "to_out")):
                new = new.replace(f"{modern}_lora", f"{old}_lora")
        else:
            new = new.replace(".to_", ".processor.to_")
        if layout == "animatediff":
            new = new.removeprefix("unet.").replace(".transformer_blocks", ".temporal_transformer.transformer_blocks")
            new = new.replace("attn1", "attention_blocks.0").replace("attn2", "attention_blocks.1")
        older[new] = tensor
    save_file(older, tmp_path / "older.safetensors")
    ours = [merged(components, tmp_path / f"{name}.safetensors") for name in ("attention", "older")]
    for name, tensor in ours[0].items():
        assert torch.equal(tensor, ours[1][name]), name


def merged(components: Components, path: Path) -> dict[str, torch.Tensor]:
    from dataclasses import replace

    from pia_ray.pia.components import Lora

    parts = variant(replace(components, loras={"x": Lora(path, 1.0)}), (("x", 1.0),))
    tensors = {**parts.unet.state_dict(), **parts.text_encoder.state_dict()}
    plain = {**components.unet.state_dict(), **components.text_encoder.state_dict()}
    assert any(not torch.equal(tensor, plain[name]) for name, tensor in tensors.items())
    return tensors


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda _: {"weight": torch.zeros(4, 4)}, "is not a LoRA"),
        (lambda whole: {name: value.clone().fill_(math.nan) for name, value in whole.items()}, "is damaged: .* NaN"),
        (lambda whole: {name: torch.tensor(1.0) for name in whole}, "is damaged: .* an empty"),
        (lambda whole: {**whole, "lora_unet_x.on_input": torch.ones(1)}, "IA3"),
        (lambda whole: {**whole, "lora_unet_x.oft_blocks": torch.ones(1)}, "OFT"),
        (lambda whole: {**whole, "lora_te2_x.lora_down.weight": torch.ones(1, 1)}, "Stable Diffusion XL"),
        (lambda whole: {name.replace("attentions", "layers"): value for name, value in whole.items()}, "no place"),
        (lambda whole: {name: value for name, value in whole.items() if "lora_up" not in name}, "have no place"),
        (
            lambda whole: {name: torch.cat([value, value]) for name, value in whole.items() if value.ndim},
            "another model",
        ),
    ],
)
def test_a_lora_that_does_not_fit_is_refused_when_the_model_is_loaded(
    change: Any, text: str, folder: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    file = tmp_path / "lora.safetensors"
    save_file(change(load_file(files["one"])), file)
    config = model_of(folder, loras={"pixar": str(file)})
    with pytest.raises(WeightsError, match=text) as caught:
        assemble(resolve(config), config)
    assert str(file) in caught.value.message


@pytest.mark.parametrize(
    "settings", [{"alpha_pattern": {"(": 1}}, {"alpha_pattern": [1]}, {"lora_alpha": "much"}, {"lora_alpha": math.inf}]
)
def test_settings_of_a_lora_that_give_no_alpha_are_refused(
    settings: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    file = make_lora(tmp_path / "lora.safetensors", folder, layout="diffusers")
    config = {f"{part}.{name}": value for part in ("unet", "text_encoder") for name, value in settings.items()}
    save_file(load_file(file), file, {"lora_adapter_metadata": json.dumps(config)})
    model = model_of(folder, loras={"pixar": str(file)})
    with pytest.raises(WeightsError, match="is damaged: lora_adapter_metadata") as caught:
        assemble(resolve(model), model)
    assert str(file) in caught.value.message


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        (" Two : .50 + one", "one+two:0.5"),
        ("one:1.0", "one:1"),
        ("NONE", "none"),
        ("two:-1e0", "two:-1"),
    ],
)
def test_a_choice_of_loras_has_one_spelling(text: str, canonical: str) -> None:
    assert parse_params({"prompt": "-", "lora": text}).lora == canonical


@pytest.mark.parametrize("text", ["", "one:", "one:x", "one++two", "one+one:2", "one:11", "one:nan", 3])
def test_a_choice_that_makes_no_sense_is_refused(text: object) -> None:
    with pytest.raises(BadParameter, match="lora"):
        parse_params({"prompt": "-", "lora": text})


def test_an_unknown_lora_is_the_rows_own_failure_and_names_those_there_are(animator: Animator) -> None:
    unknown, known = animator.animate([ask(lora="onne"), ask(lora="none")])
    assert isinstance(unknown, BadParameter)
    assert 'no LoRA "onne"; this model has off, one, two. Did you mean "one"?' in unknown.message
    assert isinstance(known, Animation)


def test_a_manifest_column_and_a_flag_choose_the_lora(tmp_path: Path, model: ModelConfig) -> None:
    Image.new("RGB", (32, 32), "red").save(tmp_path / "a.png")
    with (tmp_path / "manifest.csv").open("w", newline="") as stream:
        rows = [("image", "prompt", "lora", "lora_scale")]
        rows += [("a.png", "sea", choice, "0.5") for choice in ("two:0.5", "", "nine")]
        csv.writer(stream).writerows(rows)
    config = CatalogConfig(
        manifest=str(tmp_path / "manifest.csv"), output=str(tmp_path / "out"), model=model, defaults={"lora": "one"}
    )
    found = open_manifest(config)
    (table,) = plan(found, config, model_version="v")
    assert [json.loads(cell)["lora"] for cell in table["params"].to_pylist()[:2]] == ["two:0.5", "one"]
    assert [json.loads(cell)["lora_scale"] for cell in table["params"].to_pylist()[:2]] == [0.5, 0.5]
    assert 'no LoRA "nine"' in table["error_message"].to_pylist()[2]
    arguments = make_parser().parse_args(["animate", "m.csv", "--output", "o", "--lora", "two:.5", "--lora-scale", "2"])
    assert (arguments.lora, arguments.lora_scale) == ("two:.5", "2")
