"""Measures a demo model through `pia_ray.Animator`: `python -m training.evaluate --model demo`.

Fixed seeds; prints a table and one JSON line last, and draws a contact sheet. Half of the pictures are worlds that
training never saw; `--pictures DIR` gives the other half. Without it all are worlds.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from PIL import Image, ImageDraw

from pia_ray import Animation, AnimationParams, AnimationRequest, Animator, ModelConfig
from pia_ray.errors import RowError
from pia_ray.media.sizes import fit
from training import registration
from training.draws import Draws
from training.prompts import MOTIONS, PHRASES
from training.registration import fitted_amount, psnr
from training.worlds import make_worlds, views

CAMERA: Final = MOTIONS[:8]
EFFECTS: Final = ("sway", "waves", "flicker", "pulse")
FRAME: Final = 10
"""Frame at which a camera's motion is fitted: far along, and most of the picture still in view."""

SEED: Final = 20_000
TOGETHER: Final = 8

Table = dict[str, Any]


@dataclass(frozen=True)
class Bench:
    """A warm model, its pictures and how many samples to take."""

    animator: Animator
    pictures: list[Image.Image]
    samples: int

    def animate(self, requests: Sequence[tuple[Image.Image, str, dict[str, Any]]]) -> list[Animation]:
        """Animations of pictures and prompts; each request has a seed from its place."""
        made = self.animator.animate(
            [
                AnimationRequest(picture, AnimationParams(prompt=text, **{"seed": SEED + place, **knobs}))
                for place, (picture, text, knobs) in enumerate(requests)
            ]
        )
        for each in made:
            if isinstance(each, RowError):
                raise each
        return [each for each in made if isinstance(each, Animation)]

    def picture(self, place: int) -> Image.Image:
        """The pictures in turn: worlds and the others alternate."""
        return self.pictures[place % len(self.pictures)]


def directions(bench: Bench) -> Table:
    """Camera motions: the fitted amount at frame 10 has the asked sign; the first frame is the picture; how much of
    its sharpness the last frame keeps; and how near frame 10 is to the first moved by that amount, for sharpness
    alone can be had by noise.
    """
    table: Table = {}
    closeness, kept, likeness = [], [], []
    for motion in CAMERA:
        requests = [
            (bench.picture(place), PHRASES[motion][place % 3], {"motion_scale": 1}) for place in range(bench.samples)
        ]
        made = bench.animate(requests)
        fits = [fitted_amount(each.frames, motion, FRAME) for each in made]
        amounts = [amount for amount, _ in fits]
        kinds = [registration.camera_family(each.frames, FRAME) for each in made]
        table[motion] = {
            "right": sum(amount > 0 for amount in amounts),
            "of": len(amounts),
            "kind": sum(kind.split()[0] == motion.split()[0] for kind in kinds),
            "amount": _mean(amounts),
        }
        closeness += [_closeness(each, request[0]) for each, request in zip(made, requests, strict=True)]
        kept += [registration.sharpness_kept(each.frames) for each in made]
        likeness += [-10 * float(np.log10(max(1e-9, error))) for _, error in fits]
    halves = closeness[::2], closeness[1::2]
    return {
        "direction": table,
        "first_frame_db": _mean(closeness),
        "first_frame_db_halves": [_mean(half) for half in halves],
        "first_frame_db_least": min(closeness),
        "sharpness_kept": _median(kept),
        "sharpness_kept_halves": [_median(half) for half in (kept[::2], kept[1::2])],
        "moved_frame_db": _mean(likeness),
    }


