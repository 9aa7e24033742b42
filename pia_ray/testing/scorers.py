"""Tiny scorers with random weights in transformers' layout: a CLIP that reads texts, and a DINO."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pia_ray.config.resolving import seed_from_id
from pia_ray.testing.checkpoints import make_tokenizer, write_slow_tokenizer

_SIDE, _PATCH = 32, 8
_WIDTH = 16


def make_scorer(folder: Path, *, kind: Literal["clip", "dino"] = "clip", seed: int = 0) -> Path:
    """Writes a scorer for `ModelConfig.scorer`; returns its folder. Equal arguments give equal files."""
    import torch
    from transformers import CLIPConfig, CLIPModel, Dinov2Config, Dinov2Model

    folder = Path(folder)
    sizes: dict[str, Any] = {"hidden_size": _WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2}
    seen: dict[str, Any] = {"image_size": _SIDE, "patch_size": _PATCH}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_from_id(f"scorer/{kind}/{seed}") % 2**63)
        if kind == "dino":
            Dinov2Model(Dinov2Config(**sizes, **seen, mlp_ratio=2)).save_pretrained(folder)
            return folder
        tokenizer = make_tokenizer()
        read = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "max_position_embeddings": 77}
        config = CLIPConfig(
            text_config={**sizes, **read, "intermediate_size": 2 * _WIDTH},
            vision_config={**sizes, **seen, "intermediate_size": 2 * _WIDTH},
            projection_dim=_WIDTH,
        )
        CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_slow_tokenizer(folder)
    return folder
