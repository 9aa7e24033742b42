"""Draws the pictures of docs/prompts.md, docs/loras.md and docs/few-step.md, and the sheet of the demo model.

`python -m training.doc_pictures docs`
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

from PIL import Image, ImageDraw, ImageFont
from PIL.ImageOps import contain

from pia_ray import Animation, AnimationParams, AnimationRequest, Animator, ModelConfig
from pia_ray.media.image import decode
from pia_ray.media.sizes import fit
from pia_ray.testing import make_lora
from training.pictures.draw import CATALOG, ENTRIES

TILE, GAP, CAPTION = 128, 8, 22
PAPER, INK = "#f6f6f2", "#333333"
SHOWN_FRAMES: Final = (0, 7, 15)
"""Frames of each video that are drawn, one below the other."""

Knobs = Mapping[str, Any]

PROMPTS: Final[Mapping[str, Knobs]] = {
    "zoom in": {"prompt": "a sailboat on the sea, zoom in"},
    "pan left": {"prompt": "a sailboat on the sea, pan left"},
    "(pan left:1.4)": {"prompt": "a sailboat on the sea, (pan left:1.4)", "prompt_syntax": "a1111"},
    "(pan left:0.3)": {"prompt": "a sailboat on the sea, (pan left:0.3)", "prompt_syntax": "a1111"},
    "same, plain": {"prompt": "a sailboat on the sea, (pan left:0.3)"},
}
LORAS: Final[Mapping[str, Knobs]] = {
    "none": {"lora": "none"},
    "ink:0.4": {"lora": "ink:0.4"},
    "ink:0.8": {"lora": "ink:0.8"},
    "ink:-0.8": {"lora": "ink:-0.8"},
    "ink:0.4+fog:0.4": {"lora": "ink:0.4+fog:0.4"},
}
FEW_STEPS: Final[Mapping[str, Knobs]] = {
    "ddim, 25": {"scheduler": "ddim", "num_inference_steps": 25},
    "ddim, 4": {"scheduler": "ddim", "num_inference_steps": 4},
    "ddim-trailing, 4": {"scheduler": "ddim-trailing", "num_inference_steps": 4},
    "euler-trailing, 4": {"scheduler": "euler-trailing", "num_inference_steps": 4},
    "lcm, 4": {"scheduler": "lcm", "num_inference_steps": 4},
}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m training.doc_pictures", description=__doc__)
    parser.add_argument("folder", type=Path, help="folder to write to")
    folder: Path = parser.parse_args(arguments).folder
    with tempfile.TemporaryDirectory() as temporary, Animator(_with_loras(Path(temporary))) as animator:
        for name, rows in {"prompts": PROMPTS, "loras": LORAS, "few-step": FEW_STEPS}.items():
            sheet(animator, rows).save(folder / f"{name}.jpg", quality=82, optimize=True)
        catalog_sheet(animator).save(folder / "demo-sheet.webp", quality=80, method=6)


def catalog_sheet(animator: Animator, *, columns: int = 9, edge: int = 112, left: int = 120) -> Image.Image:
    """Each bundled picture, and so many frames of its video, a row; what was asked for stands before them."""
    whole = Image.new("RGB", (left + edge * (columns + 1), (edge + 2) * len(ENTRIES)), "white")
    draw, font = ImageDraw.Draw(whole), ImageFont.load_default(12)
    for row, entry in enumerate(ENTRIES):
        picture = decode((CATALOG / "images" / entry.file).read_bytes()).rgb
        knobs: Knobs = {"prompt": entry.prompt, "motion_scale": entry.motion_scale, "seed": entry.seed, "lora": "none"}
        length: Knobs = {} if entry.num_frames is None else {"num_frames": entry.num_frames}
        [made] = animator.animate([AnimationRequest(picture, AnimationParams(**knobs, **length), id=entry.id)])
        if not isinstance(made, Animation):
            raise made
        last, top = len(made.frames) - 1, row * (edge + 2)
        text = f"{entry.prompt.split(',')[0]}\nmotion scale {entry.motion_scale}\n{last + 1} frames"
        draw.text((4, top + edge // 4), text, fill="black", font=font)
        frames = [Image.fromarray(made.frames[round(last * index / (columns - 1))]) for index in range(columns)]
        for column, frame in enumerate([fit(picture, frames[0].size), *frames]):
            whole.paste(contain(frame, (edge, edge), Image.Resampling.BICUBIC), (left + column * edge, top))
    return whole


def sheet(animator: Animator, rows: Mapping[str, Knobs]) -> Image.Image:
    """The frames of one video a column, with the name of its knobs below."""
    entry = next(entry for entry in ENTRIES if entry.id == "sailboat")
    picture = decode((CATALOG / "images" / entry.file).read_bytes()).rgb
    shared: dict[str, Any] = {"prompt": entry.prompt, "motion_scale": 1, "seed": entry.seed, "lora": "none"}
    requests = [
        AnimationRequest(picture, AnimationParams(**{**shared, **knobs}), id=name) for name, knobs in rows.items()
    ]
    size = (GAP + len(rows) * (TILE + GAP), GAP + len(SHOWN_FRAMES) * (TILE + GAP) + CAPTION)
    whole = Image.new("RGB", size, PAPER)
    draw, font = ImageDraw.Draw(whole), ImageFont.load_default(12)
    for place, (name, made) in enumerate(zip(rows, animator.animate(requests), strict=True)):
        if not isinstance(made, Animation):
            raise made
        left = GAP + place * (TILE + GAP)
        for row, index in enumerate(SHOWN_FRAMES):
            frame = Image.fromarray(made.frames[index]).resize((TILE, TILE), Image.Resampling.BICUBIC)
            whole.paste(frame, (left, GAP + row * (TILE + GAP)))
        draw.text((left + TILE // 2, size[1] - CAPTION), name, fill=INK, font=font, anchor="ma")
    return whole


def _with_loras(folder: Path) -> ModelConfig:
    """The bundled model with two LoRAs of random weights, which no row gets unless it names them."""
    checkpoint = Path(str(files("pia_ray"))) / "demo" / "model"
    loras = {
        name: {"path": str(make_lora(folder / f"{name}.safetensors", checkpoint, seed=seed, strength=1.7)), "weight": 0}
        for seed, name in enumerate(("ink", "fog"), start=1)
    }
    settings = ModelConfig.named("demo").model_dump(exclude_defaults=True)
    return ModelConfig(**{**settings, "loras": loras})


if __name__ == "__main__":
    main()
