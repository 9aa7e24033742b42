"""The card of one run of `pia-ray bench`: its settings and findings, as text, as JSON and beside an earlier card.

Speeds depend on the machine and are given as ratios within one run. Only the counts of operations do not.
"""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Literal

Size = Literal["full", "reduced", "demo"]
Offload = Literal["model", "sequential"]

LEAST_MOVED: Final = 0.05
"""A change below this share is not reported, however steady a measurement was."""


@dataclass(frozen=True)
class BenchSettings:
    """The settings of one run of the benchmark."""

    size: Size = "reduced"
    """full: Stable Diffusion 1.5's own, with random weights; reduced: its shape at a fifth of the width; demo."""
    steps: int = 4
    num_frames: int = 16
    side: int = 128
    """Of the square frames, in px."""
    rounds: int = 5
    batches: tuple[int, ...] = (1, 2, 4, 8)
    dtype: Literal["auto", "float32", "tf32", "float16", "bfloat16"] = "auto"
    verbatim: bool = True
    """Whether the documented example runs too."""
    offload: tuple[Offload, ...] = ()
    """Ways to keep weights in host memory that run too, one row in flight each: what the memory they save costs."""


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
    """The findings of one run of the benchmark."""

    machine: Mapping[str, Any]
    settings: Mapping[str, Any]
    ways: Mapping[str, Timing]
    """Seconds per video: the documented example, diffusers resident, ours by rows in flight."""
    ratios: Mapping[str, float]
    """Our videos per second by those of each other way, medians of the rounds."""
    stages: Mapping[str, float]
    """Seconds of one video alone, by stage."""
    useful_tflop_per_s: float
    """diffusers' operations for the same videos, by the time that ours takes, at the best batch."""
    matmul_tflop_per_s: float
    share_of_matmul: float
    peak_bytes: Mapping[str, int]
    """Of the GPU, by way; empty on a CPU."""
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


def differences(card: Card, earlier: Mapping[str, Any]) -> list[str]:
    """One sentence for each number that changed by more than the spread of either run.

    Seconds are compared between machines with GPUs only, because those of a shared CPU vary more than its ratios.
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
    by_cpu = card.extra.get("cpu_ratios", {})
    for name, value in card.ratios.items():
        lines.append(f"  {name}: {value:.2f} x" + (f", {by_cpu[name]:.2f} x by CPU s" if name in by_cpu else ""))
    lines.append("  one video alone, s: " + ", ".join(f"{name} {value:.4f}" for name, value in card.stages.items()))
    lines.append(
        f"  {card.step_tflop:.4g} TFLOP a step, {card.decode_tflop:.4g} a decode; useful "
        f"{card.useful_tflop_per_s:.4g} TFLOP/s, {card.share_of_matmul:.0%} of a large matrix product's "
        f"{card.matmul_tflop_per_s:.4g}"
    )
    lines += [f"  self-attention of {shape}: {name}" for shape, name in card.extra.get("attention", {}).items()]
    for name, num in Counter(card.extra.get("operators", {}).values()).items():
        lines.append(f"  operators by way {name}: {num} kinds of call")
    if card.peak_bytes:
        lines.append("  peak memory: " + ", ".join(f"{k} {v / 2**30:.2f} GiB" for k, v in card.peak_bytes.items()))
    lines.append("  " + ", ".join(f"{name} {value}" for name, value in card.machine.items()))
    return "\n".join(lines)
