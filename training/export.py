"""Writes a trained model as float16 safetensors in diffusers' layout: `python -m training.export`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import diffusers
import torch

from training import checkpoints, models

INDEX: Final = {
    "_class_name": "PIAPipeline",
    "_diffusers_version": diffusers.__version__,
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "motion_adapter": [None, None],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNetMotionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def export(vae: Any, unet_state: Path, out: Path) -> None:
    """Writes the model folder from an autoencoder and the averaged weights of a UNet's training."""
    tokenizer = models.make_tokenizer()
    parts: Any = torch.nn.ModuleDict({"unet": models.make_unet(), "text": models.make_text_encoder(tokenizer)})
    trained = checkpoints.load(unet_state)["average"]  # also holds the linear maps of `Guide`
    parts.load_state_dict({name: value for name, value in trained.items() if name.split(".")[0] in parts})
    for part in (parts["unet"], parts["text"], vae):
        part.to(dtype=torch.float16, memory_format=torch.contiguous_format)
    parts["unet"].save_pretrained(out / "unet")
    parts["text"].save_pretrained(out / "text_encoder")
    vae.save_pretrained(out / "vae")
    models.make_scheduler().save_pretrained(out / "scheduler")
    tokenizer.save_pretrained(out / "tokenizer")
    _write_old_tokenizer(tokenizer, out / "tokenizer")
    for config in out.glob("*/config.json"):
        settings = json.loads(config.read_text(encoding="utf-8"))
        settings.pop("_name_or_path", None)  # where it was trained is nobody's business
        config.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (out / "model_index.json").write_text(json.dumps(INDEX, indent=2) + "\n", encoding="utf-8")


def _write_old_tokenizer(tokenizer: Any, folder: Path) -> None:
    """vocab.json and merges.txt, which versions of transformers before 5 read in place of tokenizer.json."""
    merges = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]["merges"]
    lines = ["#version: 0.2", *(" ".join(pair) if isinstance(pair, list) else pair for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    vocabulary = dict(sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]))
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False) + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m training.export", description=__doc__)
    parser.add_argument("--vae", type=Path, required=True, help="model folder whose vae/ to take")
    parser.add_argument("--unet", type=Path, required=True, help="state of the UNet's training, unet.pt")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    settings = parser.parse_args(arguments)
    export(models.load_vae(settings.vae), settings.unet, settings.out)


if __name__ == "__main__":
    main()
