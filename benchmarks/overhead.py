"""The costs of a catalogue beyond its animations: the bare animator, `run_local` and `run_catalog`, by turns.

All three animate the bundled pictures with the demo model on equal threads. Prints a card and, last, one JSON line.
Run: `.venv/bin/python benchmarks/overhead.py [--rows N] [--rounds N]`
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from pathlib import Path

import card
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch

from pia_ray import Animation, AnimationRequest, Animator, manifest, read_results
from pia_ray.catalog import steps
from pia_ray.catalog.cluster_run import run_catalog
from pia_ray.catalog.local import run_local
from pia_ray.catalog.run import Progress, RunSummary
from pia_ray.config.catalog import CatalogConfig
from pia_ray.config.model import build

AIM = 0.15
"""Most overhead of the graph over the bare animator, once warm."""


@dataclass(frozen=True)
class Turn:
    """Seconds of one way's turn."""

    total_s: float
    warm_s: float
    """From a warm model to the last result."""
    startup_s: float
    """Until the model is warm: planning, and in the graph the worker and its model."""


def main() -> None:
    """Takes the three ways by turns and compares their medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=14, help="rows; the bundled 14 are repeated (14)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds; the medians count (3)")
    arguments = parser.parse_args()
    threads = torch.get_num_threads()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = write_manifest(folder / "manifest.parquet", arguments.rows)
        started = time.monotonic()
        ray.init(
            address="local",
            num_cpus=2 * threads + 1,
            include_dashboard=False,
            object_store_memory=200 * 2**20,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
        ray_s = time.monotonic() - started
        started = time.monotonic()
        config = config_of(folder, "unused", threads)
        with Animator(config.model, batch_size=config.batch_size, cpu_threads=threads) as animator:
            load_s = time.monotonic() - started
            requests = requests_of(config)
            animator.animate(requests[:1])
            turns: dict[str, list[Turn]] = {"bare": [], "local": [], "graph": []}
            for turn in range(arguments.rounds):
                turns["bare"].append(bare(animator, requests))
                turns["local"].append(local(animator, config_of(folder, f"local-{turn}", threads)))
                turns["graph"].append(graph(folder / f"warm-{turn}", config_of(folder, f"graph-{turn}", threads)))
        beside = besides(folder / "graph-0")
        ray.shutdown()
    report(turns, rows=rows, rounds=arguments.rounds, threads=threads, ray_s=ray_s, load_s=load_s, beside=beside)


def report(
    turns: dict[str, list[Turn]],
    *,
    rows: int,
    rounds: int,
    threads: int,
    ray_s: float,
    load_s: float,
    beside: dict[str, float],
) -> None:
    """Prints the card and the JSON line."""
    warm = {way: statistics.median(turn.warm_s for turn in taken) for way, taken in turns.items()}
    total = {way: statistics.median(turn.total_s for turn in taken) for way, taken in turns.items()}
    overhead = {way: median_ratio(turns[way], turns["bare"]) - 1 for way in ("local", "graph")}
    startup_s = statistics.median(turn.startup_s for turn in turns["graph"])
    names = {"bare": "the animator alone", "local": "run_local", "graph": "run_catalog, one actor"}
    print(f"overhead: {rows} rows of the demo catalogue, {threads} torch threads, {rounds} rounds by turns")
    print("                              warm      total   s, medians    overhead when warm, median of the rounds")
    for way, name in names.items():
        more = f"{overhead[way]:+21.1%}" if way in overhead else ""
        print(f"  {name:24} {warm[way]:9.2f} {total[way]:10.2f}   {more}")
    print(f"  aim for run_catalog                                  {AIM:+21.1%}")
    print(
        f"  start-up: Ray {ray_s:.1f} s; of each run until its actor is warm {startup_s:.1f} s; "
        f"the model alone {load_s:.1f} s"
    )
    print(f"  per row, beside the engine: fetch {beside['fetch_s']:.3f} s, publish {beside['publish_s']:.3f} s")
    facts = card.machine("torch", "ray")
    print(f"  {card.line(facts)}")
    result = {
        "benchmark": "overhead",
        "rows": rows,
        "rounds": rounds,
        "threads": threads,
        "warm_s": {way: round(seconds, 3) for way, seconds in warm.items()},
        "total_s": {way: round(seconds, 3) for way, seconds in total.items()},
        "rounds_warm_s": {way: [round(turn.warm_s, 3) for turn in taken] for way, taken in turns.items()},
        "overhead": {way: round(share, 4) for way, share in overhead.items()},
        "startup_s": {"ray": round(ray_s, 2), "actor": round(startup_s, 2), "model": round(load_s, 2)},
        **{name: round(seconds, 4) for name, seconds in beside.items()},
        "within_aim": overhead["graph"] < AIM,
        **facts,
    }
    print(json.dumps(result))


def bare(animator: Animator, requests: list[AnimationRequest]) -> Turn:
    """The animations alone: pictures decoded before, nothing written after."""
    started = time.monotonic()
    outcomes = animator.animate(requests)
    seconds = time.monotonic() - started
    assert all(isinstance(outcome, Animation) for outcome in outcomes), outcomes
    return Turn(seconds, seconds, 0.0)


def local(animator: Animator, config: CatalogConfig) -> Turn:
    """`run_local` with the same warm animator."""
    return timed(config, partial(run_local, config, animator=animator), warm_at=lambda times: times["starting"])


def graph(marks: Path, config: CatalogConfig) -> Turn:
    """`run_catalog` on a Ray that is up; its actor notes when it has animated a first row, which is not counted."""
    marks.mkdir()
    return timed(
        config,
        partial(run_catalog, config, make_animator=partial(make_warm_animator, marks=marks)),
        warm_at=lambda times: min(float(path.read_text()) for path in marks.iterdir()),
    )


def make_warm_animator(config: CatalogConfig, cpu_threads: int, *, marks: Path) -> Animator:
    """The configured model as an actor holds it, warm."""
    animator = Animator(config.model, batch_size=config.batch_size, cpu_threads=cpu_threads)
    animator.animate(requests_of(config)[:1])
    # Processes of one machine share this clock.
    (marks / str(os.getpid())).write_text(str(time.monotonic()))
    return animator


def timed(
    config: CatalogConfig,
    run: Callable[..., RunSummary],
    *,
    warm_at: Callable[[dict[str, float]], float],
) -> Turn:
    """One run of a catalogue, timed from outside."""
    times: dict[str, float] = {}

    def observe(progress: Progress) -> None:
        if progress.phase == "animating":
            times["animating"] = time.monotonic()  # the latest counts
        else:
            times.setdefault(progress.phase, time.monotonic())

    started = time.monotonic()
    summary = run(observe=observe)
    total_s = time.monotonic() - started
    assert summary.exit_code == 0, config.output
    warm = warm_at(times)
    return Turn(total_s, warm_s=times["animating"] - warm, startup_s=warm - started)


def median_ratio(ways: list[Turn], others: list[Turn]) -> float:
    """Each round's ratio to the other way in the same round: a slow moment of the machine falls on both."""
    return statistics.median(way.warm_s / other.warm_s for way, other in zip(ways, others, strict=True))


