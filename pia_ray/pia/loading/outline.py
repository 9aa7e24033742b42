"""A model's weights on disk -> what it is made of, by configs and headers: layers of its LoRAs, words, predictions.

Loads no weights of the base. Modules are made on torch's meta device, where they take no memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from diffusers import MotionAdapter, UNet2DConditionModel, UNetMotionModel
from transformers import CLIPTextConfig, CLIPTextModel

from pia_ray.config.model import ModelConfig
from pia_ray.pia.components import Changeable
from pia_ray.pia.loading.load import config_folder, read_config, scheduler_config
from pia_ray.pia.loading.lora import LoraFile, read_lora
from pia_ray.pia.loading.textual_inversion import bundled
from pia_ray.weights import LocalWeights


@dataclass(frozen=True)
class Outline:
    """The make-up of a model."""

    scheduler: Mapping[str, Any]
    """The settings of its scheduler."""
    loras: Mapping[str, LoraFile]
    words: tuple[str, ...]
    """Of textual inversions."""


def outline(weights: LocalWeights, model: ModelConfig) -> Outline:
    """The make-up of the model of these weights.

    Raises:
        WeightsError: a LoRA is not one, or not for this model; a config is missing.
    """
    parts = _modules(weights) if weights.loras else None
    files = {name: read_lora(path, parts) for name, path in weights.loras.items()} if parts is not None else {}
    words = {*weights.textual_inversions, *(word for path in weights.loras.values() for word in bundled(path))}
    return Outline(scheduler_config(weights, model), files, tuple(sorted(words)))


class _Modules(NamedTuple):
    unet: UNetMotionModel
    text_encoder: CLIPTextModel


def _modules(weights: LocalWeights) -> Changeable:
    configs = config_folder(weights)
    config = read_config(configs / "unet" / "config.json")
    text = CLIPTextConfig.from_pretrained(configs / "text_encoder", local_files_only=True)
    with torch.device("meta"):
        if config.get("_class_name") == "UNetMotionModel":
            unet = UNetMotionModel.from_config(config)
        else:
            plain, adapter = UNet2DConditionModel.from_config(config), None
            if weights.motion_adapter is not None and weights.motion_adapter.is_dir():
                adapter = MotionAdapter.from_config(read_config(weights.motion_adapter / "config.json"))
            unet = UNetMotionModel.from_unet2d(plain, adapter)
        return _Modules(unet, CLIPTextModel(text))
