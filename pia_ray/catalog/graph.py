"""The Ray Data graph: planned items -> blocks of a few items -> one pool of actors -> thin result rows.

Rows carry no pictures and no frames: an actor does a row's whole work and commits its video before it returns, so a
lost worker costs only what it had in flight. Several blocks overlap inside an actor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Final

import pyarrow as pa
import ray.data
from ray.data import Dataset, TaskPoolStrategy

from pia_ray import ledger, storage
from pia_ray.catalog.actors.actor_pool import ActorPool, no_progress_s, size_pool
from pia_ray.catalog.actors.blocks import blocks_of
from pia_ray.catalog.actors.channel import RunChannel
from pia_ray.catalog.actors.helper_actors import without_helper_actors
from pia_ray.catalog.actors.metrics import DriverMetrics
from pia_ray.catalog.actors.results import Results
from pia_ray.catalog.actors.stages import AnimateRows, ProcessRow
from pia_ray.catalog.actors.start_reports import RunStart
from pia_ray.catalog.run import MakeAnimator, RunPlan
from pia_ray.catalog.settling import on_gpus, settled, versions_of
from pia_ray.config.catalog import CatalogConfig
from pia_ray.pia import make_animator
from pia_ray.ray_runtime import ray_errors, set_up_ray_data_logs


@contextmanager
def open_results(
    plan: RunPlan, make_animator: MakeAnimator, metrics: DriverMetrics, *, own_cluster: bool
) -> Iterator[Results]:
    """The results of the pending rows, by actors on the connected Ray, which end with the block.

    Raises:
        JobError: the actors cannot be set up.
    """
    config = plan.config
    with ExitStack() as stack:
        with ray_errors("the workers cannot be set up"):
            if own_cluster:
                stack.enter_context(without_helper_actors())
            set_up_ray_data_logs()
            pool = size_pool(config, own_cluster=own_cluster)
            stage = {
                "config": on_gpus(config) if pool.num_gpus else config,
                "run_id": plan.run_id,
                "make_animator": make_animator,
                "expected_rows": -(-plan.num_pending // pool.most),
                # On a GPU a lone row is one more kind of forward to compile.
                "first_alone": not pool.num_gpus and config.model.device in ("auto", "cpu"),
            }
            dataset = _animated(plan, pool, stage)
            dataset.context.enable_progress_bars = False
            dataset.context.print_on_execution_start = False
            channel = stack.enter_context(RunChannel(plan.run_id))
            start = stack.enter_context(RunStart(plan.run_id))
            stack.enter_context(metrics.of_run(plan.run_id))
            results = Results(dataset, channel, start)
        if not own_cluster:  # else they end with it
            stack.callback(channel.wait_until_ended)
        stack.callback(results.stop)
        yield results


def build_processor(
    config: CatalogConfig,
    preprocess: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    postprocess: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    *,
    make_animator: MakeAnimator = make_animator,
) -> Callable[[Dataset], Dataset]:
    """A callable Dataset -> Dataset that animates each row, for pipelines of one's own; lazy, as in ray.data.llm.

    What `preprocess` returns is merged over the row, which then needs an image and a prompt and may hold any knob.
    The results columns are added to the row; `postprocess` decides what survives. A row that fails has status
    "failed" and says why; nothing is raised. Videos are committed under `config.output` and found there when a row
    comes again, but planning, results.parquet and the lease are `run_catalog`'s.

    Raises:
        WeightsError: when called, before anything runs: the model, or that of a style, cannot be found.
    """

    def process(dataset: Dataset) -> Dataset:
        pinned = settled(config)
        model_version, style_versions = versions_of(pinned)
        stage = {
            "config": pinned,
            "run_id": ledger.new_run(manifest=", ".join(config.manifests), model=config.model.name).run_id,
            "make_animator": make_animator,
            "model_version": model_version,
            "style_versions": style_versions,
        }
        pool = size_pool(pinned)
        if pool.num_gpus:
            stage["config"] = on_gpus(pinned)
        if preprocess is not None:
            dataset = dataset.map(_Merge(preprocess))
        dataset = _pooled(_one_by_one(dataset), ProcessRow, pool, stage)
        if postprocess is not None:
            dataset = dataset.map(postprocess)
        return dataset

    return process


class _Merge:
    """The row with what `preprocess` returns on top."""

    def __init__(self, preprocess: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        self._preprocess = preprocess

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        return {**row, **self._preprocess(row)}


def _animated(plan: RunPlan, pool: ActorPool, arguments: Mapping[str, Any]) -> Dataset:
    """The results of the run's pending items; these are read where they were planned to, without columns passed on."""
    files = ledger.item_files(plan.items_uri)
    blocks = partial(_blocks_of_file, patience_s=plan.config.patience_s, at_once=pool.most * (pool.calls + 1))
    if len(files) == 1 and plan.num_pending <= _FEW_ROWS:
        # Read by the driver: the process of a task that does takes 1.4 s of CPU time and some seconds to start.
        rows = ray.data.from_blocks(list(blocks(files[0])))
    else:
        # Not by ray.data.read_parquet: for one small file it starts 32 actors that read footers (ray 2.60), 45 s of CPU
        # time on three nodes; a run of six rows took 11 s in place of 6 on two cores.
        listed = ray.data.from_items([{"uri": uri} for uri in files], override_num_blocks=len(files))
        # Two files at once, so that blocks of few items are the last ones of the run too.
        read = partial(_blocks_of_listed, blocks)
        at_once = TaskPoolStrategy(min(_FILES_AT_ONCE, len(files)))
        rows = listed.map_batches(read, batch_format="pyarrow", batch_size=1, compute=at_once)
    dataset = _pooled(rows, AnimateRows, pool, {**arguments, "num_threads": pool.calls})
    dataset.context.target_max_block_size = 1  # no table waits for others to fill a block
    return dataset