def scales(bench: Bench) -> Table:
    """Triples of motion scales 0, 1, 2 with one picture and seed: the fitted amounts rise."""
    requests = [
        (bench.picture(place // 3), CAMERA[place // 3 % 8], {"motion_scale": place % 3, "seed": SEED + place // 3})
        for place in range(3 * bench.samples)
    ]
    made = bench.animate(requests)
    amounts = [_toward(each.frames, text) for each, (_, text, _) in zip(made, requests, strict=True)]
    triples = list(zip(amounts[::3], amounts[1::3], amounts[2::3], strict=True))
    return {
        "scales": {
            "ordered": sum(low < middle < high for low, middle, high in triples),
            "of": len(triples),
            "amounts": [_mean([triple[scale] for triple in triples]) for scale in range(3)],
        }
    }


def loops(bench: Bench) -> Table:
    """Motion scales 3 to 5, at 8, 16 and 24 frames: the last frame is nearer the first than the middle is."""
    count = max(6, bench.samples)
    requests = [
        (
            bench.picture(place),
            (*CAMERA, *EFFECTS)[place % 12],
            {"motion_scale": 3 + place % 3, "num_frames": (16, 16, 8, 24)[place // 3 % 4]},
        )
        for place in range(count)
    ]
    made = bench.animate(requests)
    last = [float(np.abs(each.frames[-1].astype(int) - each.frames[0]).mean()) for each in made]
    # The frame farthest away stands for the middle: an effect may be back at its start half-way.
    away = [
        max(float(np.abs(frame.astype(int) - each.frames[0]).mean()) for frame in each.frames[1:-1]) for each in made
    ]
    return {
        "loops": {
            "closed": sum(end < far for end, far in zip(last, away, strict=True)),
            "of": count,
            "last": _mean(last),
            "farthest": _mean(away),
        }
    }


def effects(bench: Bench) -> Table:
    """Sway, waves, flicker and pulse: the fitted amount, against the same fit on videos asked to stay still."""
    count = max(6, bench.samples // 2)
    still = bench.animate([(bench.picture(place), "still", {"motion_scale": 1}) for place in range(count)])
    table: Table = {}
    for effect in EFFECTS:
        requests = [(bench.picture(place), PHRASES[effect][place % 3], {"motion_scale": 1}) for place in range(count)]
        amounts = [registration.effect_amount(each.frames, effect) for each in bench.animate(requests)]
        control = [registration.effect_amount(each.frames, effect) for each in still]
        table[effect] = {
            "amount": _mean(amounts),
            "still": _mean(control),
            "above_still": sum(one > other for one, other in zip(amounts, control, strict=True)),
            "of": count,
        }
    return {"effects": table, "still_motion": _mean([each.motion for each in still])}


def styles(bench: Bench) -> Table:
    """Motion scales 6 to 8: how near the first and the last frame are to the picture, with nothing asked to move."""
    count = max(3, bench.samples // 4)
    requests = [(bench.picture(place), "still", {"motion_scale": 6 + place % 3}) for place in range(count)]
    made = bench.animate(requests)
    near = [_closeness(each, request[0]) for each, request in zip(made, requests, strict=True)]
    late = [_closeness(each, request[0], -1) for each, request in zip(made, requests, strict=True)]
    return {"styles": {"first_frame_db": _mean(near), "last_frame_db": _mean(late), "of": count}}


def settings(bench: Bench) -> Table:
    """Sizes, aspects, numbers of frames, schedulers and steps: directions right, and the first frame's PSNR."""
    long = bench.animator.model.long_edge
    variants: dict[str, dict[str, Any]] = {
        **{f"{edge} px": {"width": edge, "height": edge} for edge in (64, 96, 128)},
        **{f"{w} x {h}": {"width": w, "height": h} for w, h in ((96, 64), (64, 96), (96, 48))},
        **{f"{frames} frames": {"num_frames": frames} for frames in (8, 16, 24)},
        **{
            f"{scheduler}, {steps} steps": {"scheduler": scheduler, "num_inference_steps": steps}
            for scheduler, steps in (("ddim", 8), ("ddim", 16), ("euler", 8), ("euler", 12))
        },
        "guidance 1": {"guidance_scale": 1.0},
        "guidance 2": {"guidance_scale": 2.0},
        "unknown words": {},
    }
    table: Table = {"long_edge": long}
    for name, knobs in variants.items():
        frame = min(FRAME, knobs.get("num_frames", 16) - 1)
        extra = ", qwrtz the blorp" if name == "unknown words" else ""
        requests = [
            (bench.picture(place), CAMERA[place] + extra, {"motion_scale": 1, **knobs}) for place in range(len(CAMERA))
        ]
        made = bench.animate(requests)
        amounts = [_toward(each.frames, CAMERA[place], frame) for place, each in enumerate(made)]
        table[name] = {
            "right": sum(amount > 0 for amount in amounts),
            "of": len(amounts),
            "amount": _mean(amounts),
            "first_frame_db": _mean([_closeness(each, bench.picture(place)) for place, each in enumerate(made)]),
            "sharpness_kept": _median([registration.sharpness_kept(each.frames) for each in made]),
        }
    return {"settings": table}


PARTS: Final[dict[str, Callable[[Bench], Table]]] = {
    "directions": directions,
    "effects": effects,
    "scales": scales,
    "loops": loops,
    "styles": styles,
    "settings": settings,
}


def draw_sheet(bench: Bench, path: Path, *, rows: int, edge: int = 96) -> None:
    """A contact sheet: the picture and eight frames of a video per row, each motion in turn."""
    shown = (*CAMERA, *EFFECTS, "still")[:rows]
    large = {"zoom out", "pan left", *EFFECTS}
    requests = [
        (bench.picture(2 * place + 1), text, {"motion_scale": 2 if text in large else 1})
        for place, text in enumerate(shown)
    ]
    columns = (0, 2, 4, 6, 8, 10, 12, 15)
    left = 110
    sheet = Image.new("RGB", (left + edge * (len(columns) + 1), (edge + 2) * len(shown)), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (request, made) in enumerate(zip(requests, bench.animate(requests), strict=True)):
        top = row * (edge + 2)
        draw.text((4, top + edge // 3), f"{request[1]}\nmotion scale {request[2]['motion_scale']}", fill="black")
        height, width = made.frames.shape[1:3]
        picture = np.asarray(fit(request[0], (width, height)))
        for column, frame in enumerate([picture, *(made.frames[index] for index in columns)]):
            tile = Image.fromarray(frame)
            tile = tile.resize((round(edge * width / max(tile.size)), round(edge * height / max(tile.size))))
            sheet.paste(tile, (left + column * edge, top))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def pictures_of(folder: Path | None, count: int) -> list[Image.Image]:
    """Views of worlds that training never saw; every second one a picture of the folder, if there is one."""
    draws = Draws(990)
    torch.manual_seed(990)
    worlds = make_worlds(2 * count, draws, together=4)
    drawn = (views(worlds, count, 128, 128, draws) * 127.5 + 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    pictures = [Image.fromarray(each) for each in drawn]
    if folder is not None:
        files = sorted(path for path in folder.iterdir() if path.suffix in {".png", ".jpg", ".jpeg", ".webp"})
        taken = [Image.open(path).convert("RGB") for path in files]
        pictures = [taken[place // 2 % len(taken)] if place % 2 else pictures[place // 2] for place in range(2 * count)]
    return pictures


def print_table(results: Table) -> None:
    """The results for people."""
    for name, value in results.items():
        if isinstance(value, dict):
            print(f"{name}:")
            for key, entry in value.items():
                shown = ", ".join(f"{k} {v}" for k, v in entry.items()) if isinstance(entry, dict) else entry
                print(f"  {key:16} {shown}")
        else:
            print(f"{name:24} {value}")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m training.evaluate", description=__doc__)
    parser.add_argument("--model", default="demo", help="a name, or a folder that runs with the demo's settings")
    parser.add_argument("--pictures", type=Path, help="folder of pictures for every second sample")
    parser.add_argument("--samples", type=int, default=40, help="per camera motion; other parts go with it")
    parser.add_argument("--only", default=",".join(PARTS), help="parts to measure: %(default)s")
    parser.add_argument("--long-edge", type=int, help="in place of the model's own size")
    parser.add_argument("--guidance", type=float, help="in place of the model's own guidance scale")
    parser.add_argument("--steps", type=int, help="in place of the model's own steps")
    parser.add_argument("--sheet", type=Path, help="draw a contact sheet there")
    options = parser.parse_args(arguments)
    model = ModelConfig.named("demo")
    if options.model != "demo":
        model = model.model_copy(update={"base": options.model, "name": "candidate"})
    defaults = {"guidance_scale": options.guidance, "num_inference_steps": options.steps}
    changed = {**model.defaults, **{name: value for name, value in defaults.items() if value is not None}}
    model = model.model_copy(update={"defaults": changed, "long_edge": options.long_edge or model.long_edge})
    started, spent = time.monotonic(), time.process_time()
    results: Table = {"long_edge": model.long_edge, **model.defaults}
    with Animator(model, batch_size=TOGETHER) as animator:
        bench = Bench(animator, pictures_of(options.pictures, 24), options.samples)
        for part in options.only.split(","):
            if part:
                results |= PARTS[part](bench)
        if options.sheet:
            draw_sheet(bench, options.sheet, rows=13)
    results |= {"wall_s": round(time.monotonic() - started, 1), "cpu_s": round(time.process_time() - spent, 1)}
    print_table(results)
    sys.stdout.write(json.dumps(results) + "\n")


def _toward(frames: np.ndarray[Any, Any], motion: str, frame: int = FRAME) -> float:
    return fitted_amount(frames, motion, frame)[0]


def _closeness(made: Animation, picture: Image.Image, frame: int = 0) -> float:
    height, width = made.frames.shape[1:3]
    return psnr(made.frames[frame], np.asarray(fit(picture, (width, height))))


def _mean(values: Sequence[float]) -> float:
    return round(float(np.mean(values)), 3)


def _median(values: Sequence[float]) -> float:
    return round(float(np.median(values)), 3)


if __name__ == "__main__":
    main()
