"""The Ray Data graph: planned items -> one-row blocks -> one pool of actors -> thin result rows.

Rows carry no pictures and no frames: an actor does a row's whole work and commits its video before it returns, so a
lost worker costs only what it had in flight. Blocks are one row, calls overlap inside an actor.
"""

from __future__ import annotations

import hashlib
import json
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from functools import partial
from typing import Any, Final

import pyarrow as pa
import ray
import ray.data
from ray.data import Dataset

from pia_ray import ledger, logs, storage
from pia_ray.catalog.actors.actor_pool import ActorPool, no_progress_s, size_pool
from pia_ray.catalog.actors.channel import RunChannel, follow_run, node_is_alive
from pia_ray.catalog.actors.metrics import DriverMetrics, WorkerMetrics
from pia_ray.catalog.actors.start_reports import ActorStart, RunStart
from pia_ray.catalog.rows.outage import OutageState
from pia_ray.catalog.rows.state_writer import StateWriter
from pia_ray.catalog.run import MakeAnimator, RunPlan
from pia_ray.catalog.settling import on_gpus, settled, versions_of
from pia_ray.catalog.steps import worker_name
from pia_ray.catalog.worker import CatalogWorker
from pia_ray.config.catalog import CatalogConfig
from pia_ray.errors import JobError, RowError
from pia_ray.imports import own_process
from pia_ray.manifest import plan_row, redacted, row_from_item
from pia_ray.pia import make_animator
from pia_ray.ray_runtime import end_process, first_cause, ray_errors, set_up_ray_data_logs
from pia_ray.result_row import ResultRow

log = logging.getLogger(__name__)

Cells = Mapping[str, Any]
"""One row as Ray Data's `map` sees it: values by column."""


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


def _worker(
    config: CatalogConfig,
    run_id: str,
    make_animator: MakeAnimator,
    cpu_threads: int,
    num_workers: int,
    first_alone: bool = False,
) -> CatalogWorker:
    own_process()
    logs.set_up_worker(config.log, run_id=run_id, worker=worker_name())
    metrics = WorkerMetrics(run_id)
    worker = CatalogWorker(
        config,
        run_id=run_id,
        animator=make_animator(config, cpu_threads),
        node=ray.get_runtime_context().get_node_id(),
        node_lives=node_is_alive,
        on_stage=metrics.end_stage,
        num_workers=num_workers,
        first_alone=first_alone,
    )
    metrics.follow(worker)
    return worker


class AnimateRow:
    """One actor of the pool: a warm model, called by several threads with one planned item each."""

    def __init__(
        self,
        config: CatalogConfig,
        run_id: str,
        make_animator: MakeAnimator,
        first_alone: bool,
        expected_rows: int,
        *,
        cpu_threads: int,
        num_workers: int,
    ) -> None:
        self._start = ActorStart(run_id)
        self._worker = _worker(config, run_id, make_animator, cpu_threads, num_workers, first_alone)
        self._worker.animator.expect_rows(expected_rows)
        self._start.loaded(self._worker.rows)
        follow_run(self._worker, run_id=run_id)
        StateWriter(config.output, lambda: self._worker.state).start()  # until this process ends

    def __call__(self, items: pa.Table) -> pa.Table:
        """One result row per item; never returns for one that the run's stop has taken back."""
        results = []
        for item in items.to_pylist():
            try:
                result = self._worker.work(row_from_item(item))
            except JobError as error:
                end_process(error)
            self._start.end()
            if result is None:
                threading.Event().wait()  # returning would have Ray Data send the next row, and so on to the last
            else:
                results.append(result)
        return ledger.to_table(results)


class ProcessRow:
    """As `AnimateRow`, for rows of a user's own dataset: plans each row, and keeps its own columns."""

    def __init__(
        self,
        config: CatalogConfig,
        run_id: str,
        make_animator: MakeAnimator,
        model_version: str,
        style_versions: Mapping[str, str],
        *,
        cpu_threads: int,
        num_workers: int,
    ) -> None:
        self._config = config
        self._run_id = run_id
        self._model_version = model_version
        self._style_versions = style_versions
        self._worker = _worker(config, run_id, make_animator, cpu_threads, num_workers)

    def __call__(self, rows: pa.Table) -> pa.Table:
        """The same rows with the results columns added or replaced."""
        try:
            results = ledger.to_table([self._result(cells) for cells in rows.to_pylist()])
        except JobError as error:
            end_process(error)
        kept = rows.drop_columns([name for name in rows.column_names if name in results.column_names])
        for field in results.schema:
            kept = kept.append_column(field, results[field.name])
        return kept

    def _result(self, cells: Cells) -> ResultRow:
        try:
            row = plan_row(cells, self._config, model_version=self._model_version, style_versions=self._style_versions)
        except RowError as error:
            raw = json.dumps(dict(cells), sort_keys=True, default=repr)
            return ResultRow.failed(
                error,
                id=str(cells.get(self._config.id_col or "id") or ""),
                work_key=hashlib.sha256(raw.encode()).hexdigest(),
                image_uri=redacted(str(cells.get(self._config.image_col or "image") or "")[:256]),
                params=None,
                model=self._model_version,
                run_id=self._run_id,
                worker=worker_name(),
                attempts=1,
                finished_at=datetime.now(UTC),
            )
        result = self._worker.work(row)
        assert result is not None  # nothing drains the workers of a processor
        return result


