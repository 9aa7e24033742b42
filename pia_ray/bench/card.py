"""`pia-ray bench`: the animator beside diffusers' own pipeline, in one run and by turns; a card, and numbers as JSON.

Speeds depend on the machine and are given as ratios within one run. Only the counts of operations do not.
"""

from __future__ import annotations

import itertools
import json
import os
import platform
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import torch

from pia_ray.animation import Animation
from pia_ray.bench import reference
from pia_ray.config.knobs import AnimationParams
from pia_ray.config.model import ModelConfig
from pia_ray.errors import ConfigError
from pia_ray.media import video
from pia_ray.pia.animator import Animator
from pia_ray.pia.components import Components
from pia_ray.pia.decoding.decode import decode, to_numpy
from pia_ray.pia.denoising.conditions import Conditions
from pia_ray.pia.device.memory import weight_bytes
from pia_ray.pia.engine import Engine
from pia_ray.pia.loading.load import assemble
from pia_ray.pia.unet.attention_kernels import chosen_kernels
from pia_ray.prepare import prepare
from pia_ray.testing import make_random_pipeline
from pia_ray.types import AnimationRequest, PreparedRequest
from pia_ray.weights import resolve as resolve_weights

Size = Literal["full", "reduced", "demo"]
Offload = Literal["model", "sequential"]

PACKAGES: Final = ("torch", "diffusers", "transformers")
LEAST_MOVED: Final = 0.05
"""A change below this share is never told, however steady a measurement was."""


@dataclass(frozen=True)
class BenchSettings:
    """What is measured."""

    size: Size = "reduced"
    """full: Stable Diffusion 1.5's own, with random weights; reduced: its shape at a fifth of the width; demo."""
    steps: int = 4
    num_frames: int = 16
    side: int = 128
    """Of the square frames, in px."""
    rounds: int = 5
    batches: tuple[int, ...] = (1, 2, 4, 8)
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    verbatim: bool = True
    """Whether the documented example runs too."""
    offload: tuple[Offload, ...] = ()
    """Ways to keep weights in host memory that run too, one row in flight each: what the memory they save costs."""


def settings_here(*, size: Size | None, steps: int | None, side: int | None, **others: Any) -> BenchSettings:
    """Settings with what is left open filled in for this machine: the full model at 25 steps where there is a GPU."""
    has_gpu = torch.cuda.is_available()
    size = size or ("full" if has_gpu else "reduced")
    return BenchSettings(
        size=size,
        steps=steps or (25 if has_gpu else 4),
        side=side or {"full": 512, "reduced": 128, "demo": 64}[size],
        **others,
    )


@dataclass(frozen=True)
class Timing:
    """Seconds of one way, over the rounds."""

    median_s: float
    least_s: float
    most_s: float

    @property
    def spread(self) -> float:
        """Half of the range, as a share of the median."""
        return (self.most_s - self.least_s) / 2 / self.median_s

    @staticmethod
    def of(seconds: Sequence[float]) -> Timing:
        """The timing of these rounds."""
        return Timing(statistics.median(seconds), min(seconds), max(seconds))


@dataclass(frozen=True)
class Card:
    """What one run of the benchmark found."""

    machine: Mapping[str, Any]
    settings: Mapping[str, Any]
    ways: Mapping[str, Timing]
    """Seconds per video: the documented example, diffusers resident, ours by rows in flight."""
    ratios: Mapping[str, float]
    """How many times as fast ours is, medians of the rounds."""
    stages: Mapping[str, float]
    """Seconds of one video alone, by stage."""
    useful_tflop_per_s: float
    """diffusers' operations for the same videos, by the time that ours takes, at the best batch."""
    matmul_tflop_per_s: float
    share_of_matmul: float
    peak_bytes: Mapping[str, int]
    step_tflop: float
    decode_tflop: float
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """Name of the kind of machine and of what was measured, to find a card to compare with."""
        return f"{self.machine['kind']}-{self.settings['size']}"

    def to_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self), sort_keys=True, default=str)


