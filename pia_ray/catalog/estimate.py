"""What a run will take before it runs: rows, work, and, from speeds that were measured, time, cost and storage.

Work is counted in evaluations x frames x pixels, from the plan alone. Without a measurement no time is claimed.
"""

from __future__ import annotations

import dataclasses
import json
import math
import random
import statistics
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa

from pia_ray import ledger, manifest, steps, storage
from pia_ray.catalog.run import settled, versions_of
from pia_ray.catalog.worker import CatalogWorker, RowAnimator
from pia_ray.config.catalog import CatalogConfig
from pia_ray.config.knobs import AnimationParams
from pia_ray.errors import ConfigError, OutputError, RowError
from pia_ray.ledger.book import sort_items
from pia_ray.ledger.parts import Index
from pia_ray.media.sizes import choose_size
from pia_ray.pia.denoising.context_windows import segments, windows
from pia_ray.types import ManifestRow, ResultRow

SAMPLED_PICTURES: Final = 64
"""Pictures that are opened for their size, where rows leave the size to the picture."""

STEADY: Final = 1.5
"""Least ratio of the largest to the smallest calibrated row at which a fixed part per row can be told from the rest."""

FETCHES: Final = 8


@dataclass(frozen=True)
class Line:
    """A quantity per row as fixed + per_unit x units."""

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
    gpu_s: Line
    """Engine seconds by units of work."""
    beside_s: float
    """Mean seconds of fetching and publishing per row, which run beside the engine."""
    video_bytes: Line | None
    """By pixels x frames; None where the calibrated videos are of another format."""
    thumbnail_bytes: float


@dataclass(frozen=True)
class Workload:
    """What a run has before it, from its plan."""

    num_rows: int
    """Rows of the manifest; num_videos makes several work items of one."""
    num_items: int
    num_bad: int
    """Work items that fail without reaching a worker."""
    num_before: int
    """Work items that an earlier run on this output has done, or failed and will not try again."""
    num_pending: int
    styles: Mapping[str, int]
    """Pending items by style."""
    video_s: float
    """Playing time of the videos to make."""
    evaluations: int
    cost_factor: float
    """Work over that of one evaluation per step: what guidance, second-order schedulers, FreeInit and windows cost."""
    pixel_frames: float
    """Pixels of all frames of the videos to make."""
    work: float
    """Evaluations x frames x pixels."""
    sizes: str
    """How sizes were found that the rows leave open."""
    sample: tuple[ManifestRow, ...]
    """Some of the pending items, drawn at random."""


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


def evaluations(params: AnimationParams) -> int:
    """UNet evaluations of one video: those of the steps that are run, each side of guidance and each window counted."""
    return _count(params)[0]


def evaluated_frames(params: AnimationParams) -> int:
    """Frames of all evaluations of one video: a window counts its own."""
    return _count(params)[1]


def plain_frames(params: AnimationParams) -> int:
    """What `evaluated_frames` would be with one evaluation per step of all frames once."""
    return params.num_frames * _kept(params.num_inference_steps, params.strength)


