"""Weights on disk -> components ready to run: UNet with motion modules, VAE, text encoder, tokenizer, scheduler config.

Uses diffusers' and transformers' own loaders; safetensors only, unless the model allows pickled files.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import AutoencoderKL, MotionAdapter, UNet2DConditionModel, UNetMotionModel, schedulers
from diffusers.utils import logging as diffusers_logging
from transformers import CLIPTextModel, CLIPTokenizer, CLIPVisionModelWithProjection
from transformers.utils import logging as transformers_logging

from pia_ray.config.model import ModelConfig
from pia_ray.errors import WeightsError
from pia_ray.formatting import count_of
from pia_ray.pia.components import Changeable, Components, IPAdapter, Lora, Part, SharedTensors
from pia_ray.pia.device.cpu_time import slow_on_cpu
from pia_ray.pia.device.memory import limit_memory
from pia_ray.pia.device.placement import device_of, dtype_of, layout_of, text_encoder_dtype_of, vae_dtype_of
from pia_ray.pia.loading import single_file
from pia_ray.pia.loading.checkpoint_tensors import read_header, read_tensors, tensor_names
from pia_ray.pia.loading.group_norm import normalise_as_original
from pia_ray.pia.loading.ip_adapter import install_ip_adapter
from pia_ray.pia.loading.lora import LoraFile, merge, read_lora
from pia_ray.pia.loading.motion_adapter import joined, load_motion_adapter
from pia_ray.pia.loading.offload import offload
from pia_ray.pia.loading.pretrained import load_pretrained, load_tokenizer
from pia_ray.pia.loading.textual_inversion import with_inversions
from pia_ray.pia.loading.upscaler_file import read_upscaler
from pia_ray.pia.loading.weight_sharing import SourceOf, WeightPool
from pia_ray.pia.safety_checker import SafetyChecker, read_safety_checker
from pia_ray.pia.scorer import Scorer, read_scorer
from pia_ray.pia.unet.compilation import compile_mode_of
from pia_ray.pia.unet.compile_cache import compile_cache_of
from pia_ray.pia.upscaler import Upscaler
from pia_ray.weights import LocalWeights, is_full_size
from pia_ray.weights.checkpoint import PICKLED_SUFFIXES, digest

log = logging.getLogger(__name__)

# Their progress bars are for notebooks; a worker's standard error is for warnings and errors.
diffusers_logging.disable_progress_bar()
transformers_logging.disable_progress_bar()


def assemble(weights: LocalWeights, model: ModelConfig, pool: WeightPool | None = None) -> Components:
    """The model of these weights, on its device; weights that other models of the pool have are shared with them.

    Raises:
        WeightsError: a part is missing, damaged, or not a PIA model (no 9-channel input); a LoRA or textual inversion
            does not fit.
        ConfigError: the device does not exist.
    """
    device = device_of(model)
    if device.type == "cpu" and is_full_size(model):
        log.warning("%s", slow_on_cpu(torch.get_num_threads()))
    dtypes = _Dtypes(dtype_of(model, device), vae_dtype_of(model, device), text_encoder_dtype_of(model, device))
    memory_bytes = limit_memory(model, device)
    parts = _read_parts(weights, model, dtypes)
    shared = _move_to_device(parts, weights, model, pool, device=device, dtypes=dtypes)
    if model.group_norm == "original":
        normalise_as_original(parts.unet)
    ip_adapter = _install_ip_adapter(parts, weights, device)
    small = _read_small_models(weights, model, device)
    components = Components(
        unet=parts.unet,
        vae=parts.vae,
        text_encoder=parts.text_encoder,
        tokenizer=parts.tokenizer,
        scheduler_config=scheduler_config(weights, model),
        device=device,
        dtype=dtypes.unet,
        vae_dtype=dtypes.vae,
        tf32=model.dtype == "tf32" and device.type == "cuda",
        vae_tiling=model.vae_tiling,
        memory_bytes=memory_bytes,
        compile_mode=compile_mode_of(model, device),
        compile_cache=compile_cache_of(model),
        compiles_what_pays=model.compile == "auto",
        version=weights.version,
        ip_adapter=ip_adapter,
        scorer=small.scorer,
        safety_checker=small.safety_checker,
        upscaler=small.upscaler,
        shared_tensors=shared,
    )
    components = with_inversions(components, weights.textual_inversions, loras=weights.loras.values())
    components = replace(components, loras=_loras_of_rows(weights, model, components))
    encoder = [] if parts.image_encoder is None else [parts.image_encoder]
    offload([components.text_encoder, components.unet, components.vae, *encoder], model.offload, device)
    return components


class _Changed(NamedTuple):
    unet: UNetMotionModel
    text_encoder: CLIPTextModel


def _merge_loras(
    weights: LocalWeights, model: ModelConfig, parts: Changeable, dtypes: _Dtypes
) -> dict[tuple[Part, str], str]:
    """Merges the LoRAs that are parts of the model; returns by part and name of parameter the source of its change."""
    sources: dict[tuple[Part, str], str] = {}
    if any(model.loras[name].merge for name in weights.loras):  # in the precision of the model, not of the files
        torch.nn.Module.to(parts.unet, dtypes.unet)
        torch.nn.Module.to(parts.text_encoder, dtypes.text_encoder)
    for name, path in weights.loras.items():
        if (lora := model.loras[name]).merge:
            file = merge(path, lora.weight, parts)
            _warn_of_unread(name, file)
            for part, module, parameter in file.places:
                key = part, f"{module}.{parameter}"
                sources[key] = f"{sources.get(key, '')}+{digest(path, [path])}*{lora.weight}"
    return sources


def _loras_of_rows(weights: LocalWeights, model: ModelConfig, components: Components) -> dict[str, Lora]:
    """The LoRAs that rows choose, read now, so that one for another model is refused before the first row."""
    loras = {}
    for name, weight in model.lora_weights.items():
        file = read_lora(weights.loras[name], components)
        _warn_of_unread(name, file)
        loras[name] = Lora(weights.loras[name], weight, file.places)
    return loras


def _warn_of_unread(name: str, file: LoraFile) -> None:
    if file.unread:
        text = "LoRA %s: left out: %d of %s, without a place in this model, such as %s"
        log.warning(text, name, len(file.unread), count_of(file.num_layers, "layer"), file.unread[0])


def own_scheduler(weights: LocalWeights, model: ModelConfig) -> Any:
    """The scheduler that came with the weights, of its own class and with its own settings, or those of the model.

    Raises:
        WeightsError: there is none, or diffusers does not have its class.
    """
    config = scheduler_config(weights, model)
    kind = getattr(schedulers, str(config.get("_class_name")), None)
    if kind is None:
        raise WeightsError(f"{config_folder(weights)} names no scheduler of diffusers: {config.get('_class_name')}")
    return kind.from_config(config)


def scheduler_config(weights: LocalWeights, model: ModelConfig) -> dict[str, Any]:
    """The model's settings, before what a single file states, before those of the folder.

    Raises:
        WeightsError: there are none, or the UNet predicts what no scheduler here takes.
    """
    config = read_config(config_folder(weights) / "scheduler" / "scheduler_config.json")
    if weights.base.is_file():
        config |= single_file.scheduler_settings(tensor_names(weights.base), read_header(weights.base))
    if model.prediction_type != "auto":
        config["prediction_type"] = model.prediction_type
    if model.zero_snr != "auto":
        config["rescale_betas_zero_snr"] = model.zero_snr == "on"
    if model.zero_snr == "on":
        config["timestep_spacing"] = "trailing"
    if (predicts := config.get("prediction_type", "epsilon")) not in ("epsilon", "sample", "v_prediction"):
        raise WeightsError(f"{weights.base} is not of Stable Diffusion 1.5: its prediction_type is {predicts}")
    return config


def own_side(weights: LocalWeights) -> int:
    """The side in px of the square pictures that the weights were trained on, by their configs; 512 where none says."""
    configs = config_folder(weights)
    vae = weights.vae if weights.vae is not None and weights.vae.is_dir() else configs / "vae"
    factor = 2 ** (len(read_config(vae / "config.json").get("block_out_channels", [0] * 4)) - 1)
    side = read_config(configs / "unet" / "config.json").get("sample_size", 64)
    return int(side if isinstance(side, int) else 64) * factor


def config_folder(weights: LocalWeights) -> Path:
    """The folder with configs, tokenizer and scheduler."""
    return weights.base if weights.base.is_dir() or weights.config is None else weights.config


Load = Callable[[Any, Path], Any]
"""`load_pretrained`, with or without pickled files."""


class _Dtypes(NamedTuple):
    unet: torch.dtype
    vae: torch.dtype
    text_encoder: torch.dtype


@dataclass(frozen=True)
class _Parts:
    """The parts of a model as their files have them, LoRAs merged."""

    unet: UNetMotionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    image_encoder: CLIPVisionModelWithProjection | None
    merged: Mapping[tuple[Part, str], str]
    """As `_merge_loras` returns it."""

    def modules(self) -> dict[str, torch.nn.Module]:
        """The parts with weights, by name."""
        modules: dict[str, torch.nn.Module] = {"text_encoder": self.text_encoder, "unet": self.unet, "vae": self.vae}
        return modules if self.image_encoder is None else {**modules, "image_encoder": self.image_encoder}


def _read_parts(weights: LocalWeights, model: ModelConfig, dtypes: _Dtypes) -> _Parts:
    load = partial(load_pretrained, use_safetensors=None if model.allow_pickle else True)
    unet, vae, text_encoder = _largest_parts(weights, load, dtypes)
    merged = _merge_loras(weights, model, _Changed(unet, text_encoder), dtypes)
    if (channels := unet.config["in_channels"]) != 9:
        raise WeightsError(
            f"the UNet of model {model.name} takes {channels} channels, PIA's takes 9: "
            "motion_adapter must be PIA's condition adapter, which brings its own conv_in"
        )
    tokenizer = load_tokenizer(config_folder(weights) / "tokenizer")
    return _Parts(unet, vae, text_encoder, tokenizer, _image_encoder(weights, load), merged)


def _largest_parts(
    weights: LocalWeights, load: Load, dtypes: _Dtypes
) -> tuple[UNetMotionModel, AutoencoderKL, CLIPTextModel]:
    """UNet with motion modules, VAE and text encoder, each from a folder or a single file; in any precision."""
    checkpoint: dict[str, torch.Tensor] = {}
    if weights.base.is_file():
        checkpoint = single_file.without_scales(read_tensors(weights.base))
        single_file.check_base(checkpoint, weights.base)
        plain = _single(single_file.load_unet, weights, checkpoint, dtype=dtypes.unet)
        unet = _with_motion(plain, weights, load)
        text_encoder = _single(single_file.load_text_encoder, weights, checkpoint, dtype=dtypes.text_encoder)
    else:
        unet = _unet(weights, load)
        text_encoder = load(CLIPTextModel, weights.base / "text_encoder")
    if weights.vae is not None and weights.vae.is_file():
        vae = _single(single_file.load_vae, weights, read_tensors(weights.vae), dtype=dtypes.vae, path=weights.vae)
    elif weights.vae is None and weights.base.is_file():
        vae = _single(single_file.load_vae, weights, checkpoint, dtype=dtypes.vae)
    else:
        vae = load(AutoencoderKL, weights.vae or weights.base / "vae")
    return unet, vae, text_encoder


def _single(
    load: Callable[..., Any],
    weights: LocalWeights,
    tensors: dict[str, torch.Tensor],
    *,
    dtype: torch.dtype,
    path: Path | None = None,
) -> Any:
    if weights.config is None:
        raise WeightsError(f"{path or weights.base} is a single file: it needs a config folder in diffusers layout")
    return load(tensors, path=path or weights.base, config=weights.config, dtype=dtype)


def _unet(weights: LocalWeights, load: Load) -> UNetMotionModel:
    folder = weights.base / "unet"
    kind = read_config(folder / "config.json").get("_class_name")
    if kind != "UNetMotionModel":
        return _with_motion(None, weights, load)
    if weights.motion_adapter is not None:
        raise WeightsError(
            f"{folder} already holds motion modules: leave motion_adapter out, or give a plain SD 1.5 base"
        )
    return load(UNetMotionModel, folder)


def _with_motion(plain: UNet2DConditionModel | None, weights: LocalWeights, load: Load) -> UNetMotionModel:
    """PIA's UNet: the plain one (None: the one in the base's folder) with the adapter's motion modules."""
    if weights.motion_adapter is None:
        raise WeightsError(f"{weights.base} is a plain Stable Diffusion: the model needs a motion_adapter to animate")
    if plain is None:
        plain = load(UNet2DConditionModel, weights.base / "unet")
    if weights.motion_adapter.is_file():
        adapter = load_motion_adapter(weights.motion_adapter, plain.config)
    else:
        adapter = load(MotionAdapter, weights.motion_adapter)
    if adapter.conv_in is None:
        raise WeightsError(f"the motion adapter in {weights.motion_adapter} has no conv_in: it is not PIA's")
    # The new UNet has the tensors of both, which are dropped here, so that nothing else refers to them.
    return joined(plain, adapter, path=weights.motion_adapter)


