"""The model on a CPU: evaluations per forward, memory format and torch threads, each against its alternatives.

Prints a card and, last, one JSON line. Run: `.venv/bin/python benchmarks/engine_cpu.py [--rounds N] [--model M]`
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import card
import torch

from pia_ray.config.model import ModelConfig
from pia_ray.pia.components import Components
from pia_ray.pia.decoding.decode import decode
from pia_ray.pia.loading.load import assemble
from pia_ray.testing import make_pipeline_folder
from pia_ray.weights import resolve

EVALUATIONS = (1, 2, 4, 8, 16)
"""Sizes of a forward. A row with guidance asks for two evaluations in each step."""
FRAMES = 16
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}

Variants = dict[str, Callable[[], float]]


def main() -> None:
    """Takes every variant once per round and prints the median and the least of the rounds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="rounds; their medians count (9)")
    parser.add_argument("--model", choices=("demo", "tiny"), default="demo", help="tiny: random weights, VAE factor 8")
    parser.add_argument("--side", type=int, default=64, help="px of the square frames (64)")
    arguments = parser.parse_args()
    with model_of(arguments.model) as model:
        parts = assemble(resolve(model), model)
        times = by_turns(variants_of(parts, arguments.side), arguments.rounds)
    print(
        f"the model on a CPU: {arguments.model}, {arguments.side} x {arguments.side} px, {FRAMES} frames; "
        f"{arguments.rounds} rounds, each variant once in each"
    )
    print("  seconds per evaluation, or per decoded row         median     least")
    for name, seconds in times.items():
        print(f"  {name:46} {statistics.median(seconds):10.4f} {min(seconds):9.4f}")
    facts = card.machine("torch", "diffusers")
    print(f"  {card.line(facts)}")
    result = {
        "benchmark": "engine_cpu",
        "model": arguments.model,
        "side": arguments.side,
        "rounds": arguments.rounds,
        "median_s": {name: round(statistics.median(seconds), 5) for name, seconds in times.items()},
        "least_s": {name: round(min(seconds), 5) for name, seconds in times.items()},
        **facts,
    }
    print(json.dumps(result))


def variants_of(parts: Components, side: int) -> Variants:
    """The measured variants, by name."""
    variants: Variants = {}
    for threads, (name, layout) in itertools.product(sorted({1, torch.get_num_threads()}), FORMATS.items()):
        how = {"layout": layout, "threads": threads}
        for num in EVALUATIONS:
            variants[f"forward of {num:2}, {name}, threads {threads}"] = partial(
                forward_s, parts, side // parts.spatial_factor, num=num, **how
            )
        variants[f"decode, {name}, threads {threads}"] = partial(decode_s, parts, side // parts.spatial_factor, **how)
    return variants


@torch.inference_mode()
def forward_s(parts: Components, side: int, *, num: int, layout: torch.memory_format, threads: int) -> float:
    """Seconds per evaluation of one forward of `num`."""
    torch.set_num_threads(threads)
    parts.unet.to(memory_format=layout)
    sample = torch.randn(num, 2 * parts.latent_channels + 1, FRAMES, side, side)
    length, width = parts.tokenizer.model_max_length, parts.text_encoder.config.hidden_size
    prompts = torch.randn(num * FRAMES, length, width)
    timesteps = torch.full((num,), 500.0)
    return timed(lambda: parts.unet(sample, timesteps, encoder_hidden_states=prompts, return_dict=False)) / num


def decode_s(parts: Components, side: int, *, layout: torch.memory_format, threads: int) -> float:
    """Seconds from one row's latents to its frames."""
    torch.set_num_threads(threads)
    parts.vae.to(memory_format=layout)
    latents = torch.randn(parts.latent_channels, FRAMES, side, side)
    return timed(lambda: decode(parts, latents))


def timed(work: Callable[[], object]) -> float:
    """Seconds that it takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def by_turns(variants: Variants, rounds: int) -> dict[str, list[float]]:
    """Each variant's times; a first round warms up and is dropped. Every second round goes backwards."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(rounds + 1):
        for name in list(variants)[:: -1 if turn % 2 else 1]:
            seconds = variants[name]()
            if turn:
                times[name].append(seconds)
    return times


@contextmanager
def model_of(name: str) -> Iterator[ModelConfig]:
    """The demo model, or random weights in Stable Diffusion's own layout; both on the CPU in float32."""
    if name == "demo":
        yield ModelConfig.named("demo").model_copy(update={"device": "cpu"})
        return
    with tempfile.TemporaryDirectory() as folder:
        base = make_pipeline_folder(Path(folder) / "tiny")
        yield ModelConfig(name="tiny", base=str(base), device="cpu", dtype="float32")


if __name__ == "__main__":
    main()
