"""The stages that actors run: a warm worker in each, called with blocks of planned items, or with rows of one's own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import ray

from pia_ray import ledger, logs
from pia_ray.catalog.actors.block_calls import BlockCalls, Item
from pia_ray.catalog.actors.channel import follow_run, node_is_alive
from pia_ray.catalog.actors.kept_results import KeptResults
from pia_ray.catalog.actors.key_values import ClusterKeyValues
from pia_ray.catalog.actors.metrics import WorkerMetrics
from pia_ray.catalog.actors.start_reports import ActorStart
from pia_ray.catalog.rows.state_writer import StateWriter
from pia_ray.catalog.run import MakeAnimator
from pia_ray.catalog.steps import worker_name
from pia_ray.catalog.worker import CatalogWorker
from pia_ray.config.catalog import CatalogConfig
from pia_ray.errors import JobError, RowError
from pia_ray.imports import own_process
from pia_ray.manifest import plan_row, redacted, row_from_item
from pia_ray.ray_runtime import end_process
from pia_ray.result_row import ResultRow

Cells = Mapping[str, Any]
"""One row as Ray Data's `map` sees it: values by column."""


class AnimateRows:
    """One actor of the pool: a warm model, called with blocks of planned items by several threads at once."""

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
        num_threads: int,
    ) -> None:
        self._start = ActorStart(run_id)
        self._worker = _worker(config, run_id, make_animator, cpu_threads, num_workers, first_alone)
        self._worker.animator.expect_rows(expected_rows)
        self._calls = BlockCalls(
            self._result,
            self._worker.threads(num_threads),
            KeptResults(ClusterKeyValues(), run_id=run_id, all_rows=config.provenance != "full"),
            again=ray.get_runtime_context().was_current_actor_reconstructed,
            num_workers=num_workers,
            drains=lambda: self._worker.is_draining,
        )
        self._start.loaded(self._worker.rows)
        follow_run(self._worker, run_id=run_id)
        StateWriter(config.output, lambda: self._worker.state).start()  # until this process ends

    def __call__(self, block: pa.Table) -> Iterator[pa.Table]:
        """The results of the block's items as they come."""
        return self._calls(block)

    def _result(self, item: Item) -> ResultRow | None:
        try:
            result = self._worker.work(row_from_item(item))
        except JobError as error:
            end_process(error)
        self._start.end()
        return result


class ProcessRow:
    """As `AnimateRows`, for rows of a user's own dataset: plans each row, and keeps its own columns."""

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
