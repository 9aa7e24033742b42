"""Whether a video shows what Stable Diffusion's safety checker knows as unsafe, measured on the device.

Loads diffusers' `StableDiffusionSafetyChecker` from a folder in its layout; `pia_ray.weights` fetches that folder.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from torch.nn import functional

from pia_ray.errors import WeightsError
from pia_ray.formatting import first_line

CROPS_AT_ONCE: Final = 16

_ADJUSTMENT: Final = 0.01
"""Added to every concept's score where one of special care is found. Source: diffusers' safety_checker.py."""

_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""CLIP's, for folders without preprocessor_config.json."""


@dataclass(frozen=True)
class SafetyChecker:
    """A warm safety checker."""

    model: StableDiffusionSafetyChecker
    side: int
    """Pixels of the squares that it takes."""
    mean: torch.Tensor  # [3, 1, 1], on its device in its precision
    std: torch.Tensor

    @torch.inference_mode()
    def is_unsafe(self, frames: torch.Tensor) -> bool:
        """Whether any of the frames, uint8 [T, H, W, 3] on any device, shows a concept above its threshold.

        Every frame is checked; of one that is not square, squares that together cover it, the middle one among them.
        """
        return any(bool(self._unsafe(part).any()) for part in frames.split(CROPS_AT_ONCE))

    def _unsafe(self, frames: torch.Tensor) -> torch.Tensor:
        """Whether each square of the frames shows such a concept: bool [N]."""
        model: Any = self.model
        squares = torch.cat([(each - self.mean) / self.std for each in self._squares(frames)])
        verdicts = []
        for part in squares.split(CROPS_AT_ONCE):
            embeds = model.visual_projection(model.vision_model(part)[1]).float()
            special = _scores(embeds, model.special_care_embeds, model.special_care_embeds_weights)
            found = (special > 0).any(1, keepdim=True)
            concepts = _scores(embeds, model.concept_embeds, model.concept_embeds_weights, found * _ADJUSTMENT)
            verdicts.append((concepts > 0).any(1))
        return torch.cat(verdicts)

    def _squares(self, frames: torch.Tensor) -> list[torch.Tensor]:
        """Squares of all frames at the model's size, values 0 to 1: [T, 3, side, side] each."""
        height, width = frames.shape[1:3]
        scale = self.side / min(height, width)
        size = [round(height * scale), round(width * scale)]
        values = frames.to(self.mean.device).permute(0, 3, 1, 2).float() / 255
        small = functional.interpolate(values, size, mode="bicubic", antialias=True).clamp(0, 1).to(self.mean.dtype)
        longest = max(size)
        num_squares = 1 if longest == self.side else 2 * math.ceil(longest / self.side) - 1
        axis = 2 if size[0] > size[1] else 3
        room = longest - self.side
        starts = [round(i * room / max(1, num_squares - 1)) for i in range(num_squares)]
        return [small.narrow(axis, start, self.side) for start in starts]


def _scores(
    embeds: torch.Tensor, concepts: torch.Tensor, thresholds: torch.Tensor, adjustment: torch.Tensor | float = 0.0
) -> torch.Tensor:
    """Cosines less their thresholds, to three places as diffusers rounds them: float32 [N, concepts]."""
    # In float64, which TF32 never rounds: a model of dtype tf32 may run its forwards meanwhile.
    cosines = (functional.normalize(embeds).double() @ functional.normalize(concepts.float()).double().T).float()
    return torch.round(cosines - thresholds.float() + adjustment, decimals=3)


def read_safety_checker(folder: Path, device: torch.device, *, allow_pickle: bool = False) -> SafetyChecker:
    """The safety checker in a folder of diffusers' layout, in half precision on a GPU.

    Raises:
        WeightsError: it is not a safety checker, or damaged.
    """
    safe = None if allow_pickle else True
    try:
        # As for scorers, in float32 and cast after.
        model, info = StableDiffusionSafetyChecker.from_pretrained(
            folder, local_files_only=True, use_safetensors=safe, dtype=torch.float32, output_loading_info=True
        )
        path = folder / "preprocessor_config.json"
        given = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise WeightsError(f"cannot load the safety checker from {folder}: {first_line(error)}") from error
    if missing := sorted(info["missing_keys"]):  # random numbers would stand in for them
        raise WeightsError(f"{folder} is not a safety checker of Stable Diffusion: it has no {missing[0]}")
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    return SafetyChecker(
        model=model.requires_grad_(False).eval().to(device, dtype),
        side=int(model.config.vision_config.image_size),
        mean=torch.tensor(given.get("image_mean", _MEAN), device=device, dtype=dtype).view(3, 1, 1),
        std=torch.tensor(given.get("image_std", _STD), device=device, dtype=dtype).view(3, 1, 1),
    )
