"""Planning a large manifest of which half is done already: seconds and peak memory.

Prints a card and, last, one JSON line. Run: `.venv/bin/python benchmarks/planning.py [--rows N]`
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pia_ray import ledger, manifest
from pia_ray.config.catalog import CatalogConfig
from pia_ray.config.model import build
from pia_ray.ledger.parts import MERGED_ROWS, write_part
from pia_ray.ledger.results import RESULTS_SCHEMA

AIM_S = 10.0
AIM_MIB = 2048.0
MODEL_VERSION = "benchmark"


def main() -> None:
    """Prepares the manifest and the ledger in a process of its own, so that its memory is not counted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000, help="rows of the manifest (1,000,000)")
    parser.add_argument("--prepare", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.prepare:
        prepare(arguments.prepare, arguments.rows)
        return
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--rows", str(arguments.rows), "--prepare", folder]
        subprocess.run(command, check=True)
        print(json.dumps(measure(Path(folder), arguments.rows)))


def prepare(folder: Path, num_rows: int) -> None:
    """Writes a Parquet manifest, and a ledger in which the first half of its rows have succeeded."""
    with pq.ParquetWriter(folder / "manifest.parquet", _rows(0, 0).schema) as writer:
        for start in range(0, num_rows, 50_000):
            writer.write_table(_rows(start, min(num_rows, start + 50_000)))
    config = config_of(folder)
    left = num_rows // 2
    for items in manifest.plan(_open(config), config, model_version=MODEL_VERSION):
        for start in range(0, min(left, items.num_rows), MERGED_ROWS):
            write_part(config.output, _succeeded(items.slice(start, min(MERGED_ROWS, left - start))))
        left -= min(left, items.num_rows)
        if not left:
            return


def measure(folder: Path, num_rows: int) -> dict[str, object]:
    """Plans as a run does, prints the card, and gives its numbers."""
    config = config_of(folder)
    started = time.perf_counter()
    opened = _open(config)
    run = ledger.new_run(manifest=config.manifest, model=MODEL_VERSION)
    with ledger.Ledger.open(config.output) as opened_ledger:
        ledger_s = time.perf_counter() - started
        planned = opened_ledger.plan(manifest.plan(opened, config, model_version=MODEL_VERSION), run=run)
        total_s = time.perf_counter() - started
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    started = time.perf_counter()
    for _ in manifest.plan(opened, config, model_version=MODEL_VERSION):
        pass
    manifest_s = time.perf_counter() - started
    print(f"planning {num_rows:,} rows, {planned.num_succeeded_before:,} of them done; aim below {AIM_S:g} s, 2 GiB")
    print(f"  total                  {total_s:8.2f} s   {num_rows / total_s:,.0f} rows/s")
    print(f"  of it opening both     {ledger_s:8.2f} s")
    print(f"  the manifest alone     {manifest_s:8.2f} s   {num_rows / manifest_s:,.0f} rows/s, planned once more")
    print(f"  peak memory            {peak_mib:8.0f} MiB")
    print(f"  left to do             {planned.num_pending:8,}")
    print(
        f"  Python {platform.python_version()}, pyarrow {pa.__version__}, {os.cpu_count()} CPUs, {platform.machine()}"
    )
    return {
        "benchmark": "planning",
        "rows": num_rows,
        "done_before": planned.num_succeeded_before,
        "pending": planned.num_pending,
        "total_s": round(total_s, 3),
        "open_s": round(ledger_s, 3),
        "manifest_s": round(manifest_s, 3),
        "rows_per_s": round(num_rows / total_s),
        "peak_mib": round(peak_mib, 1),
        "within_aim": total_s < AIM_S and peak_mib < AIM_MIB,
        "python": platform.python_version(),
        "pyarrow": pa.__version__,
        "cpus": os.cpu_count(),
        "machine": platform.machine(),
        "commit": commit(),
    }


def config_of(folder: Path) -> CatalogConfig:
    """The run that is planned."""
    values = {"manifest": str(folder / "manifest.parquet"), "output": str(folder / "out"), "model": "realistic-vision"}
    return build(CatalogConfig, values)


def commit() -> str:
    """The short commit of the checkout, with + if files differ from it; "unknown" outside of one."""
    command = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def _open(config: CatalogConfig) -> manifest.Manifest:
    return manifest.open_manifest(config)


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


def _succeeded(items: pa.Table) -> pa.Table:
    known = {"status": "succeeded", "attempts": 1, "model": MODEL_VERSION, "run_id": "before", "worker": "benchmark"}
    known["finished_at"] = datetime.now(UTC)
    columns = []
    for field in RESULTS_SCHEMA:
        name = "image" if field.name == "image_uri" else field.name
        if name in items.column_names:
            columns.append(items[name].cast(field.type))
        else:
            columns.append(pa.array([known.get(name)] * items.num_rows, field.type))
    return pa.table(columns, schema=RESULTS_SCHEMA)


if __name__ == "__main__":
    main()