def bench(settings: BenchSettings, *, report: Callable[[str], None] = lambda line: None) -> Card:
    """Measures; `report` is told what is being done.

    Raises:
        ConfigError: the settings ask for what this machine cannot do.
    """
    if settings.size == "full" and not torch.cuda.is_available():
        raise ConfigError("--size full needs a GPU: one step of it is 35 TFLOP. Without one, use reduced or demo.")
    if settings.rounds < 1 or not settings.batches or min(settings.batches) < 1:
        raise ConfigError("rounds and batches must be at least 1")
    with _model(settings, report) as model:
        return _measure(model, settings, report)


def differences(card: Card, earlier: Mapping[str, Any]) -> list[str]:
    """What moved by more than the spread of either run, in lines for people.

    Seconds are compared between machines with GPUs only: those of a shared CPU say nothing, its ratios do.
    """
    lines = []
    spread = max((timing.spread for timing in card.ways.values()), default=0.0)
    for timing in earlier["ways"].values():
        spread = max(spread, (timing["most_s"] - timing["least_s"]) / 2 / timing["median_s"])
    bound = max(LEAST_MOVED, spread)
    pairs = {f"ratio {name}": (value, earlier["ratios"].get(name)) for name, value in card.ratios.items()}
    pairs["step TFLOP"] = (card.step_tflop, earlier.get("step_tflop"))
    pairs["decode TFLOP"] = (card.decode_tflop, earlier.get("decode_tflop"))
    if card.machine.get("gpu"):
        known = earlier["ways"]
        pairs |= {
            f"seconds {name}": (timing.median_s, known.get(name, {}).get("median_s"))
            for name, timing in card.ways.items()
        }
        pairs |= {f"peak bytes {name}": (n, earlier["peak_bytes"].get(name)) for name, n in card.peak_bytes.items()}
    for name, (now, before) in pairs.items():
        if before and abs(now / before - 1) > bound:
            lines.append(f"{name}: {before:.4g} -> {now:.4g} ({now / before - 1:+.0%})")
    return lines or [f"nothing moved by more than {bound:.0%}, the spread of the rounds"]


def text_of(card: Card) -> str:
    """The card for people."""
    settings = card.settings
    lines = [
        f"bench: {settings['size']} model, {settings['num_frames']} frames of {settings['side']} x {settings['side']} "
        f"px, {settings['steps']} steps, {settings['rounds']} rounds by turns",
        f"  {'':34}{'s/video':>10}{'least':>10}{'most':>10}{'videos/s':>10}",
    ]
    for name, timing in card.ways.items():
        lines.append(
            f"  {name:34}{timing.median_s:10.3f}{timing.least_s:10.3f}{timing.most_s:10.3f}{1 / timing.median_s:10.3f}"
        )
    lines += [f"  {name}: {value:.2f} x" for name, value in card.ratios.items()]
    lines.append("  one video alone, s: " + ", ".join(f"{name} {value:.4f}" for name, value in card.stages.items()))
    lines.append(
        f"  {card.step_tflop:.4g} TFLOP a step, {card.decode_tflop:.4g} a decode; useful "
        f"{card.useful_tflop_per_s:.4g} TFLOP/s, {card.share_of_matmul:.0%} of a large matrix product's "
        f"{card.matmul_tflop_per_s:.4g}"
    )
    lines += [f"  self-attention of {shape}: {name}" for shape, name in card.extra.get("attention", {}).items()]
    lines.append("  peak memory: " + ", ".join(f"{k} {v / 2**30:.2f} GiB" for k, v in card.peak_bytes.items()))
    lines.append("  " + ", ".join(f"{name} {value}" for name, value in card.machine.items()))
    return "\n".join(lines)


