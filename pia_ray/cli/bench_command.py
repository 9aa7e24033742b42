"""`pia-ray bench`: the benchmark card, and the card of the presets' quality."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pia_ray.cli.commands import check_writable
from pia_ray.config.model import load_model
from pia_ray.errors import ConfigError
from pia_ray.extras import require

if TYPE_CHECKING:
    from pia_ray.bench.card import Card


def bench_command(args: argparse.Namespace) -> int:
    require("run", purpose="`pia-ray bench`")
    if args.json:
        check_writable(Path(args.json))

    from pia_ray.bench.libraries import silence_libraries

    silence_libraries()
    if args.quality:
        return _bench_quality(args)

    from pia_ray.bench.benchmark import bench, settings_here
    from pia_ray.bench.card import text_of

    batches, offload = _batches(args.batches), _offload(args.offload)
    earlier = Path(args.against) if args.against else None
    if earlier is not None and not earlier.exists():
        raise ConfigError(f"--against: there is no card {earlier}")
    settings = settings_here(
        size=args.size,
        steps=args.steps,
        side=args.side,
        num_frames=args.frames,
        rounds=args.rounds,
        batches=batches,
        dtype=args.dtype,
        verbatim=not args.no_verbatim,
        offload=offload,
    )
    card = bench(settings, report=lambda line: print(line, file=sys.stderr))
    print(text_of(card))
    if earlier is not None:
        _print_differences(card, earlier)
    if args.json:
        Path(args.json).write_text(card.to_json() + "\n", "utf-8")
    print(card.to_json())
    return 0


def _batches(text: str | None) -> tuple[int, ...] | None:
    batches = text.split(",") if text else []
    if not all(number.strip().isdecimal() for number in batches):
        raise ConfigError(f"--batches must be numbers such as 1,2,4 (got {text})")
    return tuple(map(int, batches)) or None


def _offload(text: str | None) -> tuple[str, ...]:
    modes = tuple(filter(None, (text or "").split(",")))
    if not set(modes) <= {"model", "sequential"}:
        raise ConfigError(f"--offload must be model, sequential or both with a comma between (got {text})")
    return modes


def _print_differences(card: Card, earlier: Path) -> None:
    """Prints the changes against an earlier card: this file, or the one of this kind of machine in this folder."""
    from pia_ray.bench.card import differences

    location = earlier / f"{card.kind}.json" if earlier.is_dir() else earlier
    if location.is_file():
        print(f"  against {location}:")
        for line in differences(card, json.loads(location.read_text("utf-8"))):
            print(f"    {line}")
    else:
        print(f"  there is no earlier card of this kind of machine ({location}): --json writes one")


def _bench_quality(args: argparse.Namespace) -> int:
    from pia_ray.bench.quality import QualitySettings, quality, text_of

    settings = QualitySettings(
        steps=QualitySettings.steps if args.steps is None else (args.steps,),
        rows=args.rows,
        num_frames=args.frames,
        side=args.side,
        guidance_scale=args.guidance,
    )
    model = load_model(args.model or "demo")
    if args.dtype != "auto":
        model = model.model_copy(update={"dtype": args.dtype})
    card = quality(model, settings, report=lambda line: print(line, file=sys.stderr))
    print(text_of(card))
    if args.json:
        Path(args.json).write_text(card.to_json() + "\n", "utf-8")
    print(card.to_json())
    return 0
