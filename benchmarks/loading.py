"""Loading Stable Diffusion 1.5 with PIA at full size on a CPU: diffusers' own pipeline against ours, by turns.

Random weights in the layouts that people have, written once. Each load is a process of its own, whose imports do not
count; files are in the page cache. After each load one byte of each page of all weights is read, so that files that
stay mapped count with the time that the system takes to map them.

Prints a card and, last, one JSON line. Run: `.venv/bin/python -m benchmarks.loading [--rounds N] [--ways NAME,...]`
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any, Final, Literal

from benchmarks import card

Layout = Literal["folders", "pipeline", "file"]

WAYS: Final[dict[str, tuple[Layout, str, str]]] = {
    "folders float32 as float32": ("folders", "float32", "float32"),
    "folders float16 as float32": ("folders", "float16", "float32"),
    "folders float16 as float16": ("folders", "float16", "float16"),
    "pipeline float32 as float32": ("pipeline", "float32", "float32"),
    "pipeline float16 as float32": ("pipeline", "float16", "float32"),
    "pipeline float16 as float16": ("pipeline", "float16", "float16"),
    "file float16 as float32": ("file", "float16", "float32"),
    "file float16 as float16": ("file", "float16", "float16"),
}
"""Layout of the base, precision of the files, precision in memory.