def _measure(model: ModelConfig, settings: BenchSettings, report: Callable[[str], None]) -> Card:
    weights = resolve_weights(model)
    parts = assemble(weights, model)
    side = settings.side // parts.spatial_factor
    shape = {"num_frames": settings.num_frames, "height": side, "width": side}
    peaks: dict[str, int] = {}
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        animator = stack.enter_context(Animator(model, batch_size=max(settings.batches)))
        resident = reference.resident_pipeline(weights.base, parts)
        ways: dict[str, Callable[[int], float]] = {}
        if settings.verbatim:
            documented = reference.documented_pipeline(weights.base, parts)
            ways["documented example, verbatim"] = lambda turn: _timed(
                parts,
                lambda: reference.run_pipeline(
                    documented, _request(model, settings, turn), parts, gif=Path(folder) / "example.gif"
                ),
            )
        ways["diffusers, resident"] = lambda turn: _timed(
            parts, lambda: _encoded_pictures(reference.run_pipeline(resident, _request(model, settings, turn), parts))
        )
        for rows in settings.batches:
            ways[_ours(rows)] = lambda turn, rows=rows: (  # type: ignore[misc]
                _timed(parts, lambda: _animated(animator, model, settings, turn, rows)) / rows
            )
        for mode in settings.offload:
            offloaded = model.model_copy(update={"offload": mode})
            other = stack.enter_context(Animator(offloaded, batch_size=1))
            ways[_offloaded(mode)] = lambda turn, other=other, offloaded=offloaded: (  # type: ignore[misc]
                _timed(parts, lambda: _animated(other, offloaded, settings, turn, 1))
            )
        # Weights that lie on the device all the time are in no way's own peak, but part of what it takes.
        own = weight_bytes(vars(parts).values())
        at_home = {"documented example, verbatim", *map(_offloaded, settings.offload)}
        times: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(settings.rounds + 1):
            report(f"round {turn} of {settings.rounds}" if turn else "warming up")
            for name in list(ways)[:: -1 if turn % 2 else 1]:
                before = _reset_peak(parts)
                seconds = ways[name](turn)
                peak = _peak(parts)
                if parts.device.type == "cuda":
                    peak += (0 if name in at_home else own) - before
                peaks[name] = max(peaks.get(name, 0), peak)
                if turn:
                    times[name].append(seconds)
    timings = {name: Timing.of(seconds) for name, seconds in times.items()}
    best = min(timings[_ours(rows)].median_s for rows in settings.batches)
    step = reference.step_flops(parts, **shape) / 1e12
    decoding = reference.decode_flops(parts, **shape) / 1e12
    ceiling = reference.matmul_flops_per_s(parts.device, parts.dtype) / 1e12
    useful = (step * settings.steps + decoding) / best
    return Card(
        machine=machine(parts),
        settings=asdict(settings),
        ways=timings,
        ratios=_ratios(times, settings),
        stages=_stages(parts, model, settings),
        useful_tflop_per_s=useful,
        matmul_tflop_per_s=ceiling,
        share_of_matmul=useful / ceiling,
        peak_bytes=peaks,
        step_tflop=step,
        decode_tflop=decoding,
        extra={"attention": chosen_kernels(parts.unet)},
    )