def _image_encoder(weights: LocalWeights, load: Load) -> CLIPVisionModelWithProjection | None:
    if weights.image_encoder is None:
        return None
    return load(CLIPVisionModelWithProjection, weights.image_encoder)


def _move_to_device(
    parts: _Parts,
    weights: LocalWeights,
    model: ModelConfig,
    pool: WeightPool | None,
    *,
    device: torch.device,
    dtypes: _Dtypes,
) -> tuple[SharedTensors, ...]:
    """Moves the parts through the pool to the device, or to host memory where they are offloaded."""

    def source(path: Path | None, name: str) -> str:
        # Digests take seconds where the files are large, and nothing is shared without a pool.
        return "" if pool is None or path is None else _source(path, name)

    base, motion = source(weights.base, "unet"), source(weights.motion_adapter, "")
    vae = source(weights.base, "vae") if weights.vae is None else source(weights.vae, "")
    text = source(weights.base, "text_encoder")
    image = source(weights.image_encoder, "")
    sources: dict[str, SourceOf] = {
        "unet": lambda name: _unet_source(name, base, motion) + parts.merged.get(("unet", name), ""),
        "vae": lambda _: vae,
        "text_encoder": lambda name: text + parts.merged.get(("text_encoder", name), ""),
        "image_encoder": lambda _: image,
    }
    used, shared = WeightPool() if pool is None else pool, list[SharedTensors]()
    layout, place = layout_of(model, device), device if model.offload == "none" else torch.device("cpu")
    for name, part in parts.modules().items():
        dtype = {"vae": dtypes.vae, "text_encoder": dtypes.text_encoder}.get(name, dtypes.unet)
        part.requires_grad_(False).eval()
        shared += used.move(part, sources[name], device=place, dtype=dtype, layout=layout)
    return tuple(shared)