class _Merge:
    """The row with what `preprocess` returns on top."""

    def __init__(self, preprocess: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        self._preprocess = preprocess

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        return {**row, **self._preprocess(row)}


def _animated(plan: RunPlan, pool: ActorPool, arguments: Mapping[str, Any]) -> Dataset:
    """The results of the run's pending items; these are read where they were planned to, without columns passed on."""
    files = ledger.item_files(plan.items_uri)
    if len(files) == 1 and plan.num_pending <= _FEW_ROWS:
        # Read by the driver: the process of a task that does takes 1.4 s of CPU time and some seconds to start.
        items = _pending(files[0], patience_s=plan.config.patience_s)
        rows = items.sort_by("style") if plan.config.styles else items
        blocks = ray.data.from_blocks([rows.slice(row, 1) for row in range(len(rows))])
        return _pooled(blocks, AnimateRow, pool, arguments)
    # Not by ray.data.read_parquet: for one small file it starts 32 actors that read footers (ray 2.60), 45 s of CPU
    # time on three nodes; a run of six rows took 11 s in place of 6 on two cores.
    listed = ray.data.from_items([{"uri": uri} for uri in files], override_num_blocks=len(files))
    pending = partial(_pending_of, patience_s=plan.config.patience_s)
    read = listed.map_batches(pending, batch_format="pyarrow", batch_size=1)
    # Style by style, so that an actor rarely changes its model. Blocks of large catalogues still come side by side;
    # what is mixed then the animator's queue sorts out.
    return _pooled(_one_by_one(read.sort("style") if plan.config.styles else read), AnimateRow, pool, arguments)


_FEW_ROWS: Final = 100
"""Pending rows up to which the driver hands each one to Ray, some milliseconds a row."""


def _pending_of(files: pa.Table, *, patience_s: float) -> pa.Table:
    (uri,) = files["uri"].to_pylist()
    return _pending(uri, patience_s=patience_s)


def _pending(uri: str, *, patience_s: float) -> pa.Table:
    """The items of one file that this run has to do."""
    with storage.patience(patience_s, from_start=True):
        items = ledger.read_item_file(uri, columns=[*ledger.ROW_COLUMNS, "pending"])
    return items.filter(items["pending"]).select(list(ledger.ROW_COLUMNS))


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


class Results:
    """Result rows as the actors return them. `stop` ends the actors at once, also while another thread waits here."""

    def __init__(self, dataset: Dataset, channel: RunChannel, start: RunStart) -> None:
        self._dataset = dataset
        self._channel = channel
        self._start = start
        self._executor: Any = None
        self._stopped = False
        dataset.context.custom_execution_callback_classes.append(KeepExecutor)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Sequence[ResultRow]]:
        _this_thread.results = self
        try:
            with ray_errors("the workers could not go on"):
                for table in self._dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
                    yield ledger.from_table(table)
        finally:
            _this_thread.results = None

    def drain(self) -> None:
        """Has the actors begin no other rows; those in an engine go on to their results."""
        self._channel.drain()

    @property
    def is_drained(self) -> bool:
        """Whether no actor has a row left."""
        return self._channel.is_drained

    @property
    def outage(self) -> OutageState:
        """The outage that actors wait out."""
        return self._channel.outage

    @property
    def start(self) -> str:
        """The start of the actors in words."""
        return self._start.text or "workers start"

    @property
    def opening(self) -> str:
        """Ray, with the import of Ray Data beside its start."""
        return "Ray"

    @property
    def start_s(self) -> dict[str, float]:
        """Seconds of the first actor's imports and of the loading of its model."""
        return self._start.seconds

    def keep(self, executor: Any) -> None:
        """Called when the execution of this thread's dataset is about to start."""
        if self._stopped:
            raise JobError("stopped before the workers were there")
        self._executor = executor

    def stop(self) -> None:
        """Ends the execution and its actors; without effect where all results are there."""
        self._stopped = True
        if self._executor is not None:
            try:
                self._executor.shutdown(force=True)
            except Exception as error:  # noqa: BLE001 - a Ray that is gone has no workers left
                log.warning("the workers could not be stopped: %s", first_cause(error))


_this_thread = threading.local()
"""`results`: the `Results` that this thread is reading."""


class KeepExecutor:
    """A callback of Ray Data that gives `Results` its executor; Ray Data makes it and sends it to workers.

    Closing the iterator is the public way to stop, but only between two results, and a Dataset has no executor before
    its first one: on a cluster that outlives the run the actors would animate on. May go when Dataset can be cancelled.
    """

    def before_execution_starts(self, executor: Any) -> None:
        """Called by the thread that asks for the first result."""
        if (results := getattr(_this_thread, "results", None)) is not None:
            results.keep(executor)

    def on_execution_step(self, executor: Any) -> None:
        """Drops the statistics of blocks that are done. Ray Data keeps them to the end of an execution (ray 2.60).

        Blocks of one row would cost the driver 2.6 KB a row; without them its memory stays as it is.
        """
        for operator in executor._topology or ():
            getattr(operator, "_output_blocks_stats", []).clear()

    def after_execution_succeeds(self, executor: Any) -> None:
        """Nothing."""

    def after_execution_fails(self, executor: Any, error: Exception) -> None:
        """Nothing."""