_FEW_ROWS: Final = 100
"""Pending rows up to which the driver hands each one to Ray, some milliseconds a row."""

_FILES_AT_ONCE: Final = 2


def _blocks_of_listed(blocks: Callable[[str], Iterator[pa.Table]], files: pa.Table) -> Iterator[pa.Table]:
    (uri,) = files["uri"].to_pylist()
    yield from blocks(uri)


def _blocks_of_file(uri: str, *, patience_s: float, at_once: int) -> Iterator[pa.Table]:
    """The items of one file that this run has to do, style by style, so that an actor rarely changes its model."""
    with storage.patience(patience_s, from_start=True):
        items = ledger.read_item_file(uri, columns=[*ledger.ROW_COLUMNS, "pending"])
    pending = items.filter(items["pending"]).select(list(ledger.ROW_COLUMNS))
    if len(pending["style"].unique()) > 1:
        pending = pending.sort_by("style")
    yield from blocks_of(pending, at_once=at_once)


def _one_by_one(dataset: Dataset) -> Dataset:
    """The same rows in blocks of one."""
    return dataset.repartition(target_num_rows_per_block=1)


def _pooled(rows: Dataset, stage: type, pool: ActorPool, arguments: Mapping[str, Any]) -> Dataset:
    """The results of rows in blocks of one, by the actors of the pool."""
    dataset = rows.map_batches(
        stage,
        batch_size=1,
        batch_format="pyarrow",
        compute=pool.strategy(),
        num_cpus=pool.num_cpus,
        num_gpus=pool.num_gpus,
        fn_constructor_kwargs={**arguments, "cpu_threads": pool.cpu_threads, "num_workers": pool.most},
    )
    context = dataset.context
    context.execution_no_progress_timeout_s = no_progress_s(arguments["config"])
    context.autoscaling_config.actor_pool_util_upscaling_threshold = 1.0
    context.max_consecutive_actor_init_deaths = 2
    return dataset