def machine(parts: Components) -> dict[str, Any]:
    """What ran: device, precision, versions."""
    gpu = torch.cuda.get_device_name() if parts.device.type == "cuda" else ""
    name = gpu or f"{os.cpu_count()} CPUs, {platform.machine()}"
    kind = "".join(letter if letter.isalnum() else "-" for letter in name.lower())
    return {
        "kind": "-".join(filter(None, kind.split("-"))),
        "gpu": gpu,
        "cpus": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "dtype": str(parts.dtype).removeprefix("torch."),
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
    for mode, other in itertools.product(settings.offload, ("diffusers, resident", "documented example, verbatim")):
        if other in times:
            pairs = zip(times[other], times[_offloaded(mode)], strict=True)
            ratios[f"{_offloaded(mode)} against {other}"] = statistics.median(theirs / ours for theirs, ours in pairs)
    for other, rows in itertools.product(("documented example, verbatim", "diffusers, resident"), settings.batches):
        if other in times:
            pairs = zip(times[other], times[_ours(rows)], strict=True)
            ratios[f"{_ours(rows)} against {other}"] = statistics.median(theirs / ours for theirs, ours in pairs)
    return ratios


def _stages(parts: Components, model: ModelConfig, settings: BenchSettings) -> dict[str, float]:
    """Seconds of one video alone, nothing cached: medians over the rounds."""
    stages: dict[str, list[float]] = {}
    for turn in range(settings.rounds + 1):
        request = _request(model, settings, 1000 + turn)
        params, engine, conditions = request.params, Engine(parts, batch_size=1), Conditions(parts)
        engine.join(request)  # encodes once more, so that the next stage is the denoising alone
        found: dict[str, Any] = {}

        def text(request: PreparedRequest = request, conditions: Conditions = conditions) -> object:
            texts = (request.params.negative_prompt, request.params.prompt)
            return [conditions.prompt(text, clip_skip=None) for text in texts]

        def encode(request: PreparedRequest = request, conditions: Conditions = conditions) -> object:
            return conditions.picture(request.image, torch.Generator())

        def denoise(engine: Engine = engine, found: dict[str, Any] = found) -> None:
            while engine.rows:
                for _, outcome in engine.step():
                    if not isinstance(outcome, Animation):
                        raise outcome
                    found["latents"] = outcome.output.to(parts.device)

        def decode_latents(found: dict[str, Any] = found) -> object:
            found["frames"] = decode(parts, found["latents"])
            return found["frames"]

        def transfer(found: dict[str, Any] = found) -> object:
            found["pixels"] = to_numpy(found["frames"])
            return found["pixels"]

        def encode_video(found: dict[str, Any] = found, fps: int = params.fps) -> object:
            return video.encode(found["pixels"], fps=fps, format="mp4", provenance={})

        for name, work in (
            ("text", text),
            ("encode", encode),
            ("denoise", denoise),
            ("decode", decode_latents),
            ("transfer", transfer),
            ("video encode", encode_video),
        ):
            seconds = _timed(parts, work)
            if turn:
                stages.setdefault(name, []).append(seconds)
    return {name: statistics.median(seconds) for name, seconds in stages.items()}


def _animated(animator: Animator, model: ModelConfig, settings: BenchSettings, turn: int, rows: int) -> None:
    requests = [_request(model, settings, 100 * turn + row, latent=False) for row in range(rows)]
    for outcome in animator.animate(requests):
        if not isinstance(outcome, Animation):
            raise outcome
        video.encode(outcome.frames, fps=outcome.params.fps, format="mp4", provenance={})


def _encoded_pictures(frames: Sequence[Any]) -> None:
    video.encode(np.stack([np.asarray(frame) for frame in frames]), fps=8, format="mp4", provenance={})


def _request(model: ModelConfig, settings: BenchSettings, turn: int, *, latent: bool = True) -> PreparedRequest:
    """A request of its own for each turn, so that no cache knows its picture or prompt."""
    pixels = np.random.default_rng(turn).integers(0, 256, (settings.side, settings.side, 3), dtype=np.uint8)
    params = AnimationParams(
        prompt=f"a picture that moves, number {turn}",
        negative_prompt="dark",
        seed=turn,
        num_frames=settings.num_frames,
        num_inference_steps=settings.steps,
        guidance_scale=7.5,
        width=settings.side,
        height=settings.side,
    )
    kind: Literal["latent", "uint8"] = "latent" if latent else "uint8"
    return prepare(AnimationRequest(pixels, params, id=f"bench-{turn}", output_type=kind), model)


def _timed(parts: Components, work: Callable[[], object]) -> float:
    if parts.device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    if parts.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _reset_peak(parts: Components) -> int:
    """Begins to look for a new peak; bytes of the GPU that are taken already, by all ways that wait."""
    if parts.device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats()
    return int(torch.cuda.memory_allocated())


def _peak(parts: Components) -> int:
    """Bytes: of the GPU since the last reset, or of this process since its start."""
    if parts.device.type == "cuda":
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextmanager
def _model(settings: BenchSettings, report: Callable[[str], None]) -> Iterator[ModelConfig]:
    cuda = torch.cuda.is_available()
    if settings.size == "demo":
        yield ModelConfig.named("demo").model_copy(update={"dtype": settings.dtype, "device": "auto"})
        return
    dtype = settings.dtype if settings.dtype != "auto" else ("float16" if cuda else "float32")
    with tempfile.TemporaryDirectory() as folder:
        report(f"making a {settings.size} model with random weights")
        base = make_random_pipeline(
            Path(folder) / "model", size=settings.size, dtype=dtype, device="cuda" if cuda else "cpu"
        )
        yield ModelConfig(name=f"random-{settings.size}", base=str(base), dtype=dtype)
