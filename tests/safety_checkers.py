"""Tiny random safety checkers in the layout of CompVis/stable-diffusion-safety-checker, of a known verdict."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

SIDE = 32
NEVER, ALWAYS = 2.0, -2.0
"""Thresholds that no cosine reaches, and that each exceeds."""


def make_checker(folder: Path, *, concepts: float = NEVER, special: float = NEVER) -> Path:
    """A checker whose concepts have these thresholds, with the names of tensors that the published one has."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        seen = {**sizes, "image_size": SIDE, "patch_size": 8}
        model = StableDiffusionSafetyChecker(CLIPConfig(vision_config=seen, projection_dim=16))
        model.concept_embeds.data = torch.randn(17, 16)
        model.special_care_embeds.data = torch.randn(3, 16)
    model.concept_embeds_weights.data.fill_(concepts)
    model.special_care_embeds_weights.data.fill_(special)
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    published = {name.replace("vision_model.", "vision_model.vision_model."): each for name, each in tensors.items()}
    published["vision_model.vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    save_file(published, folder / "model.safetensors", metadata={"format": "pt"})
    CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}).save_pretrained(
        folder
    )
    return folder
