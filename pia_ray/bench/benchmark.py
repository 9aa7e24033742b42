"""The benchmark of `pia-ray bench`: the animator and diffusers' own pipeline, in one run and by turns."""

from __future__ import annotations

import itertools
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import torch

from pia_ray.bench import reference
from pia_ray.bench.card import BenchSettings, Card, Offload, Size, Timing
from pia_ray.bench.stages import animate, encode_pictures, request_of, stages_of, timed
from pia_ray.config.model import ModelConfig
from pia_ray.errors import ConfigError
from pia_ray.pia.animator import Animator
from pia_ray.pia.components import Components
from pia_ray.pia.device.memory import available_bytes, weight_bytes
from pia_ray.pia.device.precision import products_of
from pia_ray.pia.loading.load import assemble
from pia_ray.pia.unet.attention_kernels import chosen_kernels
from pia_ray.pia.unet.choices import choices_on
from pia_ray.temporary_folders import temporary_folder
from pia_ray.testing import make_random_pipeline
from pia_ray.weights import resolve as resolve_weights

PACKAGES: Final = ("torch", "diffusers", "transformers")
DOCUMENTED: Final = "documented example, verbatim"
RESIDENT: Final = "diffusers, resident"

FULL_SIZE_BYTES: Final = 16 * 2**30
"""Free memory for diffusers' and our full model side by side in float32, of which the files' pages are shared."""

Ways = Mapping[str, Callable[[int], float]]
"""The seconds per video of a turn, by the way the videos are made."""


def settings_here(
    *,
    size: Size | None,
    steps: int | None,
    side: int | None,
    batches: tuple[int, ...] | None = None,
    **others: Any,
) -> BenchSettings:
    """Settings with what is left open filled in for this machine: the full model at 25 steps where there is a GPU.

    On a CPU the full model makes small pictures in 2 steps, one row at a time.
    """
    has_gpu = torch.cuda.is_available()
    size = size or ("full" if has_gpu else "reduced")
    slow = size == "full" and not has_gpu
    return BenchSettings(
        size=size,
        steps=(25 if has_gpu else 2 if slow else 4) if steps is None else steps,
        side={"full": 128 if slow else 512, "reduced": 128, "demo": 64}[size] if side is None else side,
        batches=((1,) if slow else (1, 2, 4, 8)) if batches is None else batches,
        **others,
    )


def bench(settings: BenchSettings, *, report: Callable[[str], None] = lambda line: None) -> Card:
    """The card of one measurement; `report` gets a line for each thing that is done.

    Raises:
        ConfigError: the settings ask for what this machine cannot do.
    """
    if settings.size == "full" and not torch.cuda.is_available() and 0 < available_bytes() < FULL_SIZE_BYTES:
        needed = f"{FULL_SIZE_BYTES / 2**30:.0f} GiB of free memory"
        raise ConfigError(f"--size full needs {needed} on a CPU: use reduced or demo")
    if not settings.batches or min(settings.rounds, settings.steps, settings.num_frames, *settings.batches) < 1:
        raise ConfigError("rounds, steps, frames and batches must be at least 1")
    if settings.side < 8 or settings.side % 8:
        raise ConfigError(f"side must be a multiple of 8 (got {settings.side})")
    with _model(settings, report) as model:
        return _measure(model, settings, report)


def _measure(model: ModelConfig, settings: BenchSettings, report: Callable[[str], None]) -> Card:
    weights = resolve_weights(model)
    parts = assemble(weights, model)
    with ExitStack() as stack:
        ways = _ways(weights.base, parts, model, settings, stack)
        times, cpu_times, peaks = _rounds(ways, parts, settings, report)
    timings = {name: Timing.of(seconds) for name, seconds in times.items()}
    best = min(timings[_ours(rows)].median_s for rows in settings.batches)
    side = settings.side // parts.spatial_factor
    shape = {"num_frames": settings.num_frames, "height": side, "width": side}
    step = reference.step_flops(parts, **shape) / 1e12
    decoding = reference.decode_flops(parts, **shape) / 1e12
    with products_of(parts):
        ceiling = reference.matmul_flops_per_s(parts.device, parts.dtype) / 1e12
    choices = choices_on(parts.device)
    useful = (step * settings.steps + decoding) / best
    return Card(
        machine=machine(parts),
        settings=asdict(settings),
        ways=timings,
        ratios=_ratios(times, settings),
        stages=stages_of(parts, model, settings),
        useful_tflop_per_s=useful,
        matmul_tflop_per_s=ceiling,
        share_of_matmul=useful / ceiling,
        peak_bytes=peaks,
        step_tflop=step,
        decode_tflop=decoding,
        extra={
            "attention": chosen_kernels(parts.unet),
            "operators": ({} if choices is None else choices.known()),
            "cpu_ratios": _ratios(cpu_times, settings) if parts.device.type == "cpu" else {},
        },
    )


