"""The damages that each number of `pia_ray.judge` tells from a clean video, and from what strength on.

Clean clips are steady motions over the bundled pictures, drawn worlds and, with `--photographs`, what those folders
hold; the damages are those of `damages.py`. Prints three tables in Markdown and, last, one JSON line.
Run: `.venv/bin/python benchmarks/damage.py [--clips 24] [--photographs FOLDER ...] [--sheet FILE]`
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path

import damages
import numpy as np
import torch
from card import line, machine
from PIL import Image

from pia_ray.media.judgement import Judgement, judge_frames

sys.path.insert(0, str(Path(__file__).parents[1]))  # training/ is not installed
from training.draws import Draws
from training.worlds import make_worlds

BOUNDS = {
    "likeness": -1,
    "likeness_min": -1,
    "likeness_part": -1,
    "flicker": 1,
    "sharpness, low": -1,
    "sharpness, high": 1,
    "colour_shift": 1,
    "stillness": 1,
}
"""The numbers, and whether damage lowers (-1) or raises (1) them. Sharpness has a bound on both sides."""

TOLD_AUC, TOLD_RANK = 0.95, 0.9
SEED = 1
SHEET_CLIPS = 2


def main(*, clips: int, photographs: Sequence[Path], sheet: Path | None) -> None:
    """Judges every clip, clean and damaged, and prints what the numbers tell."""
    pictures = pictures_of(photographs)
    values, loops, seconds, strips = [], [], list[float](), []
    for index in range(clips):
        clip = clip_of(pictures, index)
        judged = [judged_in(seconds, frames, clip) for frames in variants(clip, index)]
        values.append([[judgement.as_dict()[name.split(",")[0]] for name in BOUNDS] for judgement in judged])
        if clip.motion in damages.ONE_WAY:
            loops.append([judged_in(seconds, each, clip, loop=True).closure for each in damages.loops(clip)])
        if sheet is not None and index < SHEET_CLIPS:
            strips += [strip(frames) for place, frames in enumerate(variants(clip, index)) if place % 5 in (0, 3)]
    print(f"damage: {clips} clips of {len(pictures)} pictures, {damages.SIDE} px, {damages.NUM_FRAMES} frames\n")
    told = report(np.array(values, float), np.array(loops, float))
    facts = machine("numpy", "pillow")
    cpu_s = statistics.median(seconds)
    print(f"\n  {cpu_s:.3f} CPU s a clip; {line(facts)}")
    card = {"benchmark": "damage", "clips": clips, "pictures": len(pictures), "told": told, "cpu_s": round(cpu_s, 4)}
    print(json.dumps({**card, **facts}))
    if sheet is not None:
        Image.fromarray(np.concatenate(strips)).save(sheet)


def clip_of(pictures: Sequence[Image.Image], index: int) -> damages.Clip:
    """The clip of that index: each picture and each motion in turn."""
    draws = np.random.default_rng([SEED, index])
    picture, other = (pictures[place % len(pictures)] for place in (index, index + 7))
    return damages.clip(picture, other, damages.MOTIONS[index % len(damages.MOTIONS)], draws)


def variants(clip: damages.Clip, index: int) -> Iterator[np.ndarray]:
    """The clean clip, then each damage in each strength."""
    yield clip.frames
    for place, damage in enumerate(damages.DAMAGES.values()):
        for strength in range(damages.STRENGTHS):
            yield damage(clip, strength, np.random.default_rng([SEED, index, place]))


def judged_in(seconds: list[float], frames: np.ndarray, clip: damages.Clip, *, loop: bool = False) -> Judgement:
    """The judgement; its CPU seconds are added to `seconds`."""
    started = time.process_time()
    judgement = judge_frames(frames, image=clip.picture, motion=0.0, loop=loop)
    seconds.append(time.process_time() - started)
    return judgement


def pictures_of(folders: Sequence[Path]) -> list[Image.Image]:
    """Bundled pictures, worlds and photographs by turns."""
    torch.manual_seed(SEED)
    worlds = make_worlds(10, Draws(SEED), together=2).pictures.permute(0, 2, 3, 1).numpy()
    drawn = sorted((path for path in (files("pia_ray") / "demo/catalog/images").iterdir()), key=lambda path: path.name)
    found = sorted(path for folder in folders for path in folder.iterdir() if path.suffix in {".png", ".jpg", ".webp"})
    opened = [[Image.open(path).convert("RGB") for path in paths] for paths in (drawn, found)]
    kinds = [[each for each in kind if is_textured(each)] for kind in (*opened, [Image.fromarray(w) for w in worlds])]
    longest = max(len(kind) for kind in kinds)
    return [kind[place] for place in range(longest) for kind in kinds if place < len(kind)]


def is_textured(picture: Image.Image) -> bool:
    """Whether the picture is large enough and shows something that could be damaged."""
    return min(picture.size) >= 200 and float(np.asarray(picture.convert("L")).std()) >= 12


def report(values: np.ndarray, loops: np.ndarray) -> dict[str, dict[str, object]]:
    """Prints the tables; for each damage the number that tells it best. `values` is [clips, variants, numbers]."""
    signs = np.array(list(BOUNDS.values()))
    clean, damaged = values[:, 0], values[:, 1:].reshape(len(values), -1, damages.STRENGTHS, len(signs))
    told, moderate = {}, {}
    print("| damage | told by | AUC at strengths 1 to 5 | Spearman |\n|---|---|---|---|")
    for place, damage in enumerate(damages.DAMAGES):
        aucs, ranks = {}, {}
        for number, (name, sign) in enumerate(BOUNDS.items()):
            one, other = sign * clean[:, number], sign * damaged[:, place, :, number]
            aucs[name] = [auc(one, each) for each in other.T]
            ranks[name] = rank_correlation(np.concatenate([one[:, None], other], 1))
        moderate[damage] = {name: each[damages.MODERATE] for name, each in aucs.items()}
        told[damage] = print_best(damage, aucs, ranks)
    sign_of_closure = -1.0
    aucs = {"closure": [auc(sign_of_closure * loops[:, 0], sign_of_closure * each) for each in loops[:, 1:].T]}
    told["open seam"] = print_best("open seam", aucs, {"closure": rank_correlation(sign_of_closure * loops)})
    print("\n| AUC at strength 3 | " + " | ".join(BOUNDS) + " |\n|---|" + "---|" * len(BOUNDS))
    for damage, each in moderate.items():
        print(f"| {damage} | " + " | ".join(f"{value:.2f}" for value in each.values()) + " |")
    print("\n| clean | least | 5 % | median | 95 % | most |\n|---|---|---|---|---|---|")
    for number, name in enumerate(BOUNDS):
        if not name.endswith("high"):
            quantiles = np.quantile(clean[:, number], (0, 0.05, 0.5, 0.95, 1))
            print(f"| {name.split(',')[0]} | " + " | ".join(f"{value:.3f}" for value in quantiles) + " |")
    return told


def print_best(damage: str, aucs: dict[str, list[float]], ranks: dict[str, float]) -> dict[str, object]:
    """Prints the damage's row for the number that tells it best, and gives it."""

    def goodness(name: str) -> tuple[float, float]:
        found, rank = aucs[name][damages.MODERATE], ranks[name]
        return min(found / TOLD_AUC, 1) + min(rank / TOLD_RANK, 1), found + rank

    best = max(aucs, key=goodness)
    print(f"| {damage} | {best} | {' '.join(f'{each:.2f}' for each in aucs[best])} | {ranks[best]:.2f} |")
    return {"by": best, "auc": round(aucs[best][damages.MODERATE], 3), "spearman": round(ranks[best], 3)}


