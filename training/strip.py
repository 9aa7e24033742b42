"""Draws the animated strip of the README: pictures of the bundled catalogue above, their videos below.

`python -m training.strip docs/demo.webp`
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pia_ray import AnimationParams, AnimationRequest, Animator, ModelConfig
from pia_ray.errors import RowError
from pia_ray.media.image import decode
from pia_ray.media.sizes import fit
from training.pictures.draw import CATALOG, ENTRIES

SHOWN: Final = ("cat", "balloon", "sailboat", "mug", "candle", "perfume")
LONG_EDGE: Final = 128
"""Pixels of the videos, so that a square cut from one fills its tile. The demo itself makes 96."""

TILE, GAP, CAPTION = 132, 10, 34
PAPER, INK = "#f6f6f2", "#333333"


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m training.strip", description=__doc__)
    parser.add_argument("path", type=Path, help="webp to write")
    parser.add_argument("--fps", type=int, default=8)
    settings = parser.parse_args(arguments)
    entries = [entry for name in SHOWN for entry in ENTRIES if entry.id == name]
    pictures = [decode((CATALOG / "images" / entry.file).read_bytes()).rgb for entry in entries]
    requests = [
        AnimationRequest(
            picture,
            AnimationParams(prompt=entry.prompt, motion_scale=entry.motion_scale, seed=entry.seed),
            id=entry.id,
        )
        for entry, picture in zip(entries, pictures, strict=True)
    ]
    model = ModelConfig.named("demo").model_copy(update={"long_edge": LONG_EDGE})
    with Animator(model) as animator:
        made = animator.animate(requests)
    for each in made:
        if isinstance(each, RowError):
            raise each
    videos = [each.frames for each in made if not isinstance(each, RowError)]
    captions = [entry.prompt.split(",")[0] for entry in entries]
    sheets = [sheet(pictures, [video[index] for video in videos], captions) for index in range(len(videos[0]))]
    sheets[0].save(
        settings.path,
        save_all=True,
        append_images=sheets[1:],
        duration=1000 // settings.fps,
        loop=0,
        quality=72,
        method=6,
    )


def sheet(pictures: list[Image.Image], frames: list[np.ndarray[Any, Any]], captions: list[str]) -> Image.Image:
    """One frame of the strip."""
    size = (GAP + len(pictures) * (TILE + GAP), GAP + 2 * (TILE + GAP) + CAPTION - GAP)
    whole = Image.new("RGB", size, PAPER)
    draw, font = ImageDraw.Draw(whole), ImageFont.load_default(12)
    for place, (picture, frame, caption) in enumerate(zip(pictures, frames, captions, strict=True)):
        left = GAP + place * (TILE + GAP)
        # The videos' shape first, so that the square is cut from the same part of both.
        shown = fit(picture, (TILE * frame.shape[1] // frame.shape[0], TILE))
        if frame.shape[0] > frame.shape[1]:
            shown = fit(picture, (TILE, TILE * frame.shape[0] // frame.shape[1]))
        whole.paste(fit(shown, (TILE, TILE)), (left, GAP))
        whole.paste(fit(Image.fromarray(frame), (TILE, TILE)), (left, 2 * GAP + TILE))
        draw.text((left + TILE // 2, 2 * (GAP + TILE) + GAP), caption, fill=INK, font=font, anchor="ma")
    return whole


if __name__ == "__main__":
    main()
