"""The work that a manifest asks for, counted without a GPU: rows, UNet evaluations, frames, bytes."""

from __future__ import annotations

import json
import random
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import Any, Final, NamedTuple

import pyarrow as pa

from pia_ray import ledger, manifest
from pia_ray.catalog import steps
from pia_ray.catalog.retaking import RetakePlan
from pia_ray.catalog.review.apply import NOTHING_DECIDED, decide
from pia_ray.catalog.review.verdict_file import read_review
from pia_ray.catalog.settling import settled, versions_of
from pia_ray.config.catalog import CatalogConfig
from pia_ray.config.knobs import AnimationParams
from pia_ray.config.timeline import timeline_of
from pia_ray.errors import RowError
from pia_ray.formatting import count_of
from pia_ray.ledger.index import Index
from pia_ray.ledger.planning import Sorted, sort_items
from pia_ray.ledger.videos import lost_videos
from pia_ray.media.sizes import choose_size
from pia_ray.pia.denoising.context_windows import segments, windows
from pia_ray.pia.denoising.full_steps import full_steps
from pia_ray.storage.web import Web
from pia_ray.types import ManifestRow

SAMPLED_PICTURES: Final = 64
"""Pictures that are opened for their size, where rows leave the size to the picture."""

FETCHES: Final = 8
_MEMO_SIZE: Final = 10_000


@dataclass(frozen=True)
class Workload:
    """The work of a run, counted from its plan."""

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
    """The source of the sizes that rows leave open, in words."""
    sample: tuple[ManifestRow, ...]
    """Some of the pending items, drawn at random."""
    columns: manifest.ColumnUse


def evaluations(params: AnimationParams) -> int:
    """UNet evaluations of one video: those of the steps that are run, each side of guidance and each window counted."""
    return _count(params)[0]


def evaluated_frames(params: AnimationParams) -> int:
    """Frames of all evaluations of one video: a window counts its own."""
    return _count(params)[1]


def plain_frames(params: AnimationParams) -> int:
    """Frames of all evaluations if each step evaluated every frame once."""
    return params.num_frames * _kept(params.num_inference_steps, params.strength)


def plan_workload(config: CatalogConfig, *, resume: bool) -> Workload:
    """The work of the manifest's items, counted; opens some pictures where the rows leave sizes open."""
    version, index = config.model.name, Index()
    style_versions = {style: model.name for style, model in config.styles.items()}
    decided = NOTHING_DECIDED
    if resume:
        output = ledger.Ledger.open(config.output)
        index = output.index
        decided = decide(read_review(config.review), output) if config.review else decided
    if index.part_uris:
        # Keys name the weights: only with their true version is it known what is done.
        version, style_versions = versions_of(settled(config))
    lost = lost_videos(config.output, index, config.remake if resume else ())
    stored = ledger.StoredTakes(index, RetakePlan(config))
    opened = manifest.open_manifest(config)
    sums = _Sums()
    for table in manifest.plan(opened, config, model_version=version, style_versions=style_versions):
        found = sort_items(index, table, retry=config.retry, lost=lost)
        again = found.pending | stored.of(table, lost=lost).again
        sums.add(table, found._replace(pending=decided.pending(table, again)))
    area, sizes = (
        _mean_area(sums.open_sample.rows(), config) if sums.open_frames else (0.0, "every row states its size")
    )
    return Workload(
        num_rows=sums.rows,
        num_items=sums.items,
        num_bad=sums.bad,
        num_before=sums.before,
        num_pending=sums.pending,
        styles=dict(sums.styles.most_common()),
        video_s=sums.video_s,
        evaluations=sums.evaluations,
        cost_factor=sums.frames / sums.plain_frames if sums.plain_frames else 1.0,
        pixel_frames=sums.sized_pixel_frames + area * sums.open_frames,
        work=sums.sized_work + area * sums.open_evaluation_frames,
        sizes=sizes,
        sample=tuple(sums.sample.rows()),
        columns=opened.use,
    )


def _count(params: AnimationParams) -> tuple[int, int]:
    """Evaluations of a video, and frames of them all."""
    keys = {name: getattr(params, name) for name in _COSTLY}
    return _count_once(tuple(keys.values()))


