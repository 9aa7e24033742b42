"""The estimate of a run: rows and work, and, from speeds that were measured, time, cost and storage.

Work is counted in evaluations x frames x pixels, from the plan alone. Without a measurement no time is claimed.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from pia_ray.animation import RowAnimator
from pia_ray.catalog.calibration import Calibration, calibrate_from_output, calibrate_here
from pia_ray.catalog.workload import Workload, plan_workload
from pia_ray.config.catalog import CatalogConfig
from pia_ray.formatting import count_of, duration, size


@dataclass(frozen=True)
class Estimate:
    """A workload, and what it takes where speeds are known."""

    workload: Workload
    calibration: Calibration | None
    num_actors: int
    gpu_s: float | None
    wall_s: float | None
    """Without the start of workers and the loading of the model."""
    cost: float | None
    storage_bytes: float | None
    takes: float = 1.0
    """Engine time of all takes of a row over that of one: as measured where the run has retakes, else 1."""


def estimate(
    config: CatalogConfig,
    *,
    calibrate: str | None = None,
    measure: int = 0,
    price_per_hour: float | None = None,
    resume: bool = False,
    animator: RowAnimator | None = None,
) -> Estimate:
    """The estimate of this run.

    Speeds come from the results in the output `calibrate`, or from `measure` rows animated here and now; without
    either, times are None.

    `resume` leaves out what `config.output` has done already. `price_per_hour` is that of one worker with its GPU.
    `animator` stands in for the configured model, for tests.

    Raises:
        JobError: the manifest, the model or the calibration cannot be used.
    """
    workload = plan_workload(config, resume=resume)
    calibration = None
    if calibrate is not None:
        calibration = calibrate_from_output(calibrate, config)
    elif measure and workload.sample:
        calibration = calibrate_here(workload.sample[:measure], config, animator=animator)
    actors = (config.actors or (1, 1))[1]
    if calibration is None:
        return Estimate(workload, None, actors, None, None, None, None)
    rows = workload.num_pending
    gpu_s = calibration.gpu_s.total(rows, workload.work) * _takes(config, calibration)
    # Rows are fetched and published by as many threads as a worker has rows that do not denoise.
    beside_s = calibration.beside_s * rows / max(1, config.prefetch_range[0])
    wall_s = max(gpu_s, beside_s) / actors
    video_bytes = calibration.video_bytes
    return Estimate(
        workload,
        calibration,
        actors,
        gpu_s=gpu_s,
        wall_s=wall_s,
        cost=None if price_per_hour is None else price_per_hour * actors * wall_s / 3600,
        storage_bytes=None
        if video_bytes is None
        else video_bytes.total(rows, workload.pixel_frames) + calibration.thumbnail_bytes * rows,
        takes=_takes(config, calibration),
    )


def _takes(config: CatalogConfig, calibration: Calibration) -> float:
    return calibration.takes if config.accept and config.retakes else 1.0


def facts_of(estimated: Estimate) -> dict[str, Any]:
    """The estimate as plain JSON values."""
    facts = dataclasses.asdict(estimated)
    del facts["workload"]["sample"]
    gpu_s = estimated.gpu_s
    return {**facts.pop("workload"), **facts, "gpu_hours": None if gpu_s is None else gpu_s / 3600}


def text_of(estimated: Estimate) -> str:
    """The estimate for people, in lines."""
    load, speeds = estimated.workload, estimated.calibration
    styles = ", ".join(f"{count:,} {style}" for style, count in load.styles.items())
    lines = [
        *filter(None, [load.columns.text]),
        f"rows       {load.num_rows:,} in the manifest, {count_of(load.num_items, 'video')}; {load.num_bad:,} bad, "
        f"{load.num_before:,} ended before, {load.num_pending:,} to make",
        f"videos     {duration(load.video_s)} of playing time; sizes {load.sizes}"
        if load.num_pending
        else "videos     none to make",
        *([f"styles     {styles}"] if len(load.styles) > 1 else []),
        f"work       {count_of(load.evaluations, 'UNet evaluation')}, {load.work / 1e9:,.3f} G "
        f"evaluation-frame-pixels: {load.cost_factor:,.2f} times that of one evaluation per step",
    ]
    if speeds is None:
        lines.append(
            "time       not known without a measurement: --measure 8 animates 8 of the rows on this machine, "
            "--calibrate OUTPUT takes an earlier run of this model on such hardware"
        )
        return "\n".join(lines)
    assert estimated.gpu_s is not None
    assert estimated.wall_s is not None
    actors = count_of(estimated.num_actors, "actor")
    stored, cost = estimated.storage_bytes, estimated.cost
    if estimated.takes > 1:
        lines.append(f"retakes    make a row {estimated.takes:,.2f} times as long as one take, as in the measured run")
    lines += [
        f"GPU time   {estimated.gpu_s:,.0f} s = {estimated.gpu_s / 3600:,.2f} GPU-hours (on a CPU: of its engine)",
        f"wall time  {duration(estimated.wall_s)} with {actors} as fast as the measured, once up",
        "cost       " + (f"{cost:,.2f}" if cost is not None else "give --price-per-hour"),
        "storage    " + (size(stored) if stored is not None else "not known: the calibration has another format"),
        f"measured   on {count_of(speeds.num_rows, 'row')}: {speeds.source} ({', '.join(speeds.workers)}); "
        f"half of them are within {speeds.gpu_s.spread:.0%} of what this says",
    ]
    return "\n".join(lines)
