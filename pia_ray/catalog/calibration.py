"""Seconds and bytes per unit of work, measured on an earlier run's results or on this machine."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

import numpy as np

from pia_ray import ledger, storage
from pia_ray.animation import RowAnimator
from pia_ray.catalog.worker import CatalogWorker
from pia_ray.catalog.workload import evaluated_frames, params_of
from pia_ray.config.catalog import CatalogConfig
from pia_ray.errors import ConfigError, OutputError
from pia_ray.formatting import count_of
from pia_ray.result_row import SUCCEEDED, ResultRow
from pia_ray.temporary_folders import temporary_folder
from pia_ray.types import ManifestRow

STEADY: Final = 1.5
"""Least ratio of the largest to the smallest calibrated row at which a fixed part per row shows."""


@dataclass(frozen=True)
class LinearFit:
    """A quantity per row, fitted as fixed + per_unit x units."""

    per_unit: float
    fixed: float
    spread: float
    """Median distance of the calibrated rows from the line, as a share of their mean."""

    def total(self, num_rows: int, units: float) -> float:
        """For that many rows with that many units in all."""
        return self.fixed * num_rows + self.per_unit * units


@dataclass(frozen=True)
class Calibration:
    """Speeds of one model on one kind of hardware, from rows that were animated there."""

    source: str
    num_rows: int
    workers: tuple[str, ...]
    """Hosts that animated them. Whether they are like those of the run to come only a person knows."""
    gpu_s: LinearFit
    """Engine seconds by units of work."""
    beside_s: float
    """Mean seconds of fetching and publishing per row, which run while the engine works."""
    video_bytes: LinearFit | None
    """By pixels x frames; None where the calibrated videos are of another format."""
    thumbnail_bytes: float
    takes: float = 1.0
    """Engine time of all takes of a row, retakes included, over that of one; 1 without bounds."""


def calibrate_from_output(output: str, config: CatalogConfig) -> Calibration:
    """Speeds from the results of an earlier run of the same models; those of all styles count as one.

    Raises:
        OutputError: there are no results, or none that succeeded.
        ConfigError: they are of other models.
    """
    rows = [row for row in ledger.from_table(ledger.read_results(output)) if row.status == SUCCEEDED]
    if not rows:
        raise OutputError(f"no row has succeeded in {output}: it says nothing of speed")
    names = {model.name for model in (config.model, *config.styles.values())}
    own = [row for row in rows if row.model.partition("@")[0] in names]
    if not own:
        wanted = " or ".join(sorted(names))
        raise ConfigError(f"{output} was animated by {rows[0].model}, not by {wanted}: its speeds say nothing here")
    return _calibrate(own, config, source=output)


def calibrate_here(
    sample: Sequence[ManifestRow],
    config: CatalogConfig,
    *,
    animator: RowAnimator | None = None,
    calls: int | None = None,
) -> Calibration:
    """Speeds from animating these rows here and now, `calls` at a time; what is made is thrown away.

    Raises:
        ConfigError: none of them succeeded.
        JobError: the model cannot be loaded.
    """
    if animator is None:
        from pia_ray.pia.animator import Animator

        with Animator(
            config.model, styles=config.styles, keep_models=config.keep_models, batch_size=config.batch_size
        ) as own:
            return calibrate_here(sample, config, animator=own, calls=own.batch_size + config.prefetch_range[0])
    with temporary_folder() as folder:
        # The first forward of a process is slow, so the first row goes twice, and once without counting.
        warm = config.model_copy(update={"output": str(folder / "warm")})
        CatalogWorker(warm, run_id="estimate", animator=animator).work(sample[0])
        measured = config.model_copy(update={"output": str(folder / "measured")})
        worker = CatalogWorker(measured, run_id="estimate", animator=animator)
        with ThreadPoolExecutor(calls or config.concurrent_rows(), thread_name_prefix="row") as pool:
            results = [row for row in pool.map(worker.work, sample) if row is not None]
        done = [row for row in results if row.status == SUCCEEDED]
        if not done:
            raise ConfigError(
                f"of {count_of(len(results), 'sampled row')} none could be animated: {results[0].error_message}"
            )
        return _calibrate(done, config, source=f"{count_of(len(done), 'row')} animated on this machine")


def _calibrate(rows: Sequence[ResultRow], config: CatalogConfig, *, source: str) -> Calibration:
    units, pixel_frames, gpu_s, beside_s, sizes = [], [], [], [], []
    suffix = f".{config.format}"
    for row in rows:
        params = params_of(row.params)
        if row.gpu_s is None or params.width is None or params.height is None:
            continue
        area_frames = params.width * params.height * params.num_frames
        units.append(float(params.width * params.height * evaluated_frames(params)))
        gpu_s.append(row.gpu_s)
        beside_s.append((row.fetch_s or 0.0) + (row.publish_s or 0.0))
        if row.size_bytes is not None and (row.video_uri or "").endswith(suffix):
            pixel_frames.append(float(area_frames))
            sizes.append(float(row.size_bytes))
    if not units:
        raise OutputError(f"{source} holds no times of the engine: it says nothing of speed")
    return Calibration(
        source=source,
        num_rows=len(units),
        workers=tuple(sorted({row.worker.rpartition(":")[0] for row in rows})),
        gpu_s=_fit(units, gpu_s),
        beside_s=statistics.fmean(beside_s),
        video_bytes=_fit(pixel_frames, sizes) if sizes else None,
        thumbnail_bytes=_thumbnail_bytes(rows),
        takes=_takes(rows),
    )


def _takes(rows: Sequence[ResultRow]) -> float:
    one = sum(row.gpu_s or 0.0 for row in rows)
    more = ledger.count_takes((row.accepted, row.takes) for row in rows).retake_gpu_s
    return 1 + more / one if one else 1.0


def _fit(units: Sequence[float], values: Sequence[float]) -> LinearFit:
    """Least squares; through the origin, by the means, where the rows are too alike or a part came out negative."""
    x, y = np.array(units), np.array(values)
    slope, fixed = float(y.sum() / x.sum()), 0.0
    if len(x) > 2 and x.max() >= STEADY * x.min():
        fitted, constant = (float(value) for value in np.polyfit(x, y, 1))
        if fitted > 0 and constant > 0:
            slope, fixed = fitted, constant
    mean = float(y.mean())
    spread = float(np.median(np.abs(y - slope * x - fixed))) / mean if mean else 0.0
    return LinearFit(per_unit=slope, fixed=fixed, spread=spread)


def _thumbnail_bytes(rows: Sequence[ResultRow]) -> float:
    """Mean bytes of both thumbnails of a row, by asking the store for some; 0 where they are gone."""
    sizes = []
    for row in rows[:: max(1, len(rows) // 16)][:16]:
        found = [storage.head(uri) for uri in (row.thumbnail_uri, row.input_thumbnail_uri) if uri]
        sizes.append(sum(stat.size_bytes for stat in found if stat is not None))
    return statistics.fmean(sizes) if sizes else 0.0