def besides(output: Path) -> dict[str, float]:
    """Mean seconds per row that run beside the engine."""
    results = read_results(str(output))
    return {name: statistics.fmean(results[name].to_pylist()) for name in ("fetch_s", "publish_s", "gpu_s")}


def write_manifest(path: Path, num_rows: int) -> int:
    """The bundled catalogue, repeated or cut to that many rows."""
    bundled = Path(str(files("pia_ray").joinpath("demo", "catalog", "catalog.parquet")))
    table = pq.read_table(bundled)
    records = table.to_pylist()
    rows = [
        {**record, "id": f"{number:05d}-{record['id']}", "image": str(bundled.parent / record["image"])}
        for number, record in ((number, records[number % len(records)]) for number in range(num_rows))
    ]
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), path)
    return len(rows)


def config_of(folder: Path, output: str, threads: int) -> CatalogConfig:
    """The run; its one actor gets as many threads as the bare animator."""
    values = {
        "manifest": str(folder / "manifest.parquet"),
        "output": str(folder / output),
        "model": "demo",
        "actors": 1,
        "cpus_per_actor": threads,
    }
    return build(CatalogConfig, values)


def requests_of(config: CatalogConfig) -> list[AnimationRequest]:
    """The requests of the catalogue to the animator, their pictures decoded."""
    opened = manifest.open_manifest(config)
    items = [
        item
        for table in manifest.plan(opened, config, model_version="benchmark")
        for item in table.select(manifest.ITEMS_SCHEMA.names).to_pylist()
    ]
    planned = [manifest.row_from_item(item) for item in items]
    return [steps.request_of(row, steps.fetch(row, config), deadline_s=None) for row in planned]


if __name__ == "__main__":
    main()
