"""Start-up time of `import pia_ray` and of `pia-ray --help`, beside that of a bare Python; then one run of
`pia-ray image`, and one of `pia-ray demo` with the phases of its start.

Prints a card and, last, one JSON line. Run: `.venv/bin/python benchmarks/startup.py [RUNS]`
"""

from __future__ import annotations

import json
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

AIM_S = 0.5
FIRST_VIDEO_AIM_S = 10.0
IMAGE_AIM_S = 8.0
PIA_RAY = str(Path(sys.executable).parent / "pia-ray")
PICTURE = Path(__file__).parent.parent / "pia_ray" / "demo" / "catalog" / "images" / "sunset-mountains.jpg"
COMMANDS = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "import pia_ray": [sys.executable, "-c", "import pia_ray"],
    "import pia_ray.config.catalog": [sys.executable, "-c", "import pia_ray.config.catalog"],
    "pia-ray --help": [PIA_RAY, "--help"],
}


def main(runs: int) -> None:
    """Measures all commands by turns, so that a slow moment of the machine falls on all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for turn in range(runs + 1):
        for name, command in COMMANDS.items():
            started = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            if turn:  # the first turn fills the page cache
                seconds[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    print(f"start-up, median of {runs} runs each, by turns; aim below {AIM_S} s")
    for name, median in medians.items():
        low, high = min(seconds[name]), max(seconds[name])
        print(f"  {name:24} {median * 1000:7.0f} ms   ({low * 1000:.0f} to {high * 1000:.0f})")
    image_s, image_cpu_s = image()
    print(f"  pia-ray image            {image_s:7.1f} s    ({image_cpu_s:.1f} CPU-s; aim below {IMAGE_AIM_S:g} s)")
    first_s, all_s, phases = demo()
    print(f"  pia-ray demo             {first_s:7.1f} s to the first video (aim below {FIRST_VIDEO_AIM_S:g})")
    print(f"                           {all_s:7.1f} s in all")
    for name, took in phases.items():
        print(f"    {name:22} {took:7.1f} s")
    card = {
        "benchmark": "startup",
        "image_s": round(image_s, 1),
        "image_cpu_s": round(image_cpu_s, 1),
        "demo_first_video_s": first_s,
        "demo_s": round(all_s, 1),
        "demo_phases_s": phases,
        "median_s": {name: round(median, 4) for name, median in medians.items()},
        "runs": runs,
        "aim_s": AIM_S,
        "within_aim": all(median < AIM_S for median in medians.values()),
        "cpus": os.cpu_count(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "commit": commit(),
    }
    print(json.dumps(card))


def image() -> tuple[float, float]:
    """Wall and CPU seconds of `pia-ray image` with the demo model."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        words = ["image", str(PICTURE), "-o", f"{folder}/a.mp4", "--prompt", "pan right", "--model", "demo"]
        subprocess.run([PIA_RAY, *words], check=True, stdout=subprocess.DEVNULL)
    wall_s = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall_s, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def demo() -> tuple[float, float, dict[str, float]]:
    """Seconds of `pia-ray demo` from its process's start to the first video and to its end, and its phases."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        command = [PIA_RAY, "demo", "--output", f"{folder}/out", "-v"]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    all_s = time.perf_counter() - started
    line = re.search(r"start: (.+)", done.stdout)
    assert line, done.stdout[-2000:]
    phases = {name: float(took) for name, took in re.findall(r"([A-Za-z ]+?) ([0-9.]+) s", line[1].replace(", ", ","))}
    command_s = statistics.median(imports())
    return round(command_s + sum(phases.values()), 1), all_s, {"command": round(command_s, 1), **phases}


def imports() -> list[float]:
    """Seconds of what `pia-ray demo` imports before its run begins."""
    times = []
    for _ in range(3):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-c", "import pia_ray.catalog.cluster_run"], check=True)
        times.append(time.perf_counter() - started)
    return times


def commit() -> str:
    """The short commit of the checkout, with + if files differ from it; "unknown" outside of one."""
    command = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 9)