folders: Stable Diffusion and a motion adapter. pipeline: a UNet with motion modules, as `PIAPipeline` writes it. file:
a checkpoint in the original layout, and a motion adapter.
"""

SIDES: Final = ("diffusers", "ours")
PAGE: Final = 4096
TILE: Final = 1 << 20


def main(rounds: int, names: list[str], folder: Path) -> None:
    """Loads by turns, so that a slow moment of the machine falls on both."""
    facts = card.machine("torch", "diffusers", "transformers")
    print(f"loading at full size, {rounds} rounds by turns; the least of each, CPU s and s by the clock")
    results: dict[str, Any] = {}
    for name in names:
        layout, stored, dtype = WAYS[name]
        write_weights(folder, stored, layout=layout)
        takes: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
        for turn in range(rounds + 1):
            for side in SIDES:
                took = take(side, folder, layout, stored, dtype)
                if turn:  # the first turn fills the page cache, and computes the digests
                    takes[side].append(took)
        least = {side: {key: min(take[key] for take in takes[side]) for key in takes[side][0]} for side in SIDES}
        ratios = {
            key: statistics.median(ours[key] / theirs[key] for theirs, ours in zip(*takes.values(), strict=True))
            for key in ("cpu_s", "wall_s")
        }
        for side in SIDES:
            print(f"  {name}, {side:9} " + ", ".join(f"{key} {value:.2f}" for key, value in least[side].items()))
        print(f"  ours / diffusers, median: {ratios['cpu_s']:.2f} by CPU s, {ratios['wall_s']:.2f} by the clock")
        results[name] = {"least": least, "ratio": {key: round(value, 3) for key, value in ratios.items()}}
    print(f"  {card.line(facts)}")
    print(json.dumps({"benchmark": "loading", "rounds": rounds, "ways": results, **facts}))


def take(side: str, folder: Path, layout: str, stored: str, dtype: str) -> dict[str, float]:
    """The seconds of one load in a process of its own."""
    words = [sys.executable, "-m", "benchmarks.loading", "--load", side, str(folder), layout, stored, dtype]
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def load(side: str, folder: Path, layout: str, stored: str, dtype: str) -> dict[str, float]:
    """Loads once and touches the weights; returns the seconds."""
    warnings.simplefilter("ignore")
    run = _diffusers if side == "diffusers" else _ours
    before = _times()
    parts = run(folder, layout, stored, dtype, before)
    loaded = _times()
    for part in parts:
        _touch(part)
    ended = _times()
    peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return {
        "cpu_s": round(ended[0] - before[0], 3),
        "wall_s": round(ended[1] - before[1], 3),
        "load_cpu_s": round(loaded[0] - before[0], 3),
        "load_wall_s": round(loaded[1] - before[1], 3),
        "peak_gb": round(peak_gb, 2),
    }


def _diffusers(folder: Path, layout: str, stored: str, dtype: str, before: list[float]) -> list[Any]:
    import torch
    from diffusers import MotionAdapter, PIAPipeline

    before[:] = _times()
    kind = getattr(torch, dtype)
    if layout == "pipeline":
        pipeline = PIAPipeline.from_pretrained(
            folder / f"pipeline-{stored}", motion_adapter=None, torch_dtype=kind, local_files_only=True
        )
        return [pipeline.unet, pipeline.vae, pipeline.text_encoder]
    adapter = MotionAdapter.from_pretrained(folder / f"adapter-{stored}", torch_dtype=kind, local_files_only=True)
    if layout == "folders":
        pipeline = PIAPipeline.from_pretrained(
            folder / f"base-{stored}", motion_adapter=adapter, torch_dtype=kind, local_files_only=True
        )
    else:
        pipeline = PIAPipeline.from_single_file(
            str(folder / f"base-{stored}.safetensors"),
            config=str(folder / "config"),
            motion_adapter=adapter,
            torch_dtype=kind,
            local_files_only=True,
        )
    return [pipeline.unet, pipeline.vae, pipeline.text_encoder]


def _ours(folder: Path, layout: str, stored: str, dtype: str, before: list[float]) -> list[Any]:
    from pia_ray.config.model import ModelConfig
    from pia_ray.pia import animator_class

    animator_class()  # imports as workers do, so that Python's collector leaves the libraries' objects alone
    from pia_ray.pia.loading.load import assemble
    from pia_ray.pia.loading.weight_sharing import WeightPool
    from pia_ray.pia.model_cache import Model
    from pia_ray.weights import resolve

    names = {"folders": "base-{}", "pipeline": "pipeline-{}", "file": "base-{}.safetensors"}
    model = ModelConfig(
        name="random",
        base=str(folder / names[layout].format(stored)),
        motion_adapter=None if layout == "pipeline" else str(folder / f"adapter-{stored}"),
        config=str(folder / "config"),
        device="cpu",
        dtype=dtype,  # type: ignore[arg-type]  # a name of WAYS
    )
    before[:] = _times()
    loaded = Model(assemble(resolve(model), model, WeightPool()))
    parts = loaded.components
    return [parts.unet, parts.vae, parts.text_encoder, loaded]


def _touch(part: Any) -> None:
    if not hasattr(part, "parameters"):
        return
    import torch

    for weight in (*part.parameters(), *part.buffers()):
        storage = weight.untyped_storage()
        torch.empty(0, dtype=torch.uint8).set_(storage)[::PAGE].sum()


def _times() -> list[float]:
    return [time.process_time(), time.perf_counter()]


def write_weights(folder: Path, stored: str, *, layout: Layout) -> None:
    """Writes the base, the adapter and the configs in this precision, unless they are there."""
    if layout == "pipeline":
        if not (whole := folder / f"pipeline-{stored}").exists():
            _pipeline(stored, parts=("unet", "vae", "text_encoder")).save_pretrained(whole)
        return
    base = folder / f"base-{stored}"
    if not base.exists():
        _write_folders(base, folder / f"adapter-{stored}", stored)
    config = folder / "config"
    if not config.exists():
        shutil.copytree(base, config, ignore=shutil.ignore_patterns("*.safetensors"))
    if layout == "file" and not (file := base.with_name(f"{base.name}.safetensors")).exists():
        _write_file(base, file)


def _pipeline(stored: str, *, parts: tuple[str, ...]) -> Any:
    """The pipeline with these parts filled; the others have no memory."""
    import torch

    from pia_ray.testing.checkpoints import random_pipeline

    with torch.device("meta"):
        pipeline = random_pipeline("full", device="meta")
    for name in parts:
        _fill(getattr(pipeline, name), getattr(torch, stored))
    return pipeline


def _write_folders(base: Path, adapter_folder: Path, stored: str) -> None:
    import torch
    from diffusers import MotionAdapter, StableDiffusionPipeline, UNet2DConditionModel

    widths = (320, 640, 1280, 1280)
    pipeline = _pipeline(stored, parts=("vae", "text_encoder"))
    with torch.device("meta"):
        adapter = MotionAdapter(
            block_out_channels=widths, motion_max_seq_length=32, use_motion_mid_block=False, conv_in_channels=9
        )
        unet = UNet2DConditionModel(block_out_channels=widths, cross_attention_dim=768, attention_head_dim=8)
    for part in (unet, adapter):
        _fill(part, getattr(torch, stored))
    StableDiffusionPipeline(
        vae=pipeline.vae,
        text_encoder=pipeline.text_encoder,
        tokenizer=pipeline.tokenizer,
        unet=unet,
        scheduler=pipeline.scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(base)
    adapter.save_pretrained(adapter_folder)


def _write_file(base: Path, file: Path) -> None:
    from safetensors.torch import load_file, save_file

    from pia_ray.testing.original import original_text_encoder, original_unet, original_vae

    weights = "diffusion_pytorch_model.safetensors"
    tensors = original_unet(load_file(base / "unet" / weights), layers_per_block=2)
    tensors |= original_vae(load_file(base / "vae" / weights), prefix="first_stage_model.")
    tensors |= original_text_encoder(load_file(base / "text_encoder" / "model.safetensors"))
    save_file(tensors, file)


def _fill(part: Any, dtype: Any) -> None:
    """Real weights of small values; loading does not depend on them."""
    import torch

    tile = torch.randn(TILE).mul_(0.01).to(dtype)
    part._apply(
        lambda weight: (
            tile.repeat(weight.numel() // TILE + 1)[: weight.numel()].reshape(weight.shape)
            if weight.is_floating_point()
            else torch.zeros(weight.shape, dtype=weight.dtype)
        )
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Times loading at full size.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ways", default=",".join(WAYS), help="some of: " + ", ".join(WAYS))
    parser.add_argument("--folder", type=Path, help="keeps the weights there for the next time")
    parser.add_argument("--load", nargs=5, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.load:
        side, folder, layout, stored, dtype = given.load
        print(json.dumps(load(side, Path(folder), layout, stored, dtype)))
    elif given.folder is not None:
        given.folder.mkdir(parents=True, exist_ok=True)
        main(given.rounds, given.ways.split(","), given.folder.absolute())
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(given.rounds, given.ways.split(","), Path(temporary))
