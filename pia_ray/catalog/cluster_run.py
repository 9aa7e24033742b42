"""`run_catalog`: a run on Ray. Imports Ray, and Ray Data only while a run's Ray starts, which takes longer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import ray

from pia_ray.catalog.actors.metrics import DriverMetrics
from pia_ray.catalog.progress import RunSummary
from pia_ray.catalog.run import Execute, MakeAnimator, Observer, RunPlan, run
from pia_ray.config.catalog import CatalogConfig
from pia_ray.imports import begin_import
from pia_ray.pia import make_animator
from pia_ray.ray_runtime import connected, require_cluster

if TYPE_CHECKING:
    from pia_ray.catalog.actors.results import Results


def run_catalog(
    config: CatalogConfig,
    *,
    observe: Observer = lambda progress: None,
    make_animator: MakeAnimator = make_animator,
) -> RunSummary:
    """Animates a catalogue over a pool of Ray actors; resumes where an earlier run on this output stopped.

    Uses the Ray this process is connected to; otherwise joins `config.address`, or starts a cluster of its own on
    this machine for the time of the run. `observe` is called with each new `Progress`; `make_animator` makes an actor's
    animator from the config and the number of CPU threads, as `pia_ray.testing.make_fake` does.

    Raises:
        JobError: the run cannot start or go on. Rows that fail are in the results, not raised.
    """
    if config.address is not None and not ray.is_initialized():
        require_cluster(config.address)
    metrics = DriverMetrics()
    return run(config, _execute(make_animator, metrics), observe=metrics.observing(observe))


def _execute(make_animator: MakeAnimator, metrics: DriverMetrics) -> Execute:
    @contextmanager
    def open_rows(plan: RunPlan) -> Iterator[Results]:
        config = plan.config
        worker_cpus = (config.actors or (1, 1))[1] * config.cpus_per_actor
        importing = begin_import("pia_ray.catalog.graph")
        with connected(config.address, worker_cpus=worker_cpus) as own_cluster:
            importing.join()
            from pia_ray.catalog.graph import open_results  # here, so that it is imported while Ray starts

            with open_results(plan, make_animator, metrics, own_cluster=own_cluster) as results:
                yield results

    return open_rows
