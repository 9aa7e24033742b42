"""The model: PIA's sampler on diffusers' components. torch and diffusers live here and nowhere else."""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING

from pia_ray import weights
from pia_ray.config.model import ModelConfig
from pia_ray.config.workers import WorkerConfig
from pia_ray.imports import collector_paused

if TYPE_CHECKING:
    from pia_ray.pia.animator import Animator

log = logging.getLogger(__name__)

_imports = threading.Event()

_spent_s: list[float] = []


def imports_torch() -> bool:
    """Whether a thread of this process is in the import of torch and diffusers."""
    return _imports.is_set()


def import_s() -> float:
    """Seconds that the import of torch and diffusers has taken in this process; 0 before it has ended."""
    return max(_spent_s, default=0.0)


def animator_class() -> type[Animator]:
    """The class `Animator`. The first call imports torch and diffusers, for seconds, and logs how long it took."""
    begin = time.perf_counter()
    _imports.set()
    try:
        with collector_paused():
            from pia_ray.pia.animator import (
                Animator,
            )  # torch is for the workers: a driver starts seconds sooner without
    finally:
        _imports.clear()
    _spent_s.append(time.perf_counter() - begin)
    log.info("torch, diffusers and transformers imported in %.1f s", _spent_s[-1])
    return Animator


def make_animator(config: WorkerConfig, cpu_threads: int | None) -> Animator:
    """The animator of a catalogue's worker or an endpoint's engine, its default model loaded and warmed up.

    Raises:
        JobError: the model cannot be loaded, or no row of a size of `warm` can be animated.
    """
    model = _with_judges(config.default_model_config, config)
    # Before torch, whose import takes seconds: what is wrong with the weights is said at once.
    weights.fetch(model)
    animator = animator_class()
    from pia_ray.pia.device.gpu_memory import share_gpu  # after torch's import, which it counts

    share_gpu(config.gpu_share)
    return animator(
        model,
        styles={name: _with_judges(each, config) for name, each in config.style_models.items()},
        keep_models=config.keep_models,
        batch_size=config.batch_size,
        cpu_threads=cpu_threads,
        warm=config.warm_params,
    )


def _with_judges(model: ModelConfig, config: WorkerConfig) -> ModelConfig:
    """The model as it is loaded: without the safety checker where nobody asks for its verdict."""
    return model.model_copy(update={"safety_checker": None}) if config.safety == "off" else model