_COSTLY: Final = (
    *("num_frames", "num_inference_steps", "guidance_scale", "image_guidance_scale", "strength", "scheduler"),
    *("long_video", "context_frames", "context_overlap", "context_schedule", "context_stride"),
    *("free_init", "free_init_iters", "free_init_fast_sampling", "preset", "eta"),
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
    """The step of each evaluation as the engine counts them: of those that the row's preset has computed."""
    count = _kept(steps, params.strength)
    num_second = 0
    if params.scheduler.startswith(("heun", "kdpm2")):
        num_second = count - 1  # every step but the last has a second evaluation
    elif params.scheduler == "pndm" and steps > 1:
        count += 1  # its start-up takes one step twice
    for step in full_steps(params, steps=steps, count=count):
        yield from (step,) * (1 + (step < num_second))


def _kept(steps: int, strength: float) -> int:
    return max(1, min(int(steps * strength), steps))


def _mean_area(rows: Sequence[ManifestRow], config: CatalogConfig) -> tuple[float, str]:
    """Mean pixels of a frame of rows that leave the size to their picture, and how it was found."""
    with ThreadPoolExecutor(FETCHES, thread_name_prefix="fetch") as pool:
        web = steps.web_of(config)
        areas = [area for area in pool.map(lambda row: _area(row, config, web), rows) if area]
    if not areas:
        square = config.model.long_edge
        why = f"as of {count_of(len(rows), 'picture')} none could be opened"
        return float(square * square), f"assumed {square} x {square} px, {why}"
    return statistics.fmean(areas), f"from {count_of(len(areas), 'picture')}, opened, of {len(rows)} drawn at random"


def _area(row: ManifestRow, config: CatalogConfig, web: Web) -> int:
    """Pixels of one frame; 0 where the picture cannot be opened, because such a row will fail."""
    try:
        fetched = steps.fetch(row, config, web=web)
    except RowError:
        return 0
    model = config.model_for(row.params.style)
    width, height = choose_size(
        (fetched.original_width, fetched.original_height),
        long_edge=model.long_edge,
        size_step=model.size_step,
        width=row.params.width,
        height=row.params.height,
        aspect_ratio=row.params.aspect_ratio,
        fitting=row.params.fit,
    )
    return width * height


def params_of(canonical: str) -> AnimationParams:
    """Params as the plan or a result wrote them; unchecked, since a plan may have a million."""
    return AnimationParams.model_construct(**json.loads(canonical))


class _Load(NamedTuple):
    """The work of one item."""

    evaluations: int
    frames: int
    """Of all evaluations."""
    plain_frames: int
    num_frames: int
    video_s: float
    area: int
    """Pixels of a frame; 0 where it is left to the picture."""


class _Loads:
    """The work of items by their canonical params; of those that differ in prompts and seed alone it is found once."""

    def __init__(self) -> None:
        self._known: dict[str, _Load] = {}

    def of(self, canonical: str) -> _Load:
        """The work of one item."""
        shared = manifest.shared_params(canonical)
        if (found := self._known.get(shared)) is None:
            if len(self._known) >= _MEMO_SIZE:
                self._known.clear()
            params = params_of(canonical)
            area = params.width * params.height if params.width is not None and params.height is not None else 0
            seconds = timeline_of(params).duration_s
            found = _Load(*_count(params), plain_frames(params), params.num_frames, seconds, area)
            self._known[shared] = found
        return found


class _Sums:
    """Sums over the items of a plan, table by table; those of work are over the pending ones."""

    def __init__(self) -> None:
        self.rows = self.items = self.bad = self.before = self.pending = 0
        self.styles: Counter[str] = Counter()
        self.evaluations = self.frames = self.plain_frames = 0
        self.video_s = self.sized_pixel_frames = self.sized_work = 0.0
        self.open_frames = self.open_evaluation_frames = 0
        """Of items that leave their size to the picture."""
        self.sample, self.open_sample = _Reservoir(), _Reservoir()
        self._load_of = _Loads().of

    def add(self, table: pa.Table, found: Sorted) -> None:
        """Counts the items of a table of the plan."""
        self.items += len(table)
        self.rows += int((table["video_index"].to_numpy() == 0).sum())
        self.bad += int(found.rejected.sum())
        self.pending += int(found.pending.sum())
        self.before += int((~found.rejected & ~found.pending).sum())
        items = table.select(manifest.ITEMS_SCHEMA.names).filter(pa.array(found.pending)).combine_chunks()
        self.styles.update(manifest.values_of(items["style"]))
        loads = [self._load_of(text) for text in manifest.values_of(items["params"])]
        for load in loads:
            self._add_load(load)
        self.sample.add(items)
        self.open_sample.add(items.filter(pa.array([not load.area for load in loads], pa.bool_())))

    def _add_load(self, load: _Load) -> None:
        self.evaluations += load.evaluations
        self.frames += load.frames
        self.plain_frames += load.plain_frames
        self.video_s += load.video_s
        self.sized_pixel_frames += float(load.area * load.num_frames)
        self.sized_work += float(load.area * load.frames)
        if not load.area:
            self.open_frames += load.num_frames
            self.open_evaluation_frames += load.frames


class _Reservoir:
    """A fair sample of a stream of items, the same for the same stream."""

    def __init__(self) -> None:
        self._random = random.Random(0)  # noqa: S311 - a sample, not a secret
        self._kept: list[Mapping[str, Any]] = []
        self._seen = 0

    def add(self, items: pa.Table) -> None:
        """Offers some items."""
        chosen: dict[int, int] = {}
        for row in range(len(items)):
            self._seen += 1
            place = self._seen - 1 if self._seen <= SAMPLED_PICTURES else self._random.randrange(self._seen)
            if place < SAMPLED_PICTURES:
                chosen[place] = row
        for place in sorted(chosen):
            self._kept[place : place + 1] = items.slice(chosen[place], 1).to_pylist()

    def rows(self) -> list[ManifestRow]:
        """The sample."""
        return [manifest.row_from_item(item) for item in self._kept]
