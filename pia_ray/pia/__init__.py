"""The model: PIA's sampler on diffusers' components. torch and diffusers live here and nowhere else."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from pia_ray import weights
from pia_ray.config.workers import WorkerConfig

if TYPE_CHECKING:
    from pia_ray.pia.animator import Animator

log = logging.getLogger(__name__)


def animator_class() -> type[Animator]:
    """The class `Animator`. The first call imports torch and diffusers, for seconds, and logs how long it took."""
    begin = time.perf_counter()
    from pia_ray.pia.animator import Animator  # torch is for the workers: a driver starts seconds sooner without

    log.info("torch, diffusers and transformers imported in %.1f s", time.perf_counter() - begin)
    return Animator


def make_animator(config: WorkerConfig, cpu_threads: int | None) -> Animator:
    """The animator of a catalogue's worker or an endpoint's engine, its default model loaded.

    Raises:
        JobError: the model cannot be loaded.
    """
    # Before torch, whose import takes seconds: what is wrong with the weights is said at once.
    weights.fetch(config.default_model_config)
    return animator_class()(
        config.default_model_config,
        styles=config.style_models,
        keep_models=config.keep_models,
        batch_size=config.batch_size,
        cpu_threads=cpu_threads,
    )
