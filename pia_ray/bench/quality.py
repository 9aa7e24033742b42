"""The card of `pia-ray bench --quality`: each preset beside fewer steps of the same cost, against preset exact.

The rows are pictures and prompts of the bundled catalogue; the model is the user's own. Only the counts of evaluations
and the ratios are the same on another machine.
"""

from __future__ import annotations

import csv
import itertools
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any, Final, get_args

import numpy as np
from PIL import Image

from pia_ray.animation import Animation
from pia_ray.bench.benchmark import machine
from pia_ray.bench.similarity import psnr, ssim
from pia_ray.catalog.workload import evaluations
from pia_ray.config.knob_types import Preset
from pia_ray.config.model import ModelConfig
from pia_ray.config.resolving import parse_params
from pia_ray.errors import ConfigError
from pia_ray.pia.engine import Engine
from pia_ray.pia.loading.load import assemble
from pia_ray.prepare import prepare
from pia_ray.types import AnimationRequest, PreparedRequest
from pia_ray.weights import resolve as resolve_weights

RIVALS: Final = ("dpm++2m", "unipc")
"""Schedulers whose fewer steps are compared, besides the same one's."""

MOST_ROWS: Final = 14
"""Pictures of the bundled catalogue."""


@dataclass(frozen=True)
class QualitySettings:
    """The settings of one run."""

    steps: tuple[int, ...] = (8, 25)
    rows: int = 4
    """The first pictures of the bundled catalogue, at most 14."""
    num_frames: int = 16
    side: int | None = None
    """Of the square frames, in px; None: the model's own sizes."""
    guidance_scale: float | None = None
    """None: the model's own."""


@dataclass(frozen=True)
class Way:
    """The videos of all rows made one way, against those with every step computed."""

    name: str
    evaluations: int
    """Of the UNet, for one video."""
    faster: float
    """Evaluations of exact by those of this way: the ratio of the UNet's operations at any size."""
    faster_s: float
    """Seconds of exact by those of this way, encoding and decoding included: the median of the rows."""
    cpu_s: float
    """CPU seconds of all rows."""
    psnr_db: float | None
    """Mean of the rows; None where all frames are equal."""
    least_psnr_db: float | None
    least_ssim: float


@dataclass(frozen=True)
class QualityCard:
    """The findings of one run: for each number of steps its ways."""

    machine: Mapping[str, Any]
    model: str
    settings: Mapping[str, Any]
    ways: Mapping[int, Sequence[Way]]

    def to_json(self) -> str:
        """One line."""
        return json.dumps({"benchmark": "quality", **asdict(self)}, default=str)


def quality(
    model: ModelConfig, settings: QualitySettings, *, report: Callable[[str], None] = lambda line: None
) -> QualityCard:
    """The card of one comparison; `report` gets a line for each way.

    Raises:
        ConfigError: a number of the settings is below 1.
        WeightsError: the model cannot be loaded.
        RowError: a row cannot be animated with these settings.
    """
    if min(settings.rows, settings.num_frames, *settings.steps) < 1 or settings.rows > MOST_ROWS:
        raise ConfigError(f"rows, frames and steps must be at least 1, and rows at most {MOST_ROWS}")
    parts = assemble(resolve_weights(model), model)
    engine = Engine(parts, batch_size=1)
    ways = {steps: _ways(model, engine, settings, steps, report) for steps in settings.steps}
    return QualityCard(machine(parts), parts.version, asdict(settings), ways)


def text_of(card: QualityCard) -> str:
    """The card for people."""
    settings = card.settings
    guidance = (
        "the model's guidance" if settings["guidance_scale"] is None else f"guidance {settings['guidance_scale']:g}"
    )
    lines = [
        f"quality: {card.model}, {settings['rows']} rows, {settings['num_frames']} frames, {guidance}, "
        "against preset exact"
    ]
    for steps, ways in card.ways.items():
        lines.append(f"  {f'{steps} steps':24}{'UNet':>7}{'faster':>8}{'in s':>7}{'PSNR':>7}{'least':>7}{'SSIM':>8}")
        for way in ways:
            decibels = "".join(f"{'equal' if each is None else f'{each:.1f}':>7}" for each in _decibels(way))
            lines.append(
                f"  {way.name:24}{way.evaluations:7}{way.faster:7.2f}x{way.faster_s:6.2f}x"
                f"{decibels}{way.least_ssim:8.4f}"
            )
    return "\n".join([*lines, "  " + ", ".join(f"{name} {value}" for name, value in card.machine.items())])


