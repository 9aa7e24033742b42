"""`run_local`: the same run in this process, without Ray. Same plan, same steps, same ledger, same table."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any

import pyarrow.compute as pc

from pia_ray import ledger
from pia_ray.animation import RowAnimator
from pia_ray.catalog.run import Execute, Observer, RunPlan, RunSummary, run
from pia_ray.catalog.worker import CatalogWorker
from pia_ray.config.catalog import CatalogConfig
from pia_ray.config.knobs import DEFAULT_STYLE
from pia_ray.manifest import ITEMS_SCHEMA, row_from_item
from pia_ray.pia.animator import Animator
from pia_ray.types import ResultRow


def run_local(
    config: CatalogConfig,
    *,
    animator: RowAnimator | None = None,
    observe: Observer = lambda progress: None,
) -> RunSummary:
    """Animates the catalogue in this process, with threads in place of actors; `config.actors` plays no part.

    Gives the same results table as `run_catalog` but for timings, run ids and worker names. `animator` stands in for
    the configured model, for tests; it stays open. `observe` is called with each new `Progress`.

    Raises:
        JobError: as `run_catalog`.
    """
    return run(config, _execute(animator), observe=observe)


def _execute(animator: RowAnimator | None) -> Execute:
    @contextmanager
    def open_rows(plan: RunPlan) -> Iterator[Iterator[Sequence[ResultRow]]]:
        config = plan.config
        own = None
        if animator is None:
            own = Animator(
                config.model, styles=config.styles, keep_models=config.keep_models, batch_size=config.batch_size
            )
        used = own or animator
        assert used is not None
        calls = config.concurrent_rows() if own is None else own.batch_size + config.prefetch
        worker = CatalogWorker(config, run_id=plan.run_id, animator=used, outage=plan.outage)
        pool = ThreadPoolExecutor(calls, thread_name_prefix="row")
        try:
            yield _rows(worker, plan, pool, calls)
        finally:
            worker.stop()
            pool.shutdown(wait=True, cancel_futures=True)
            if own is not None:
                own.close()

    return open_rows


def _rows(worker: CatalogWorker, plan: RunPlan, pool: ThreadPoolExecutor, calls: int) -> Iterator[Sequence[ResultRow]]:
    running: deque[Future[ResultRow]] = deque()
    for item in _items(plan):
        running.append(pool.submit(worker.work, row_from_item(item)))
        # As many waiting as running, so that no thread is ever idle for want of a row.
        while len(running) >= 2 * calls:
            yield _ended(running)
    while running:
        yield _ended(running)


def _items(plan: RunPlan) -> Iterator[dict[str, Any]]:
    """The pending items style by style, so that each model is loaded once; the ledger is read once for each."""
    for style in (DEFAULT_STYLE, *plan.config.styles):
        for table in ledger.read_items(plan.config.output, plan.run_id, columns=[*ITEMS_SCHEMA.names, "pending"]):
            wanted = pc.and_(table["pending"], pc.equal(table["style"], style))
            yield from table.filter(wanted).select(ITEMS_SCHEMA.names).to_pylist()


def _ended(running: deque[Future[ResultRow]]) -> list[ResultRow]:
    done = wait(running, return_when=FIRST_COMPLETED).done
    for future in done:
        running.remove(future)
    return [future.result() for future in done]
