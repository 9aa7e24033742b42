"""The speed, memory and correctness of the model on one GPU, in parts, cheapest first, within a number of minutes.

Weights are random, so pictures mean nothing and nothing is downloaded. Each part writes a JSON file as soon as it
ends; a table of all comes last. Exit codes: 0; 1 where a part failed or found something wrong; 2 where nothing ran.

    make gpu                                                    on the GPU
    .venv/bin/python -m benchmarks.gpu --parts kernels,waits    some parts
    .venv/bin/python -m benchmarks.gpu --device cpu             to try it without a GPU
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Final

import torch
from diffusers.utils import logging as diffusers_logging

from benchmarks.gpu.budget import Budget
from benchmarks.gpu.part import BAD, Outcome, Part, run_parts
from benchmarks.gpu.parts import PARTS
from benchmarks.gpu.random_model import RandomModel
from benchmarks.gpu.report import CardFolder, machine_of, table
from benchmarks.gpu.sizes import SIZES
from pia_ray.config.model import ModelConfig
from pia_ray.errors import ConfigError
from pia_ray.pia.device.placement import device_of
from pia_ray.pia.unet.compilation import can_compile

CARDS: Final = Path(__file__).parents[1] / "cards"

GRACE_S: Final = 30
"""Seconds that the part under way has to end when the time is over, before the process ends without it."""


def main(arguments: Sequence[str] | None = None, *, parts: Sequence[Part] = PARTS) -> int:
    """Runs those of the parts that the arguments name and prints the table; the exit code."""
    options = parse(arguments, parts)
    try:
        device = device_of(ModelConfig(name="random", base="-", device=options.device))
    except ConfigError as error:
        say(f"{error}\nWithout a GPU, `--device cpu` tries the parts at a tiny size.")
        return 2
    return run(options, device)


def run(options: argparse.Namespace, device: torch.device) -> int:
    """Runs the parts of the options on the device, within their minutes; the exit code."""
    budget = Budget(60 * options.minutes)
    size = SIZES[options.size or ("full" if device.type == "cuda" else "tiny")]
    usual = CARDS if device.type == "cuda" and size.name == "full" else Path("out/gpu")
    cards = CardFolder(options.output or usual, size, machine_of(device))
    compiles = options.compile == "on" or (options.compile == "auto" and device.type == "cuda")
    outcomes: list[Outcome] = []

    def done(outcome: Outcome) -> None:
        outcomes.append(outcome)
        cards.write(outcome)

    def show() -> None:
        print(f"{table(outcomes, cards.machine, size)}\ncards in {cards.folder}", flush=True)

    def give_up() -> None:
        say(f"the part under way does not end, {GRACE_S} s after the time: it has no card")
        show()
        shutil.rmtree(model.work_folder, ignore_errors=True)
        os._exit(1)

    with (
        RandomModel(size, device, compiles=compiles and can_compile(device)) as model,
        budget.ended_by(give_up, after_s=GRACE_S),
    ):
        run_parts(options.parts, model, budget, done=done, report=lambda line: say(f"[{budget.spent_s:5.0f} s] {line}"))
    show()
    return int(any(outcome.status in BAD for outcome in outcomes))


def parse(arguments: Sequence[str] | None, parts: Sequence[Part]) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ", ".join(part.name for part in parts)
    parser.add_argument("--parts", type=partial(_parts, parts), default=parts, help=f"of {names} (all, in this order)")
    parser.add_argument("--minutes", type=float, default=12, help="in all; what takes longer is left out (12)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="(cuda)")
    parser.add_argument("--size", choices=list(SIZES), help="of model and videos (full on a GPU, tiny on a CPU)")
    parser.add_argument("--compile", choices=("auto", "on", "off"), default="auto", help="auto: on a GPU")
    parser.add_argument(
        "--output", type=Path, help="folder of the JSON files (benchmarks/cards, or out/gpu if not full)"
    )
    return parser.parse_args(arguments)


def say(line: str) -> None:
    """Prints a line of progress, beside the table."""
    print(line, file=sys.stderr, flush=True)


def _parts(parts: Sequence[Part], text: str) -> tuple[Part, ...]:
    """The parts of that list of names, in the usual order."""
    names = text.split(",")
    known = {part.name: part for part in parts}
    if unknown := [name for name in names if name not in known]:
        raise argparse.ArgumentTypeError(f"{unknown[0]} is not a part; parts are {', '.join(known)}")
    return tuple(part for part in parts if part.name in names)


if __name__ == "__main__":
    diffusers_logging.set_verbosity_error()
    sys.exit(main())
