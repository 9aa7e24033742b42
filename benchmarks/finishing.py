"""CPU seconds of finishing a video, and the busy share of the engine with and without it.

The videos are slow zooms into bundled pictures. The catalogue is animated by the bundled
model, whose engine shares the CPUs with the finishing; from an engine on a GPU finishing takes nothing.
Prints a card and, last, one JSON line. Run: `.venv/bin/python benchmarks/finishing.py [--side 512] [--rows 8]`
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections import defaultdict
from importlib.resources import files
from pathlib import Path
from typing import Any

from card import line, machine
from encoding import NUM_FRAMES, PICTURES, zoom

from pia_ray import AnimationParams, CatalogConfig, run_local
from pia_ray.config.model import build
from pia_ray.config.resolving import resolve
from pia_ray.media.finish import finish

FINISHINGS: dict[str, dict[str, Any]] = {
    "motion to 24/s": {"playback_fps": 24},
    "blend to 24/s": {"playback_fps": 24, "interpolate": "blend"},
    "motion to 60/s": {"playback_fps": 60},
    "pad to 9:16": {"aspect": "9:16", "fit": "pad"},
    "blur to 9:16": {"aspect": "9:16", "fit": "blur"},
}
"""The knobs of each finishing."""


def main(*, side: int, rows: int) -> None:
    """Takes all finishings by turns, so that a slow moment of the machine falls on all of them."""
    videos = [zoom(name, side=side) for name in PICTURES]
    seconds: dict[str, list[float]] = defaultdict(list)
    for frames in videos:
        for name, knobs in FINISHINGS.items():
            params = resolve(AnimationParams(prompt="-", **knobs), {}, model_defaults={})
            started = time.process_time()
            finish(frames, params)
            seconds[name].append(time.process_time() - started)
    print(f"finishing: {NUM_FRAMES} frames of {side} x {side} px, {len(videos)} videos")
    print("                     CPU s, median")
    for name, times in seconds.items():
        print(f"  {name:18}{statistics.median(times):14.2f}")
    shares = {name: busy(FINISHINGS.get(name, {}), rows=rows) for name in ("none", "motion to 24/s", "motion to 60/s")}
    print(f"  busy share of the engine, {rows} rows of the demo model:")
    for name, share in shares.items():
        print(f"  {name:18}{share:14.3f}")
    facts = machine("av", "pillow", "torch")
    print(f"  {line(facts)}")
    card = {
        "benchmark": "finishing",
        "side": side,
        "num_frames": NUM_FRAMES,
        "cpu_s": {name: round(statistics.median(times), 3) for name, times in seconds.items()},
        "busy_share": shares,
        **facts,
    }
    print(json.dumps(card))


def busy(knobs: dict[str, Any], *, rows: int) -> float:
    """The busy share of the engine in a run of so many rows of the demo catalogue with these knobs."""
    with tempfile.TemporaryDirectory() as folder:
        manifest = Path(folder) / "rows.csv"
        names = [name for name in PICTURES for _ in range(-(-rows // len(PICTURES)))][:rows]
        pictures = files("pia_ray") / "demo/catalog/images"
        cells = [f"{index},{pictures / name},a picture" for index, name in enumerate(names)]
        manifest.write_text("id,image,prompt\n" + "\n".join(cells) + "\n")
        settings = {"manifest": str(manifest), "output": f"{folder}/out", "model": "demo", "defaults": knobs}
        summary = run_local(build(CatalogConfig, settings))
        return round(summary.progress.busy_share or 0.0, 3)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--rows", type=int, default=8)
    args = parser.parse_args()
    main(side=args.side, rows=args.rows)