def _ways(
    model: ModelConfig, engine: Engine, settings: QualitySettings, steps: int, report: Callable[[str], None]
) -> list[Way]:
    plain: dict[str, Any] = {"num_inference_steps": steps, "num_frames": settings.num_frames}
    if settings.guidance_scale is not None:
        plain["guidance_scale"] = settings.guidance_scale
    if settings.side is not None:
        plain |= {"width": settings.side, "height": settings.side}
    first = _requests(model, 1, plain)[0].params
    named = {f"preset {preset}": {**plain, "preset": preset} for preset in get_args(Preset)}
    for preset in get_args(Preset)[1:]:
        computed = evaluations(first.model_copy(update={"preset": preset})) / evaluations(first)
        fewer = max(1, round(steps * computed))
        for scheduler in dict.fromkeys((first.scheduler, *RIVALS)):
            if fewer < steps:
                named[f"{scheduler}, {fewer} steps"] = {**plain, "num_inference_steps": fewer, "scheduler": scheduler}
    requests = {name: _requests(model, settings.rows, knobs) for name, knobs in named.items()}
    made: dict[str, list[_Made]] = {name: [] for name in named}
    for row in range(settings.rows):
        report(f"{steps} steps: row {row + 1} of {settings.rows}")
        # By turns, and in the other direction each time, so that a slow moment falls on all ways.
        for name in list(named)[:: -1 if row % 2 else 1]:
            made[name].append(_animate(engine, requests[name][row]))
    counts = {name: evaluations(own[0].params) for name, own in requests.items()}
    return [_way(name, made[name], made["preset exact"], counts) for name in named]


@dataclass(frozen=True)
class _Made:
    frames: np.ndarray[Any, Any]
    seconds: float
    cpu_s: float


def _animate(engine: Engine, request: PreparedRequest) -> _Made:
    started, cpu = time.perf_counter(), time.process_time()
    engine.join(request)
    while True:
        for _, outcome in engine.step():
            if not isinstance(outcome, Animation):
                raise outcome
            return _Made(outcome.frames, time.perf_counter() - started, time.process_time() - cpu)


def _way(name: str, made: Sequence[_Made], exact: Sequence[_Made], counts: Mapping[str, int]) -> Way:
    decibels = [psnr(each.frames, true.frames) for each, true in zip(made, exact, strict=True)]
    equal = min(decibels) == float("inf")
    return Way(
        name=name,
        evaluations=counts[name],
        faster=counts["preset exact"] / counts[name],
        faster_s=statistics.median(true.seconds / each.seconds for each, true in zip(made, exact, strict=True)),
        cpu_s=sum(each.cpu_s for each in made),
        psnr_db=None if equal else statistics.fmean(min(each, 100.0) for each in decibels),
        least_psnr_db=None if equal else min(decibels),
        least_ssim=min(ssim(each.frames, true.frames) for each, true in zip(made, exact, strict=True)),
    )


def _decibels(way: Way) -> tuple[float | None, float | None]:
    return way.psnr_db, way.least_psnr_db


def _requests(model: ModelConfig, num: int, knobs: Mapping[str, Any]) -> list[PreparedRequest]:
    """The first rows of the bundled catalogue with these knobs; their seeds are their numbers."""
    with as_file(files("pia_ray").joinpath("demo", "catalog")) as folder:
        with (folder / "catalog.csv").open(encoding="utf-8", newline="") as file:
            rows = list(itertools.islice(csv.DictReader(file), num))
        return [
            prepare(
                AnimationRequest(
                    _picture(folder / row["image"]),
                    parse_params({"prompt": row["prompt"], "motion_scale": row["motion_scale"], "seed": seed, **knobs}),
                ),
                model,
            )
            for seed, row in enumerate(rows)
        ]


def _picture(path: Path) -> Image.Image:
    with Image.open(path) as opened:
        return opened.convert("RGB")
