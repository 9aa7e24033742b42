"""Start-up time of `import pia_ray` and of `pia-ray --help`, beside that of a bare Python.

Prints a card and, last, one JSON line. Run: `.venv/bin/python benchmarks/startup.py [RUNS]`
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

AIM_S = 0.5
COMMANDS = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "import pia_ray": [sys.executable, "-c", "import pia_ray"],
    "import pia_ray.config.catalog": [sys.executable, "-c", "import pia_ray.config.catalog"],
    "pia-ray --help": [str(Path(sys.executable).parent / "pia-ray"), "--help"],
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
    card = {
        "benchmark": "startup",
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


def commit() -> str:
    """The short commit of the checkout, with + if files differ from it; "unknown" outside of one."""
    command = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 9)