def estimate(
    config: CatalogConfig,
    *,
    calibrate: str | None = None,
    measure: int = 0,
    price_per_hour: float | None = None,
    resume: bool = False,
    animator: RowAnimator | None = None,
) -> Estimate:
    """What this run takes. Speeds come from the results in the output `calibrate`, or from `measure` rows animated here
    and now; without either, times are None.

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
    gpu_s = calibration.gpu_s.total(rows, workload.work)
    # Rows are fetched and published by as many threads as a worker has rows beside those that denoise.
    beside_s = calibration.beside_s * rows / max(1, config.prefetch)
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
    )


def plan_workload(config: CatalogConfig, *, resume: bool) -> Workload:
    """Counts the work items of the manifest and their work; opens some pictures where the rows leave sizes open."""
    version, index = config.model.name, Index()
    style_versions = {style: model.name for style, model in config.styles.items()}
    if resume:
        # Keys name the weights: only with their true version is it known what is done.
        version, style_versions = versions_of(settled(config))
        index = ledger.Ledger.open(config.output).index
    opened = manifest.open_manifest(
        config.manifest,
        id_col=config.id_col,
        image_col=config.image_col,
        prompt_col=config.prompt_col,
        has_default_prompt="prompt" in config.defaults,
    )
    rows = items = bad = before = pending = total_evaluations = 0
    video_s = sized_work = sized_pixel_frames = 0.0
    open_evaluation_frames = open_frames = frames_in_all = plain_frames_in_all = 0
    sample, open_sample = _Reservoir(), _Reservoir()
    styles: Counter[str] = Counter()
    for table in manifest.plan(opened, config, model_version=version, style_versions=style_versions):
        found = sort_items(index, table, retry=config.retry)
        items += len(table)
        rows += int((table["video_index"].to_numpy() == 0).sum())
        bad += int(found.rejected.sum())
        pending += int(found.pending.sum())
        before += int((~found.rejected & ~found.pending).sum())
        for batch in table.select(manifest.ITEMS_SCHEMA.names).filter(pa.array(found.pending)).to_batches():
            for item in batch.to_pylist():
                params = _params(item["params"])
                count, frames = _count(params)
                total_evaluations += count
                frames_in_all += frames
                plain_frames_in_all += plain_frames(params)
                video_s += params.video_frames / params.fps
                styles[item["style"]] += 1
                sample.add(item)
                if params.width is not None and params.height is not None:
                    sized_pixel_frames += float(params.width * params.height * params.num_frames)
                    sized_work += float(params.width * params.height * frames)
                else:
                    open_frames += params.num_frames
                    open_evaluation_frames += frames
                    open_sample.add(item)
    area, sizes = _mean_area(open_sample.rows(), config) if open_frames else (0.0, "every row states its size")
    return Workload(
        num_rows=rows,
        num_items=items,
        num_bad=bad,
        num_before=before,
        num_pending=pending,
        styles=dict(styles.most_common()),
        video_s=video_s,
        evaluations=total_evaluations,
        cost_factor=frames_in_all / plain_frames_in_all if plain_frames_in_all else 1.0,
        pixel_frames=sized_pixel_frames + area * open_frames,
        work=sized_work + area * open_evaluation_frames,
        sizes=sizes,
        sample=tuple(sample.rows()),
    )


def calibrate_from_output(output: str, config: CatalogConfig) -> Calibration:
    """Speeds from the results of an earlier run of the same models; those of all styles count as one.

    Raises:
        OutputError: there are no results, or none that succeeded.
        ConfigError: they are of other models.
    """
    rows = [row for row in ledger.from_table(ledger.read_results(output)) if row.status == "succeeded"]
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
            return calibrate_here(sample, config, animator=own, calls=own.batch_size + config.prefetch)
    with tempfile.TemporaryDirectory(prefix="pia-ray-") as folder:
        # The first forward of a process is slow, so the first row goes twice, and once without counting.
        warm = config.model_copy(update={"output": str(Path(folder) / "warm")})
        CatalogWorker(warm, run_id="estimate", animator=animator).work(sample[0])
        measured = config.model_copy(update={"output": str(Path(folder) / "measured")})
        worker = CatalogWorker(measured, run_id="estimate", animator=animator)
        with ThreadPoolExecutor(calls or config.rows_at_once(), thread_name_prefix="row") as pool:
            results = list(pool.map(worker.work, sample))
        done = [row for row in results if row.status == "succeeded"]
        if not done:
            raise ConfigError(f"none of {len(results)} sampled rows could be animated: {results[0].error_message}")
        return _calibrate(done, config, source=f"{len(done)} rows animated on this machine")


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
        f"rows       {load.num_rows:,} in the manifest, {load.num_items:,} videos; {load.num_bad:,} bad, "
        f"{load.num_before:,} ended before, {load.num_pending:,} to make",
        f"videos     {_duration(load.video_s)} of playing time; sizes {load.sizes}"
        if load.num_pending
        else "videos     none to make",
        *([f"styles     {styles}"] if len(load.styles) > 1 else []),
        f"work       {load.evaluations:,} UNet evaluations, {load.work / 1e9:,.3f} G evaluation-frame-pixels: "
        f"{load.cost_factor:,.2f} times that of one evaluation per step",
    ]
    if speeds is None:
        lines.append(
            "time       not known without a measurement: --measure 8 animates 8 of the rows on this machine, "
            "--calibrate OUTPUT takes an earlier run of this model on such hardware"
        )
        return "\n".join(lines)
    assert estimated.gpu_s is not None
    assert estimated.wall_s is not None
    actors = f"{estimated.num_actors} actor{'s' if estimated.num_actors > 1 else ''}"
    stored, cost = estimated.storage_bytes, estimated.cost
    lines += [
        f"GPU time   {estimated.gpu_s:,.0f} s = {estimated.gpu_s / 3600:,.2f} GPU-hours (on a CPU: of its engine)",
        f"wall time  {_duration(estimated.wall_s)} with {actors} as fast as the measured, once up",
        "cost       " + (f"{cost:,.2f}" if cost is not None else "give --price-per-hour"),
        "storage    " + (_bytes(stored) if stored is not None else "not known: the calibration has another format"),
        f"measured   on {speeds.num_rows:,} rows: {speeds.source} ({', '.join(speeds.workers)}); "
        f"half of them are within {speeds.gpu_s.spread:.0%} of what this says",
    ]
    return "\n".join(lines)


def _count(params: AnimationParams) -> tuple[int, int]:
    """Evaluations of a video, and frames of them all."""
    keys = {name: getattr(params, name) for name in _COSTLY}
    return _count_once(tuple(keys.values()))


_COSTLY: Final = (
    *("num_frames", "num_inference_steps", "guidance_scale", "image_guidance_scale", "strength", "scheduler"),
    *("long_video", "context_frames", "context_overlap", "context_schedule", "context_stride"),
    *("free_init", "free_init_iters", "free_init_fast_sampling"),
)
"""Knobs that change how much is evaluated: rows that agree in them are counted once."""


@lru_cache(maxsize=1024)
def _count_once(values: tuple[Any, ...]) -> tuple[int, int]:
    params = AnimationParams.model_construct(prompt="-", **dict(zip(_COSTLY, values, strict=True)))
    sides = params.num_branches
    count = frames = 0
    for length in segments(params):
        part = params.model_copy(update={"num_frames": length})
        for step in chain.from_iterable(_steps(params, num) for num in params.iterations):
            views = windows(part, step)
            count += sides * len(views)
            frames += sides * len(views) * len(views[0])
    return count, frames


def _steps(params: AnimationParams, steps: int) -> Iterator[int]:
    """The step of each evaluation as the engine counts them."""
    count = _kept(steps, params.strength)
    if params.scheduler.startswith(("heun", "kdpm2")):
        # Every step but the last has a second evaluation.
        yield from (index // 2 for index in range(2 * count - 1))
    elif params.scheduler == "pndm" and steps > 1:
        yield from range(count + 1)  # its start-up takes one step twice
    else:
        yield from range(count)


def _kept(steps: int, strength: float) -> int:
    return max(1, min(int(steps * strength), steps))


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:,.1f} h"


def _bytes(num: float) -> str:
    power = min(4, max(0, int(math.log10(max(1.0, num)) // 3)))
    return f"{num / 1000**power:,.1f} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


def _calibrate(rows: Sequence[ResultRow], config: CatalogConfig, *, source: str) -> Calibration:
    units, pixel_frames, gpu_s, beside_s, sizes = [], [], [], [], []
    suffix = f".{config.format}"
    for row in rows:
        params = _params(row.params)
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
        gpu_s=_line(units, gpu_s),
        beside_s=statistics.fmean(beside_s),
        video_bytes=_line(pixel_frames, sizes) if sizes else None,
        thumbnail_bytes=_thumbnail_bytes(rows),
    )


def _line(units: Sequence[float], values: Sequence[float]) -> Line:
    """Least squares; through the origin, by the means, where the rows are too alike or a part came out negative."""
    x, y = np.array(units), np.array(values)
    slope, fixed = float(y.sum() / x.sum()), 0.0
    if len(x) > 2 and x.max() >= STEADY * x.min():
        fitted, constant = (float(value) for value in np.polyfit(x, y, 1))
        if fitted > 0 and constant > 0:
            slope, fixed = fitted, constant
    mean = float(y.mean())
    spread = float(np.median(np.abs(y - slope * x - fixed))) / mean if mean else 0.0
    return Line(per_unit=slope, fixed=fixed, spread=spread)


def _thumbnail_bytes(rows: Sequence[ResultRow]) -> float:
    """Mean bytes of both thumbnails of a row, by asking the store for some; 0 where they are gone."""
    sizes = []
    for row in rows[:: max(1, len(rows) // 16)][:16]:
        found = [storage.head(uri) for uri in (row.thumbnail_uri, row.input_thumbnail_uri) if uri]
        sizes.append(sum(stat.size_bytes for stat in found if stat is not None))
    return statistics.fmean(sizes) if sizes else 0.0


def _mean_area(rows: Sequence[ManifestRow], config: CatalogConfig) -> tuple[float, str]:
    """Mean pixels of a frame of rows that leave the size to their picture, and how it was found."""
    with ThreadPoolExecutor(FETCHES, thread_name_prefix="fetch") as pool:
        areas = [area for area in pool.map(lambda row: _area(row, config), rows) if area]
    if not areas:
        square = config.model.long_edge
        return float(
            square * square
        ), f"assumed {square} x {square} px, as none of {len(rows)} pictures could be opened"
    return statistics.fmean(areas), f"from {len(areas)} pictures, opened, of {len(rows)} drawn at random"


def _area(row: ManifestRow, config: CatalogConfig) -> int:
    """Pixels of one frame; 0 where the picture cannot be opened: others tell the sizes, this row will fail."""
    try:
        fetched = steps.fetch(row, config)
    except RowError:
        return 0
    model = config.model_for(row.params.style)
    width, height = choose_size(
        (fetched.original_width, fetched.original_height),
        long_edge=model.long_edge,
        size_step=model.size_step,
        width=row.params.width,
        height=row.params.height,
    )
    return width * height


def _params(canonical: str) -> AnimationParams:
    """Params as the plan or a result wrote them; unchecked, since a plan may have a million."""
    return AnimationParams.model_construct(**json.loads(canonical))


class _Reservoir:
    """A fair sample of a stream of items, the same for the same stream."""

    def __init__(self) -> None:
        self._random = random.Random(0)  # noqa: S311 - a sample, not a secret
        self._kept: list[Mapping[str, Any]] = []
        self._seen = 0

    def add(self, item: Mapping[str, Any]) -> None:
        """Offers one item."""
        self._seen += 1
        if len(self._kept) < SAMPLED_PICTURES:
            self._kept.append(item)
        elif (place := self._random.randrange(self._seen)) < SAMPLED_PICTURES:
            self._kept[place] = item

    def rows(self) -> list[ManifestRow]:
        """What was kept."""
        return [manifest.row_from_item(item) for item in self._kept]
