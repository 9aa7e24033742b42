"""Likeness of a video to its picture and its prompt, by the features of a CLIP or DINO model on the device.

Loads the model by transformers from a folder in its layout; `pia_ray.weights` fetches that folder.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from PIL import Image
from torch.nn import functional
from transformers import AutoModel, CLIPModel, CLIPTokenizer, CLIPVisionModelWithProjection

from pia_ray.errors import WeightsError
from pia_ray.formatting import first_line
from pia_ray.media.sizes import fit

FRAMES_AT_ONCE: Final = 16

_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""For folders without preprocessor_config.json. Sources: CLIP, arXiv 2103.00020; DINO, arXiv 2104.14294; their code."""

_KINDS: Final = {
    "clip": CLIPModel,
    "clip_vision_model": CLIPVisionModelWithProjection,
    "vit": AutoModel,
    "dinov2": AutoModel,
    "dinov2_with_registers": AutoModel,
    "dinov3_vit": AutoModel,
}
"""Loaders by transformers' model_type."""


@dataclass(frozen=True)
class Similarities:
    """Cosines of a video's features."""

    subject: float
    """The least of a frame and the picture."""
    prompt: float | None
    """The mean of the frames and the prompt; None where the model reads no text or there is none."""


@dataclass(frozen=True)
class Scorer:
    """A warm model that turns pictures, and where it is a whole CLIP texts, into features."""

    model: torch.nn.Module
    kind: str
    """transformers' model_type."""
    tokenizer: CLIPTokenizer | None
    """None where it reads no text."""
    side: int
    """Pixels of the squares that it takes."""
    mean: torch.Tensor  # [3, 1, 1], on its device in its precision
    std: torch.Tensor

    @torch.inference_mode()
    def similarities(self, frames: torch.Tensor, *, image: Image.Image, prompt: str | None) -> Similarities:
        """The similarities of frames, uint8 [T, H, W, 3] on any device, with the picture and the text they are of."""
        height, width = frames.shape[1:3]
        picture = torch.frombuffer(bytearray(fit(image, (width, height)).tobytes()), dtype=torch.uint8)
        pictures = torch.cat([picture.view(1, height, width, 3).to(frames.device), frames])
        seen = torch.cat([self._of_pictures(part) for part in pictures.split(FRAMES_AT_ONCE)])  # [1 + T, D]
        subject = round(float(_cosines(seen[1:], seen[0]).min()), 5)
        if not prompt or self.tokenizer is None:
            return Similarities(subject, None)
        return Similarities(subject, round(float(_cosines(seen[1:], self._of_text(prompt, self.tokenizer)).mean()), 5))

    def _of_pictures(self, pictures: torch.Tensor) -> torch.Tensor:
        """Features of length 1 of uint8 [N, H, W, 3]: float32 [N, D]. The whole picture counts, made a square."""
        values = pictures.to(self.mean.device).permute(0, 3, 1, 2).float() / 255
        squares = functional.interpolate(values, (self.side, self.side), mode="bicubic", antialias=True).clamp(0, 1)
        normal = (squares.to(self.mean.dtype) - self.mean) / self.std
        model: Any = self.model
        if self.kind == "clip":
            found = model.visual_projection(model.vision_model(pixel_values=normal).pooler_output)
        elif self.kind == "clip_vision_model":
            found = model(pixel_values=normal).image_embeds
        else:
            found = model(pixel_values=normal).last_hidden_state[:, 0]  # the class token
        return functional.normalize(found.float(), dim=-1)

    def _of_text(self, text: str, tokenizer: CLIPTokenizer) -> torch.Tensor:
        """Features of length 1 of a text, of which CLIP reads the first 75 tokens: float32 [D]."""
        model: Any = self.model
        longest = model.config.text_config.max_position_embeddings
        tokens = tokenizer(text, truncation=True, max_length=longest, return_tensors="pt").to(self.mean.device)
        read = model.text_model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
        return functional.normalize(model.text_projection(read.pooler_output)[0].float(), dim=-1)


def _cosines(features: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Of each of the features [N, D] with another one [D], all of length 1; in float64, which TF32 never rounds."""
    return features.double() @ other.double()


def read_scorer(folder: Path, device: torch.device, *, allow_pickle: bool = False) -> Scorer:
    """The scorer in a folder of transformers' layout, in half precision on a GPU.

    Raises:
        WeightsError: it is neither CLIP nor DINO, or damaged.
    """
    config = _read(folder / "config.json")
    kind = str(config.get("model_type"))
    if kind not in _KINDS:
        raise WeightsError(f"scorer {folder} is a {kind}: take one of {', '.join(_KINDS)}")
    tokenizer = None
    try:
        # In float32, and cast after: loading in another precision sets torch's default for the whole process a while.
        loaded: Any = _KINDS[kind]
        safe = None if allow_pickle else True
        model = loaded.from_pretrained(folder, local_files_only=True, use_safetensors=safe, dtype=torch.float32)
        if kind == "clip":
            tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise WeightsError(f"cannot load the scorer from {folder}: {first_line(error)}") from error
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    preprocessor = folder / "preprocessor_config.json"
    given = _read(preprocessor) if preprocessor.is_file() else {}
    is_clip = kind.startswith("clip")
    mean = given.get("image_mean", _CLIP_MEAN if is_clip else _IMAGENET_MEAN)
    std = given.get("image_std", _CLIP_STD if is_clip else _IMAGENET_STD)
    return Scorer(
        model=model.requires_grad_(False).eval().to(device, dtype),
        kind=kind,
        tokenizer=tokenizer,
        side=_side(given, config),
        mean=torch.tensor(mean, device=device, dtype=dtype).view(3, 1, 1),
        std=torch.tensor(std, device=device, dtype=dtype).view(3, 1, 1),
    )


def _side(preprocessor: dict[str, Any], config: dict[str, Any]) -> int:
    """Pixels of a side: of the crop, else of the size that the preprocessor or the model names."""
    for size in (
        preprocessor.get("crop_size"),
        preprocessor.get("size"),
        config.get("vision_config", config).get("image_size"),
    ):
        if isinstance(size, dict):
            size = size.get("height", size.get("shortest_edge"))
        if size:
            return int(size)
    return 224


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(f"cannot read {path}: {error}") from None
    return value if isinstance(value, dict) else {}