def _ways(base: Path, parts: Components, model: ModelConfig, settings: BenchSettings, stack: ExitStack) -> Ways:
    """All ways; the stack closes their animators."""
    folder = stack.enter_context(temporary_folder())
    animator = stack.enter_context(Animator(model, batch_size=max(settings.batches)))
    resident = reference.resident_pipeline(base, parts)
    ways: dict[str, Callable[[int], float]] = {}

    def theirs(pipeline: Any, turn: int, **options: Any) -> Any:
        with products_of(parts):
            return reference.run_pipeline(pipeline, request_of(model, settings, turn), parts, **options)

    if settings.verbatim:
        documented, gif = reference.documented_pipeline(base, parts), folder / "example.gif"
        ways[DOCUMENTED] = lambda turn: timed(parts, lambda: theirs(documented, turn, gif=gif))
    ways[RESIDENT] = lambda turn: timed(parts, lambda: encode_pictures(theirs(resident, turn)))
    for rows in settings.batches:
        ways[_ours(rows)] = lambda turn, rows=rows: (  # type: ignore[misc]
            timed(parts, lambda: animate(animator, model, settings, turn, rows)) / rows
        )
    for mode in settings.offload:
        offloaded = model.model_copy(update={"offload": mode})
        other = stack.enter_context(Animator(offloaded, batch_size=1))
        ways[_offloaded(mode)] = lambda turn, other=other, offloaded=offloaded: (  # type: ignore[misc]
            timed(parts, lambda: animate(other, offloaded, settings, turn, 1))
        )
    return ways


def _rounds(
    ways: Ways, parts: Components, settings: BenchSettings, report: Callable[[str], None]
) -> tuple[dict[str, list[float]], dict[str, list[float]], dict[str, int]]:
    """The seconds and CPU seconds per video of each round, and on a GPU the peak bytes, by way.

    The order alternates; the first turn warms up.
    """
    # Weights that lie on the device all the time are in no way's own peak, but part of what it takes.
    own = weight_bytes(vars(parts).values())
    at_home = {DOCUMENTED, *map(_offloaded, settings.offload)}
    videos = {_ours(rows): rows for rows in settings.batches}
    times: dict[str, list[float]] = {name: [] for name in ways}
    cpu_times: dict[str, list[float]] = {name: [] for name in ways}
    peaks: dict[str, int] = {}
    for turn in range(settings.rounds + 1):
        report(f"round {turn} of {settings.rounds}" if turn else "warming up")
        for name in list(ways)[:: -1 if turn % 2 else 1]:
            before = _reset_peak(parts)
            started = time.process_time()
            seconds = ways[name](turn)
            cpu_s = (time.process_time() - started) / videos.get(name, 1)
            if parts.device.type == "cuda":  # a process on a CPU has one maximum, which is no way's own
                peak = int(torch.cuda.max_memory_allocated()) + (0 if name in at_home else own) - before
                peaks[name] = max(peaks.get(name, 0), peak)
            if turn:
                times[name].append(seconds)
                cpu_times[name].append(cpu_s)
    return times, cpu_times, peaks


def machine(parts: Components) -> dict[str, Any]:
    """The device, precision and versions that were measured."""
    gpu = torch.cuda.get_device_name() if parts.device.type == "cuda" else ""
    name = gpu or f"{os.cpu_count()} CPUs, {platform.machine()}"
    kind = "".join(letter if letter.isalnum() else "-" for letter in name.lower())
    return {
        "kind": "-".join(filter(None, kind.split("-"))),
        "gpu": gpu,
        "cpus": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "dtype": "tf32" if parts.tf32 else str(parts.dtype).removeprefix("torch."),
        "python": platform.python_version(),
        "pia-ray": version("pia-ray"),
        **{package: version(package) for package in PACKAGES},
    }


def _ours(rows: int) -> str:
    return f"pia-ray, {rows} row{'s' if rows > 1 else ''} in flight"


def _offloaded(mode: Offload) -> str:
    return f"pia-ray, offload {mode}, 1 row"


def _ratios(times: Mapping[str, Sequence[float]], settings: BenchSettings) -> dict[str, float]:
    """Medians over the rounds of the other's seconds by ours, each within its round."""
    ratios = {}
    for mode, other in itertools.product(settings.offload, (RESIDENT, DOCUMENTED)):
        if other in times:
            pairs = zip(times[other], times[_offloaded(mode)], strict=True)
            ratios[f"{_offloaded(mode)} against {other}"] = statistics.median(theirs / ours for theirs, ours in pairs)
    for other, rows in itertools.product((DOCUMENTED, RESIDENT), settings.batches):
        if other in times:
            pairs = zip(times[other], times[_ours(rows)], strict=True)
            ratios[f"{_ours(rows)} against {other}"] = statistics.median(theirs / ours for theirs, ours in pairs)
    return ratios


def _reset_peak(parts: Components) -> int:
    """Bytes of the GPU that are taken already, by all ways that wait; a new peak is looked for from here on."""
    if parts.device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats()
    return int(torch.cuda.memory_allocated())


@contextmanager
def _model(settings: BenchSettings, report: Callable[[str], None]) -> Iterator[ModelConfig]:
    cuda = torch.cuda.is_available()
    if settings.size == "demo":
        yield ModelConfig.named("demo").model_copy(update={"dtype": settings.dtype, "device": "auto"})
        return
    dtype = settings.dtype if settings.dtype != "auto" else ("float16" if cuda else "float32")
    stored: Any = "float32" if dtype == "tf32" else dtype
    with tempfile.TemporaryDirectory() as folder:
        report(f"making a {settings.size} model with random weights")
        base = make_random_pipeline(
            Path(folder) / "model", size=settings.size, dtype=stored, device="cuda" if cuda else "cpu"
        )
        yield ModelConfig(name=f"random-{settings.size}", base=str(base), dtype=dtype)
