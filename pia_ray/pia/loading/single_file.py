"""A Stable Diffusion 1.5 checkpoint or VAE in one file, in the layout of the original code -> diffusers' modules.

Such a file holds no configs of its parts: they come from a folder in diffusers layout.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from pia_ray.errors import WeightsError
from pia_ray.formatting import first_line

UNET_PREFIX: Final = "model.diffusion_model."
TEXT_PREFIX: Final = "cond_stage_model.transformer."
INPUT: Final = UNET_PREFIX + "input_blocks.0.0.weight"
_SCALES: Final = (".scale_weight", ".scale_input")
_OTHERS: Final = {
    "conditioner.embedders.": "Stable Diffusion XL",
    "cond_stage_model.model.": "Stable Diffusion 2",
    "model.diffusion_model.joint_blocks.": "Stable Diffusion 3",
    "model.diffusion_model.double_blocks.": "Flux",
    "lora_unet_": "a LoRA",
    "unet.": "a LoRA",
}

Tensors = Mapping[str, torch.Tensor]


def check_base(tensors: Tensors, path: Path) -> None:
    """Checks that the file holds a Stable Diffusion 1.5 UNet and text encoder.

    Raises:
        WeightsError: it does not; names the model that it holds, where that is known.
    """
    for prefix, name in _OTHERS.items():
        if any(key.startswith(prefix) for key in tensors):
            raise WeightsError(f"{path} is {name}; PIA runs on checkpoints of Stable Diffusion 1.5")
    for prefix, part in ((UNET_PREFIX, "UNet"), (TEXT_PREFIX, "text encoder")):
        if not any(key.startswith(prefix) for key in tensors):
            raise WeightsError(
                f"{path} holds no {part} of Stable Diffusion (no {prefix}...): take the whole checkpoint, in the "
                "original layout"
            )

    channels = tensors[INPUT].shape[1] if INPUT in tensors else 4
    if channels != 4:
        kind = {9: "an inpainting checkpoint", 8: "an instruct-pix2pix checkpoint"}.get(channels, "another model")
        raise WeightsError(
            f"{path} is {kind}: its UNet takes {channels} channels, a plain one 4. Take the plain one of that model"
        )


def without_scales(tensors: Tensors) -> dict[str, torch.Tensor]:
    """The tensors of a file, with its float8 weights multiplied by the scale of each (`scaled_fp8`)."""
    plain = {name: tensor for name, tensor in tensors.items() if not name.endswith((*_SCALES, "scaled_fp8"))}
    for name, scale in tensors.items():
        weight = name.removesuffix(_SCALES[0]) + ".weight"
        if name.endswith(_SCALES[0]) and weight in plain:
            plain[weight] = plain[weight].float() * scale.float()
    return plain


def scheduler_settings(names: Collection[str], header: Mapping[str, Any]) -> dict[str, Any]:
    """The scheduler's settings that a file states by its header, or by tensors of the names `v_pred` and `ztsnr`."""
    stated = str(header.get("modelspec.prediction_type", "")).lower()
    settings: dict[str, Any] = {}
    if "v_pred" in names or stated in ("v", "v_prediction", "v-prediction"):
        settings["prediction_type"] = "v_prediction"
    elif stated in ("epsilon", "eps"):
        settings["prediction_type"] = "epsilon"
    if "ztsnr" in names:
        settings |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return settings


def load_unet(tensors: Tensors, *, path: Path, config: Path, dtype: torch.dtype) -> UNet2DConditionModel:
    """The 4-channel UNet of a checkpoint.

    Raises:
        WeightsError: it does not fit the config.
    """
    return _convert(UNet2DConditionModel, "unet", tensors, path=path, config=config, dtype=dtype)


def load_vae(tensors: Tensors, *, path: Path, config: Path, dtype: torch.dtype) -> AutoencoderKL:
    """The VAE of a checkpoint, or of a file that holds a VAE alone.

    Raises:
        WeightsError: it has none, or one that does not fit the config.
    """
    if not any(key.endswith("decoder.conv_in.weight") for key in tensors):
        raise WeightsError(f"{path} holds no vae: name one by the model's setting vae")
    return _convert(AutoencoderKL, "vae", tensors, path=path, config=config, dtype=dtype)


def load_text_encoder(tensors: Tensors, *, path: Path, config: Path, dtype: torch.dtype) -> CLIPTextModel:
    """The CLIP text encoder of a checkpoint.

    Raises:
        WeightsError: it does not fit the config.
    """
    model = CLIPTextModel(CLIPTextConfig.from_pretrained(config / "text_encoder", local_files_only=True))
    # transformers 5.6 dropped the level `text_model`, as some merged checkpoints do.
    names = {name.removeprefix("text_model."): name for name in model.state_dict()}
    own = {}
    for key, value in tensors.items():
        name = names.get(key.removeprefix(TEXT_PREFIX).removeprefix("text_model."))
        if key.startswith(TEXT_PREFIX) and name is not None:
            own[name] = value
    missing = sorted(set(names.values()) - set(own) - {name for name in names.values() if "position_ids" in name})
    if missing:
        raise WeightsError(f"the text encoder in {path} lacks {missing[0]} and {len(missing) - 1} more of its weights")
    try:
        model.load_state_dict(own, strict=False)
    except RuntimeError as error:
        raise _misfit("text_encoder", path, config, error) from error
    return model.to(dtype)


def _convert(kind: Any, part: str, tensors: Tensors, *, path: Path, config: Path, dtype: torch.dtype) -> Any:
    try:
        model = kind.from_single_file(dict(tensors), config=str(config), subfolder=part, local_files_only=True)
    except NotImplementedError as error:  # of torch, which cannot move the weights that were not there
        raise WeightsError(f"the {part} in {path} lacks some of the weights that {config / part} asks for") from error
    except (OSError, ValueError, KeyError, RuntimeError, AttributeError) as error:
        raise _misfit(part, path, config, error) from error
    # Past diffusers' own `to`, which warns of modules to keep in float32 where there are none.
    return torch.nn.Module.to(model, dtype)


def _misfit(part: str, path: Path, config: Path, error: Exception) -> WeightsError:
    return WeightsError(f"the {part} in {path} does not fit the config in {config / part}: {first_line(error)}")
