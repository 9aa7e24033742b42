"""A catalogue by one actor and by two that share the device: videos a second, and how busy engine and GPU are."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from benchmarks.gpu.budget import Budget
from benchmarks.gpu.gpu_use import GpuUse, reader_of
from benchmarks.gpu.part import NotMeasurable, Part, PartCard
from benchmarks.gpu.random_model import Cost, RandomModel
from pia_ray.testing import make_catalog

if TYPE_CHECKING:
    from pia_ray.catalog.progress import Progress, RunSummary
    from pia_ray.config.catalog import CatalogConfig

NEEDED: Final = {"av": "PyAV, which encodes videos", "ray": "Ray, which runs the actors"}


class Observed:
    """The times of a run's first and latest result."""

    def __init__(self) -> None:
        self.first = self.latest = 0.0
        self._done = 0

    def __call__(self, progress: Progress) -> None:
        """Takes each new state of the run."""
        done = progress.num_succeeded + progress.num_failed
        if done > self._done:
            self.latest = time.monotonic()
            self.first = self.first or self.latest
            self._done = done


def measure(model: RandomModel, card: PartCard, budget: Budget) -> None:
    """The time between the first and the last result counts, and nothing is compiled.

    The tiny size runs in this process without Ray, which takes longer to start than its rows.
    """
    missing = [text for name, text in NEEDED.items() if importlib.util.find_spec(name) is None]
    if missing:
        raise NotMeasurable(f"{' and '.join(missing)}, is not installed here")
    if (source := reader_of(model.device)) is None and model.device.type == "cuda":
        card.lines.append("the GPU's own count is not measured: neither NVML nor nvidia-smi gives it here")
    model.free()
    manifest = make_catalog(
        model.work_folder / "catalogue", rows=model.size.job_rows, sizes=[(model.size.side, model.size.side)]
    )
    with runner(model) as run:
        for actors in (1,) if model.size.name == "tiny" else (1, 2):
            config = config_of(model, manifest, actors)
            observed = Observed()
            with contextlib.ExitStack() as stack:
                use = None if source is None else stack.enter_context(GpuUse(source[0]))
                summary = run(config, observed)
                gpu_share = None if use is None else use.between(observed.first, observed.latest)
            show(card, actors, summary, gpu_share)


def show(card: PartCard, actors: int, summary: RunSummary, gpu_share: float | None) -> None:
    """Adds a run to the card."""
    progress = summary.progress
    name = "one actor" if actors == 1 else f"{actors} actors that share the device"
    card.numbers[name] = {
        "videos_per_s": progress.rows_per_s,
        "seconds_with_start": summary.seconds,
        "engine_busy_share": progress.busy_share,
        "gpu_busy_share": gpu_share,
        "errors": dict(summary.errors),
    }
    shares = {"engines": progress.busy_share, "GPU": gpu_share}
    busy = ", ".join(f"{what} busy {share:.0%}" for what, share in shares.items() if share is not None)
    card.lines.append(
        f"{name:30}{progress.rows_per_s:8.3f} videos/s; {busy or 'busy shares not known'}; "
        f"{summary.seconds:.0f} s with the start"
    )
    if summary.exit_code:
        card.problems.append(f"{name}: {dict(summary.errors) or summary.ending}")


def config_of(model: RandomModel, manifest: Path, actors: int) -> CatalogConfig:
    """The run of so many actors, each with its share of the GPU."""
    from pia_ray.config.catalog import CatalogConfig
    from pia_ray.config.model import build

    _ = model.folder
    defaults = {
        "num_frames": model.size.num_frames,
        "num_inference_steps": model.size.steps,
        "guidance_scale": 7.5,
        "width": model.size.side,
        "height": model.size.side,
    }
    on_gpu = model.device.type == "cuda"
    values = {
        "manifest": str(manifest),
        "output": str(model.work_folder / f"output-{actors}"),
        "model": model.config,
        "defaults": defaults,
        "actors": actors,
        "gpus_per_actor": 1 / actors if on_gpu else 0,
        "batch_size": 2,
    }
    return build(CatalogConfig, values)


@contextlib.contextmanager
def runner(model: RandomModel) -> Iterator[Callable[[CatalogConfig, Any], RunSummary]]:
    """The call that runs a catalogue, on a Ray of its own that ends with the context."""
    if model.size.name == "tiny":
        from pia_ray.catalog.local import run_local

        yield lambda config, observe: run_local(config, observe=observe)
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    import ray

    from pia_ray.catalog.graph import run_catalog

    ray.init(
        address="local",
        num_cpus=max(6, os.cpu_count() or 1),
        include_dashboard=False,
        object_store_memory=200 * 2**20,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    try:
        yield lambda config, observe: run_catalog(config, observe=observe)
    finally:
        ray.shutdown()


PART: Final = Part(
    "catalogue",
    "a catalogue by one actor, and by two halves of the device",
    Cost(steps=2 * 8 * 25, loads=4, fixed_s=25),
    measure,
)