def _install_ip_adapter(parts: _Parts, weights: LocalWeights, device: torch.device) -> IPAdapter | None:
    if weights.ip_adapter is None:
        return None
    return install_ip_adapter(parts.unet, weights.ip_adapter, image_encoder=parts.image_encoder, device=device)


class _SmallModels(NamedTuple):
    """Models that are not offloaded, because they are small and run beside the other parts."""

    scorer: Scorer | None
    safety_checker: SafetyChecker | None
    upscaler: Upscaler | None


def _read_small_models(weights: LocalWeights, model: ModelConfig, device: torch.device) -> _SmallModels:
    scorer = safety_checker = upscaler = None
    if weights.scorer is not None:
        scorer = read_scorer(weights.scorer, device, allow_pickle=model.allow_pickle)
    if weights.safety_checker is not None:
        safety_checker = read_safety_checker(weights.safety_checker, device, allow_pickle=model.allow_pickle)
    if weights.upscaler is not None:
        upscaler = read_upscaler(weights.upscaler, device)
    return _SmallModels(scorer, safety_checker, upscaler)


def _source(path: Path, name: str) -> str:
    """Digest of the weights in a file, or in that subfolder. Configs do not count, because equal ones may differ in
    text."""
    if path.is_file():
        return digest(path, [path])
    folder = path / name
    suffixes = (".safetensors", *PICKLED_SUFFIXES)
    return digest(folder, sorted(file for file in folder.iterdir() if file.suffix in suffixes))


def _unet_source(name: str, base: str, motion: str) -> str:
    """The source of a weight of the UNet: the base's UNet, the motion adapter, or for the input both."""
    if not motion:
        return base
    if name.startswith("conv_in."):
        return f"{base}+{motion}"
    return motion if "motion_modules" in name else base


def read_config(path: Path) -> dict[str, Any]:
    """The settings in a file of configuration.

    Raises:
        WeightsError: it cannot be read, or is not a JSON object.
    """
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(f"cannot read {path}: {error}") from None
    if not isinstance(value, dict):
        raise WeightsError(f"{path} is not a configuration: it must hold a JSON object")
    return value
