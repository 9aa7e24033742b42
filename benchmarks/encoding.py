"""CPU seconds and bytes of one finished video by format: encoded and opened again to verify it, as every row's is.

The videos are slow zooms into bundled pictures, so that there is texture and motion; files of other contents differ.
Prints a card and, last, one JSON line. Run: `.venv/bin/python benchmarks/encoding.py [--side 512] [--rounds 3]`
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import defaultdict
from importlib.resources import files

import numpy as np
from card import line, machine
from PIL import Image

from pia_ray.media.video import MIME, encode, thumbnail, verify

PICTURES = ("sunset-mountains.jpg", "cat.webp", "night-city.webp", "forest-path.jpg")
NUM_FRAMES = 16


def main(*, side: int, rounds: int) -> None:
    """Takes all formats by turns, so that a slow moment of the machine falls on all of them."""
    videos = [zoom(name, side=side) for name in PICTURES]
    seconds: dict[str, list[float]] = defaultdict(list)
    sizes: dict[str, list[int]] = defaultdict(list)
    for _ in range(rounds):
        for frames in videos:
            for name in MIME:
                started = time.process_time()
                video = encode(frames, fps=8, format=name, provenance={})
                verify(video)
                seconds[name].append(time.process_time() - started)
                sizes[name].append(video.size_bytes)
            started = time.process_time()
            sizes["thumbnail"].append(len(thumbnail(frames, fps=8)))
            seconds["thumbnail"].append(time.process_time() - started)
    print(f"encoding: {NUM_FRAMES} frames of {side} x {side} px, {len(videos)} videos, {rounds} rounds by turns")
    print("               CPU s, median       kB, least to most")
    for name, times in seconds.items():
        low, high = min(sizes[name]) / 1000, max(sizes[name]) / 1000
        print(f"  {name:12}{statistics.median(times):14.2f}{low:15.0f} to {high:.0f}")
    facts = machine("av", "pillow")
    print(f"  {line(facts)}")
    card = {
        "benchmark": "encoding",
        "side": side,
        "num_frames": NUM_FRAMES,
        "cpu_s": {name: round(statistics.median(times), 3) for name, times in seconds.items()},
        "bytes": {name: sorted(set(found)) for name, found in sizes.items()},
        **facts,
    }
    print(json.dumps(card))


def zoom(name: str, *, side: int) -> np.ndarray:
    """A bundled picture that comes slowly nearer: uint8 [T, side, side, 3]."""
    picture = Image.open(files("pia_ray") / "demo/catalog/images" / name).convert("RGB")
    width, height = picture.size
    frames = []
    for frame in range(NUM_FRAMES):
        edge = min(width, height) * (0.95 - 0.01 * frame)
        left, top = (width - edge) / 2, (height - edge) / 2
        box = (left, top, left + edge, top + edge)
        frames.append(np.asarray(picture.resize((side, side), Image.Resampling.LANCZOS, box=box)))
    return np.stack(frames)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    main(side=args.side, rounds=args.rounds)
