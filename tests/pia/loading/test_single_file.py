"""Checkpoints and VAEs in one file: the same frames as in diffusers layout, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from pia_ray.animation import Animation
from pia_ray.config.knobs import AnimationParams
from pia_ray.config.model import ModelConfig
from pia_ray.errors import WeightsError
from pia_ray.pia.animator import Animator
from pia_ray.pia.loading.load import assemble
from pia_ray.testing import make_single_file_checkpoint, make_split_checkpoint
from pia_ray.types import AnimationRequest
from pia_ray.weights import is_pulled, pin, resolve, version

Files = tuple[Path, Path, Path, Path]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return make_single_file_checkpoint(tmp_path_factory.mktemp("single"), vae_factor=4)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    return make_split_checkpoint(tmp_path_factory.mktemp("split"), vae_factor=4)


def model_of(base: Path, adapter: Path, **settings: Any) -> ModelConfig:
    sizes: dict[str, Any] = {"device": "cpu", "long_edge": 32, "size_step": 16}
    paths = {name: str(value) for name, value in settings.items()}
    return ModelConfig(name="tiny", base=str(base), motion_adapter=str(adapter), **sizes, **paths)


def frames(model: ModelConfig) -> np.ndarray:
    picture = Image.fromarray(np.random.default_rng(3).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    params = AnimationParams(prompt="a red cat", seed=5, num_frames=4, num_inference_steps=3, guidance_scale=3.0)
    with Animator(model) as animator:
        (animation,) = animator.animate([AnimationRequest(picture, params)])
    assert isinstance(animation, Animation), animation
    return animation.frames


@pytest.fixture(scope="module")
def expected(files: Files) -> np.ndarray:
    """The frames of the single file with its own VAE."""
    return frames(model_of(files[0], files[1], config=files[3]))


def test_a_single_file_checkpoint_makes_the_frames_of_the_same_model_in_folders(
    files: Files, folders: tuple[Path, Path, Path], expected: np.ndarray
) -> None:
    base, adapter, vae, config = files
    np.testing.assert_array_equal(frames(model_of(folders[0], folders[1])), expected)
    with_vae = frames(model_of(folders[0], folders[1], vae=folders[2]))
    assert np.abs(with_vae.astype(int) - expected).mean() > 1, "the separate VAE is another one"
    np.testing.assert_array_equal(frames(model_of(base, adapter, vae=vae, config=config)), with_vae)
    np.testing.assert_array_equal(frames(model_of(folders[0], adapter, vae=vae, config=config)), with_vae)


def test_the_original_layout_is_read_as_diffusers_own_loader_reads_it(files: Files, tmp_path: Path) -> None:
    from diffusers import UNet2DConditionModel

    base, adapter, _, config = files
    model = model_of(base, adapter, config=config)
    parts = assemble(resolve(model), model)
    theirs = UNet2DConditionModel.from_single_file(str(base), config=str(config), subfolder="unet").state_dict()
    ours = parts.unet.state_dict()
    for name, tensor in theirs.items():
        if not name.startswith("conv_in."):
            assert torch.equal(ours[name], tensor), name


def test_the_version_of_a_single_file_is_of_its_content(files: Files, tmp_path: Path) -> None:
    base, adapter, _, config = files
    model = model_of(base, adapter, config=config)
    copy = tmp_path / "renamed.safetensors"
    copy.write_bytes(base.read_bytes())
    assert version(model_of(copy, adapter, config=config)) == version(model) == resolve(model).version
    content = bytearray(base.read_bytes())
    content[-1] ^= 1
    copy.write_bytes(content)
    assert version(model_of(copy, adapter, config=config)) != version(model)
    assert is_pulled(model)
    assert pin(model) == model


def test_a_relative_single_file_is_pinned_to_its_place(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter, _, config = files
    monkeypatch.chdir(base.parent)
    pinned = pin(model_of(Path(base.name), adapter, config=config))
    assert pinned.base == str(base)
    assert pinned.config == str(config)


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("conditioner.embedders.0.transformer.x", "Stable Diffusion XL"),
        ("cond_stage_model.model.positional_embedding", "Stable Diffusion 2"),
        ("lora_unet_down_blocks_0.lora_down.weight", "a LoRA"),
    ],
)
def test_a_checkpoint_of_another_family_is_called_by_its_name(
    files: Files, tmp_path: Path, key: str, text: str
) -> None:
    other = tmp_path / "other.safetensors"
    save_file({"model.diffusion_model.x": torch.zeros(1), key: torch.zeros(1)}, other)
    assert text in refusal(model_of(other, files[1], config=files[3]))


def test_what_is_missing_or_misshapen_in_a_single_file_is_named(files: Files, tmp_path: Path) -> None:
    base, adapter, vae, config = files
    whole, changed = load_file(base), tmp_path / "changed.safetensors"
    model = model_of(changed, adapter, config=config)

    def write(**changes: torch.Tensor | None) -> None:
        tensors = {**whole, **{name.replace("__", "."): tensor for name, tensor in changes.items()}}
        save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, changed)

    write(model__diffusion_model__out__2__weight=None)
    assert "unet" in (text := refusal(model)) and "lacks some" in text
    write(model__diffusion_model__out__2__weight=torch.zeros(4, 8, 3, 3))
    assert "does not fit the config" in refusal(model)
    write(cond_stage_model__transformer__text_model__final_layer_norm__weight=None)
    assert "final_layer_norm.weight" in refusal(model)
    save_file({name: value for name, value in whole.items() if not name.startswith("cond_stage")}, changed)
    assert "no text encoder" in refusal(model)
    save_file({name: value for name, value in whole.items() if not name.startswith("first_stage")}, changed)
    assert "holds no vae" in refusal(model)
    assert frames(model_of(changed, adapter, vae=vae, config=config)).shape == (4, 32, 32, 3)


@pytest.mark.parametrize(
    ("keys", "header"),
    [(("v_pred", "ztsnr"), {}), (("ztsnr",), {"modelspec.prediction_type": "v"})],
)
def test_a_file_that_states_v_prediction_makes_the_frames_of_a_config_that_does(
    files: Files, tmp_path: Path, keys: tuple[str, ...], header: dict[str, str], expected: np.ndarray
) -> None:
    base, adapter, _, config = files
    stated = tmp_path / "stated.safetensors"
    save_file({**load_file(base), **{key: torch.zeros(0) for key in keys}}, stated, header)
    stating = tmp_path / "config"
    shutil.copytree(config, stating)
    scheduler = stating / "scheduler" / "scheduler_config.json"
    settings = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    scheduler.write_text(json.dumps({**json.loads(scheduler.read_text()), **settings}))
    ours = frames(model_of(stated, adapter, config=config))
    np.testing.assert_array_equal(ours, frames(model_of(base, adapter, config=stating)))
    assert (ours != expected).any()


def test_weights_in_float8_are_multiplied_by_their_scales(files: Files, tmp_path: Path) -> None:
    base, adapter, _, config = files
    name = "model.diffusion_model.out.2"
    whole, small = load_file(base), tmp_path / "small.safetensors"
    scale = whole[f"{name}.weight"].abs().max() / 448
    packed = (whole[f"{name}.weight"] / scale).to(torch.float8_e4m3fn)
    marks = {f"{name}.scale_weight": scale, "model.diffusion_model.scaled_fp8": torch.zeros(0)}
    save_file({**whole, **marks, f"{name}.weight": packed}, small)
    model = model_of(small, adapter, config=config)
    ours = assemble(resolve(model), model).unet.conv_out.weight
    torch.testing.assert_close(ours, packed.float() * scale, rtol=0, atol=0)


def test_files_of_other_kinds_are_refused_by_name(files: Files, tmp_path: Path) -> None:
    base, adapter, _, config = files
    whole, other = load_file(base), tmp_path / "other.safetensors"
    name = "model.diffusion_model.input_blocks.0.0.weight"
    save_file({**whole, name: torch.zeros(16, 9, 3, 3)}, other)
    assert "is an inpainting checkpoint" in refusal(model_of(other, adapter, config=config))
    for suffix, text in ((".gguf", "quantised"), (".sft", "rename it to .safetensors")):
        (tmp_path / f"x{suffix}").write_bytes(b"GGUF")
        assert text in refusal(model_of(tmp_path / f"x{suffix}", adapter, config=config))
    pointer = tmp_path / "pointer.ckpt"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
    allowed = model_of(pointer, adapter, config=config).model_copy(update={"allow_pickle": True})
    assert "Git LFS pointer" in refusal(allowed)


def test_a_single_file_without_motion_adapter_is_refused_with_what_to_do(files: Files) -> None:
    model = ModelConfig(base=str(files[0]), config=str(files[3]), device="cpu")
    assert "needs a motion_adapter" in refusal(model)


def test_a_setting_of_the_model_goes_before_what_the_file_states(files: Files, tmp_path: Path) -> None:
    base, adapter, _, config = files
    stated = tmp_path / "stated.safetensors"
    save_file({**load_file(base), "v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}, stated)

    def settings(path: Path, **own: str) -> tuple[Any, Any, str]:
        model = model_of(path, adapter, config=config, **own)
        found = assemble(resolve(model), model)
        return (
            found.scheduler_config["prediction_type"],
            found.scheduler_config.get("rescale_betas_zero_snr"),
            version(model),
        )

    assert settings(stated)[:2] == ("v_prediction", True)
    assert settings(stated, prediction_type="epsilon", zero_snr="off")[:2] == ("epsilon", False)
    assert settings(base, prediction_type="v_prediction", zero_snr="on")[:2] == ("v_prediction", True)
    assert settings(base)[2] != settings(base, prediction_type="v_prediction")[2], (
        "results of both have other work keys"
    )


def test_a_base_that_predicts_what_no_scheduler_takes_is_refused(files: Files, tmp_path: Path) -> None:
    config = shutil.copytree(files[3], tmp_path / "config")
    path = config / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prediction_type": "flow_prediction"}))
    assert "its prediction_type is flow_prediction" in refusal(model_of(files[0], files[1], config=config))


def original_names(folder: Path) -> dict[str, torch.Tensor]:
    """The motion adapter of a folder in the names of PIA's own `pia.ckpt`."""
    found = {}
    for name, tensor in load_file(folder / "diffusion_pytorch_model.safetensors").items():
        for ours, theirs in {
            ".transformer_blocks": ".temporal_transformer.transformer_blocks",
            ".proj_": ".temporal_transformer.proj_",
            ".norm.": ".temporal_transformer.norm.",
            ".attn1": ".attention_blocks.0",
            ".attn2": ".attention_blocks.1",
            ".norm1": ".norms.0",
            ".norm2": ".norms.1",
            ".norm3": ".ff_norm",
            ".pos_embed.": ".pos_encoder.",
        }.items():
            name = name.replace(ours, theirs)
        found[f"module.{name}"] = tensor
    return found