def auc(clean: np.ndarray, damaged: np.ndarray) -> float:
    """The share of pairs in which the damaged clip is worse, those that are the same half."""
    return float((damaged[:, None] > clean).mean() + (damaged[:, None] == clean).mean() / 2)


def rank_correlation(values: np.ndarray) -> float:
    """The mean over clips of Spearman's correlation of [clips, strengths] with the strength."""
    strengths = np.arange(values.shape[1]) - (values.shape[1] - 1) / 2
    ranks = (values[:, :, None] > values[:, None]).sum(2) + (values[:, :, None] == values[:, None]).sum(2) / 2
    ranks = ranks - ranks.mean(1, keepdims=True)
    size = np.sqrt((ranks**2).sum(1) * (strengths**2).sum())
    return float(np.mean(np.where(size > 0, ranks @ strengths / np.maximum(size, 1e-9), 0.0)))


def strip(frames: np.ndarray, edge: int = 96) -> np.ndarray:
    """Six frames of a clip side by side."""
    taken = frames[np.linspace(0, len(frames) - 1, 6).round().astype(int)]
    return np.concatenate([np.asarray(Image.fromarray(frame).resize((edge, edge))) for frame in taken], 1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clips", type=int, default=24)
    parser.add_argument("--photographs", type=Path, nargs="*", default=[], help="folders of photographs, to add")
    parser.add_argument("--sheet", type=Path, help="draw clips, clean and damaged, there")
    args = parser.parse_args()
    main(clips=args.clips, photographs=args.photographs, sheet=args.sheet)
