"""A large manifest, half of it done already: CPU seconds and peak memory of each command that reads all of it.

Each command runs in a process of its own. Prints a card and, last, one JSON line.
Run: `.venv/bin/python benchmarks/planning.py [--rows N]`
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import card
import pyarrow as pa
import pyarrow.parquet as pq

from pia_ray import ledger, manifest
from pia_ray.catalog.estimate import estimate
from pia_ray.catalog.gallery import write_gallery
from pia_ray.catalog.validate import validate
from pia_ray.config.catalog import CatalogConfig
from pia_ray.config.model import build
from pia_ray.ledger.parts import MERGED_ROWS, write_part
from pia_ray.ledger.results import RESULTS_SCHEMA

AIM_S: Final = 20.0
"""CPU seconds of a command at 1,000,000 rows."""
AIM_MIB: Final = 1024.0
MODEL_VERSION: Final = "benchmark"


def main() -> None:
    """Prepares the manifest and the ledger, then measures each command, all in processes of their own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000, help="rows of the manifest (100,000)")
    parser.add_argument("--step", choices=("prepare", *STEPS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step == "prepare":
        prepare(arguments.folder, arguments.rows)
    elif arguments.step:
        print(json.dumps(measure(STEPS[arguments.step], arguments.folder)))
    else:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(measure_all(Path(folder), arguments.rows)))


def measure_all(folder: Path, num_rows: int) -> dict[str, object]:
    """Measures every command, prints the card, and gives its numbers."""
    command = [sys.executable, __file__, "--rows", str(num_rows), "--folder", str(folder), "--step"]
    subprocess.run([*command, "prepare"], check=True)
    aim_s = AIM_S * max(1.0, num_rows / 1_000_000)
    print(f"{num_rows:,} rows, half of them done; aim for each command below {aim_s:g} CPU s and {AIM_MIB:,.0f} MiB")
    print(f"  {'':<10}{'CPU s':>9}{'wall s':>9}{'us/row':>9}{'peak MiB':>10}")
    measured: dict[str, Mapping[str, float]] = {}
    for step in STEPS:
        ended = subprocess.run([*command, step], check=True, stdout=subprocess.PIPE, text=True)
        found = measured[step] = json.loads(ended.stdout.splitlines()[-1])
        us = 1e6 * found["cpu_s"] / num_rows
        print(
            f"  {step:<10}{found['cpu_s']:>9.1f}{found['wall_s']:>9.1f}{us:>9.1f}{found['peak_mib']:>10.0f}", flush=True
        )
    facts = card.machine("pyarrow")
    print(f"  {card.line(facts)}")
    within = all(found["cpu_s"] < aim_s and found["peak_mib"] < AIM_MIB for found in measured.values())
    return {"benchmark": "planning", "rows": num_rows, **measured, "within_aim": within, **facts}


def measure(step: Callable[[CatalogConfig], None], folder: Path) -> dict[str, float]:
    """Seconds and peak memory of one command in this process, without its imports."""
    config = config_of(folder)
    wall, cpu = time.perf_counter(), time.process_time()
    step(config)
    return {
        "cpu_s": round(time.process_time() - cpu, 2),
        "wall_s": round(time.perf_counter() - wall, 2),
        "peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
    }


def plan(config: CatalogConfig) -> None:
    """Plans as a run does: the manifest against the ledger, with the items written down."""
    run = ledger.new_run(manifest=", ".join(config.manifests), model=MODEL_VERSION)
    with ledger.Ledger.open(config.output) as opened:
        opened.plan(manifest.plan(manifest.open_manifest(config), config, model_version=MODEL_VERSION), run=run)


def write_results(config: CatalogConfig) -> None:
    """Writes results.parquet as a run does now and then."""
    with ledger.Ledger.open(config.output) as opened:
        opened.write_results()


def validate_all(config: CatalogConfig) -> None:
    """Checks every row without its picture."""
    for _ in validate(config, fetch=False):
        pass


def estimate_all(config: CatalogConfig) -> None:
    """Counts the work of a new run."""
    estimate(config)


def report(config: CatalogConfig) -> None:
    """Counts what has ended."""
    with ledger.Ledger.open(config.output) as opened:
        ledger.summary(opened)


def gallery(config: CatalogConfig) -> None:
    """Writes the page."""
    write_gallery(config.output)


STEPS: Final[Mapping[str, Callable[[CatalogConfig], None]]] = {
    "plan": plan,
    "validate": validate_all,
    "estimate": estimate_all,
    "results": write_results,
    "report": report,
    "gallery": gallery,
}


def prepare(folder: Path, num_rows: int) -> None:
    """Writes a Parquet manifest, and a ledger in which the first half of its rows have succeeded."""
    with pq.ParquetWriter(folder / "manifest.parquet", _rows(0, 0).schema) as writer:
        for start in range(0, num_rows, 50_000):
            writer.write_table(_rows(start, min(num_rows, start + 50_000)))
    config = config_of(folder)
    left = num_rows // 2
    for items in manifest.plan(manifest.open_manifest(config), config, model_version=MODEL_VERSION):
        for start in range(0, min(left, items.num_rows), MERGED_ROWS):
            write_part(config.output, _succeeded(items.slice(start, min(MERGED_ROWS, left - start)), config.output))
        left -= min(left, items.num_rows)
        if not left:
            return


def config_of(folder: Path) -> CatalogConfig:
    """The run that is planned. The rows state no size, and no picture is there to have one."""
    values = {"manifest": str(folder / "manifest.parquet"), "output": str(folder / "out"), "model": "realistic-vision"}
    return build(CatalogConfig, {**values, "defaults": {"width": 512, "height": 512}})


def _rows(start: int, stop: int) -> pa.Table:
    numbers = range(start, stop)
    return pa.table(
        {
            "id": pa.array([f"article-{n:07d}" for n in numbers], pa.string()),
            "image": pa.array([f"s3://catalogue/pictures/{n % 997:03d}/{n:07d}.jpg" for n in numbers], pa.string()),
            "prompt": pa.array(
                [f"product photo of article {n}, soft light, slow camera" for n in numbers], pa.string()
            ),
            "motion_scale": pa.array([n % 9 for n in numbers], pa.int8()),
            "seed": pa.array([n * 7919 for n in numbers], pa.uint64()),
            "sku": pa.array([f"SKU-{n * 31 % 1_000_003}" for n in numbers], pa.string()),
        }
    )


def _succeeded(items: pa.Table, output: str) -> pa.Table:
    known: dict[str, object] = {"status": "succeeded", "attempts": 1, "model": MODEL_VERSION, "run_id": "before"}
    known |= {"worker": "benchmark", "finished_at": datetime.now(UTC), "gpu_s": 4.2, "fetch_s": 0.2, "publish_s": 0.1}
    known |= {"width": 512, "height": 512, "num_frames": 16, "fps": 8, "duration_s": 2.0, "size_bytes": 300_000}
    files = {"video_uri": "videos/00/{}.mp4", "thumbnail_uri": "thumbnails/00/{}.webp"}
    columns = []
    for field in RESULTS_SCHEMA:
        name = "image" if field.name == "image_uri" else field.name
        if name in items.column_names:
            columns.append(items[name].cast(field.type))
        elif name in files:
            uris = [f"{output}/{files[name].format(key)}" for key in items["work_key"].to_pylist()]
            columns.append(pa.array(uris, field.type))
        else:
            columns.append(pa.array([known.get(name)] * items.num_rows, field.type))
    return pa.table(columns, schema=RESULTS_SCHEMA)


if __name__ == "__main__":
    main()
