"""The CPU seconds of a row in the driver, in Ray's own processes and in the actors, which sleep in place of an engine.

Counts from the time that a tenth of the rows has ended to the last one, so that starts are left out. The output is a
local folder. Prints a card and, last, one JSON line.
Run: `.venv/bin/python benchmarks/actors.py [--rows N] [--actors N] [--seconds S]`
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Final

import card

from pia_ray.catalog.cluster_run import run_catalog
from pia_ray.catalog.progress import Progress
from pia_ray.config.catalog import CatalogConfig
from pia_ray.config.model import ModelConfig, build
from pia_ray.testing import make_catalog, make_fake

STEPS: Final = 2
WARM: Final = 0.1
"""Share of the rows before the numbers are counted."""


def main() -> None:
    """Runs one catalogue and prints what its rows cost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2000, help="rows (2000)")
    parser.add_argument("--actors", type=int, default=8, help="actors, which reserve no CPU (8)")
    parser.add_argument("--seconds", type=float, default=0.1, help="seconds of a row in the engine (0.1)")
    parser.add_argument("--fails", action="store_true", help="rows that fail as they enter the engine")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report(measured(Path(folder), **vars(arguments)))


def measured(folder: Path, *, rows: int, actors: int, seconds: float, fails: bool) -> dict[str, Any]:
    """The numbers of one run."""
    manifest = make_catalog(folder, rows=rows, sizes=[(64, 64)], format="jsonl")
    if fails:
        lines = [json.loads(line) | {"prompt": "nan"} for line in manifest.read_text().splitlines()]
        manifest.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    model = ModelConfig.named("demo").model_copy(update={"long_edge": 64})
    values = {"manifest": str(manifest), "output": str(folder / "out"), "model": model, "batch_size": 1}
    defaults = {"num_inference_steps": STEPS, "num_frames": 4, "width": 64, "height": 64}
    pool = {"actors": actors, "cpus_per_actor": 0, "gpus_per_actor": 0, "max_attempts": 1}
    config = build(CatalogConfig, {**values, **pool, "defaults": defaults})
    meter = Meter(warm=int(WARM * rows))
    run_catalog(config, observe=meter, make_animator=partial(make_fake, seconds_per_step=seconds / STEPS))
    ideal = actors / seconds
    return {"rows": rows, "actors": actors, "row_s": seconds, "fails": fails, "ideal_per_s": ideal, **meter.numbers()}


class Meter:
    """An observer of a run, which reads the CPU seconds of this process and those that it has started."""

    def __init__(self, *, warm: int) -> None:
        self._warm = warm
        self._readings: list[tuple[int, float, dict[str, float]]] = []
        self._share: float | None = None
        self._memory: dict[str, int] = {}

    def __call__(self, progress: Progress) -> None:
        """Reads where the rows have begun to count, and at the last one."""
        ended = progress.num_pending - progress.num_left
        begins = not self._readings and ended >= self._warm
        if begins or (self._readings and progress.num_left == 0 and self._readings[-1][0] < ended):
            self._readings.append((ended, time.monotonic(), cpu_s()))
            self._share = progress.busy_share
        if begins:
            self._memory = actor_mib()

    def numbers(self) -> dict[str, Any]:
        """Rows a second, the busy share, and CPU milliseconds a row by kind of process."""
        (first, begun, before), (last, ended, after) = self._readings[0], self._readings[-1]
        rows = last - first
        spent = {kind: 1000 * (after[kind] - before.get(kind, 0.0)) / rows for kind in after}
        return {
            "rows_per_s": round(rows / (ended - begun), 1),
            "busy_share": self._share and round(self._share, 3),
            "actor_mib": self._memory,
            "cpu_ms_per_row": {kind: round(number, 2) for kind, number in sorted(spent.items())},
        }


def cpu_s() -> dict[str, float]:
    """CPU seconds until now of the driver, which is this process, the actors, and Ray's processes by their kind."""
    tick = os.sysconf("SC_CLK_TCK")
    spent = dict.fromkeys(("driver", "actors", "raylet", "gcs", "ray, other"), 0.0)
    parents, names = _processes()
    for pid, name in names.items():
        if (kind := _kind(pid, name, parents)) is not None:
            with suppress(OSError):
                stat = Path(f"/proc/{pid}/stat").read_text()
                spent[kind] += sum(map(int, stat[stat.rindex(")") + 2 :].split()[11:13])) / tick
    return spent


def actor_mib() -> dict[str, int]:
    """Memory of an actor, the median of all, and of it what actors of one machine do not share."""
    found: dict[str, list[int]] = {"Rss": [], "Private_Dirty": []}
    parents, names = _processes()
    for pid, name in names.items():
        if _kind(pid, name, parents) == "actors":
            with suppress(OSError):
                lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
                sizes = {line.partition(":")[0]: int(line.split()[1]) // 1024 for line in lines}
                for kind, each in found.items():
                    each.append(sizes[kind])
    return {kind: int(median(each)) for kind, each in found.items() if each}


def _processes() -> tuple[dict[int, int], dict[int, str]]:
    """The parent and the title of each process."""
    parents, names = {}, {}
    for process in Path("/proc").iterdir():
        with suppress(OSError, ValueError):
            pid, stat = int(process.name), (process / "stat").read_text()
            names[pid] = (process / "cmdline").read_text().replace("\0", " ")
            parents[pid] = int(stat[stat.rindex(")") + 2 :].split()[1])
    return parents, names


def _kind(pid: int, name: str, parents: dict[int, int]) -> str | None:
    """The kind of a process; None where it does not come from this one."""
    above = pid
    while above != os.getpid():
        if (above := parents.get(above, 0)) == 0:
            return None
    if pid == os.getpid():
        return "driver"
    if "AnimateRow" in name or "MapWorker" in name:
        return "actors"
    return next(
        (kind for word, kind in (("raylet/raylet", "raylet"), ("gcs_server", "gcs")) if word in name), "ray, other"
    )


def report(result: dict[str, Any]) -> None:
    """Prints the card and the JSON line."""
    share = result["rows_per_s"] / result["ideal_per_s"]
    if result["fails"]:
        print(f"actors: {result['rows']:,} rows that fail as they enter the engine, {result['actors']} actors")
        print(f"  rows/s {result['rows_per_s']}")
    else:
        print(f"actors: {result['rows']:,} rows of {result['row_s']:g} s, {result['actors']} sleeping actors")
        print(f"  rows/s {result['rows_per_s']}, {share:.1%} of ideal; busy share {result['busy_share']}")
    spent = result["cpu_ms_per_row"]
    print("  CPU ms a row: " + ", ".join(f"{kind} {number:.2f}" for kind, number in spent.items()))
    print("  MiB of an actor: " + ", ".join(f"{kind} {number}" for kind, number in result["actor_mib"].items()))
    facts = card.machine("ray", "pyarrow")
    print(f"  {card.line(facts)}")
    print(json.dumps({"benchmark": "actors", **result, **facts}))


if __name__ == "__main__":
    main()