@pytest.mark.parametrize("name", ["pia.ckpt", "pia.safetensors"])
def test_pias_own_file_makes_the_frames_of_the_adapter_in_a_folder(
    name: str, files: Files, folders: tuple[Path, Path, Path], tmp_path: Path, expected: np.ndarray
) -> None:
    base, adapter, _, config = files
    tensors, file = original_names(adapter), tmp_path / name
    assert "module.down_blocks.0.motion_modules.0.temporal_transformer.proj_in.weight" in tensors
    if name.endswith(".ckpt"):
        torch.save({"epoch": 1, "state_dict": tensors}, file)
    else:
        save_file(tensors, file)
    for each in (base, folders[0]):
        model = model_of(each, file, config=config).model_copy(update={"allow_pickle": True})
        np.testing.assert_array_equal(frames(model), expected)


def test_a_file_that_is_no_adapter_of_pia_is_refused_by_what_it_lacks(files: Files, tmp_path: Path) -> None:
    base, adapter, vae, config = files
    assert "holds no motion_modules" in refusal(model_of(base, vae, config=config))
    tensors, file = original_names(adapter), tmp_path / "mm.safetensors"
    save_file({name: tensor for name, tensor in tensors.items() if "conv_in" not in name}, file)
    assert "motion module of AnimateDiff" in refusal(model_of(base, file, config=config))
    save_file({name: tensor for name, tensor in tensors.items() if ".ff_norm.weight" not in name}, file)
    assert "lacks " in refusal(model_of(base, file, config=config))


@pytest.mark.parametrize("dtype", ["auto", "float16"])
def test_a_folder_with_nothing_but_the_fp16_variant_is_loaded(
    dtype: str, folders: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(folders[0], base)
    for file in base.glob("*/*model.safetensors"):
        file.rename(file.with_name(file.name.replace(".safetensors", ".fp16.safetensors")))
    model = model_of(base, folders[1], dtype=dtype)
    ours, theirs = (assemble(resolve(each), each) for each in (model, model_of(folders[0], folders[1], dtype=dtype)))
    for part in ("unet", "text_encoder", "vae"):
        plain = getattr(theirs, part).state_dict()
        assert all(torch.equal(tensor, plain[name]) for name, tensor in getattr(ours, part).state_dict().items())


def refusal(model: ModelConfig) -> str:
    with pytest.raises(WeightsError) as caught:
        assemble(resolve(model), model)
    return caught.value.message
