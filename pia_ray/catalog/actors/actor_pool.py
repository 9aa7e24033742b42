"""The actors of a run on Ray: how many, and what each reserves of the cluster."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from typing import Final

import ray
from ray.data import ActorPoolStrategy

from pia_ray import weights
from pia_ray.config.catalog import CatalogConfig
from pia_ray.errors import ConfigError
from pia_ray.pia.device.cpu_time import slow_on_cpu

log = logging.getLogger(__name__)

NO_PROGRESS_S: Final = 2 * 3600.0
"""Ray Data ends a run that moves nothing for so long. Its own 30 minutes are short for spot GPUs and cold weights."""

WARM_UP_S: Final = 1200.0
"""Most seconds that a warm-up for one size is taken to last: finding the size of forwards, and compiling two kinds."""


@dataclass(frozen=True)
class ActorPool:
    """The number of actors and the resources that each reserves."""

    least: int
    most: int
    num_cpus: float
    num_gpus: float
    cpu_threads: int
    calls: int
    """Rows in one actor at once: those that denoise together and those that are fetched or published."""

    def strategy(self) -> ActorPoolStrategy:
        """As Ray Data wants it."""
        # One task more than calls, with an upscaling threshold of 1.0: with none waiting a pool never grows.
        return ActorPoolStrategy(
            min_size=self.least,
            max_size=self.most,
            max_tasks_in_flight_per_actor=self.calls + 1,
            max_concurrent_calls_per_actor=self.calls,
            enable_true_multi_threading=True,
        )


def size_pool(config: CatalogConfig, *, own_cluster: bool = False) -> ActorPool:
    """The pool for this config on the connected cluster.

    Raises:
        ConfigError: actors of a cluster of this run's own ask for GPUs that this machine has not. A cluster that was
            joined may still add some.
    """
    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    gpus = int(resources.get("GPU", 0))
    wants = config.gpus_per_actor if config.gpus_per_actor is not None else (1.0 if gpus else 0.0)
    if own_cluster and not gpus and weights.is_full_size(config.model):
        log.warning("%s", slow_on_cpu(os.cpu_count() or 1))
    if not gpus and not own_cluster and config.model.device != "cpu":
        log.warning(
            "the cluster has no GPU now%s",
            "; waiting for some"
            if wants
            else ": running on its CPUs; where it adds GPU nodes on demand give --gpus-per-actor 1",
        )
    if wants and not gpus and own_cluster:
        raise ConfigError(f"--gpus-per-actor {wants:g}: this machine has no GPU that Ray can see; leave it out for CPU")
    if config.actors is not None:
        least, most = config.actors
    else:
        least, most = 1, max(1, int(gpus / wants)) if wants else 1
    cores = os.cpu_count() or 1
    threads = max(1, cores // most) if own_cluster else max(1, int(config.cpus_per_actor))
    return ActorPool(
        least=least,
        most=most,
        num_cpus=config.cpus_per_actor,
        num_gpus=wants,
        cpu_threads=threads,
        calls=config.concurrent_rows(wants),
    )


def no_progress_s(config: CatalogConfig) -> float:
    """Seconds without a result after which Ray Data ends the run: more than a warm-up, a row and an outage may take."""
    row_s = config.fetch_timeout_s + config.row_timeout_s + config.hang_timeout_s + config.publish_timeout_s
    return max(NO_PROGRESS_S, row_s) + config.patience_s + WARM_UP_S * len(config.warm)
