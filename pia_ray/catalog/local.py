"""`run_local`: the same run in this process, without Ray. Same plan, same steps, same ledger, same table."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, Final

import pyarrow.compute as pc

from pia_ray import ledger
from pia_ray.animation import RowAnimator
from pia_ray.catalog.progress import RunSummary
from pia_ray.catalog.rows.outage import OutageState
from pia_ray.catalog.rows.row_threads import RowThreads
from pia_ray.catalog.rows.stages import Stages
from pia_ray.catalog.rows.state_writer import StateWriter
from pia_ray.catalog.run import Execute, Observer, RunPlan, run
from pia_ray.catalog.worker import CatalogWorker
from pia_ray.config.catalog import CatalogConfig
from pia_ray.config.knobs import DEFAULT_STYLE
from pia_ray.manifest import row_from_item
from pia_ray.pia import make_animator
from pia_ray.result_row import ResultRow


def run_local(
    config: CatalogConfig,
    *,
    animator: RowAnimator | None = None,
    make_animator: MakeAnimator = make_animator,
    observe: Observer = lambda progress: None,
) -> RunSummary:
    """Animates the catalogue in this process, with threads in place of actors; `config.actors` plays no part.

    Gives the same results table as `run_catalog` but for timings, run ids and worker names. `animator` stands in for
    the configured model, for tests; it stays open. `make_animator` makes one as for `run_catalog`, and another where
    that one hangs. `observe` is called with each new `Progress`.

    Raises:
        JobError: as `run_catalog`.
    """
    return run(config, _execute(animator, make_animator), observe=observe)


MakeAnimator = Callable[[CatalogConfig, None], RowAnimator]
"""Makes the animator from the config; it chooses its CPU threads itself."""

CLOSE_S: Final = 30.0
"""Seconds that the animator has to end. One that hangs is left to its thread, which ends with the process."""


def _execute(animator: RowAnimator | None, make_animator: MakeAnimator) -> Execute:
    @contextmanager
    def open_rows(plan: RunPlan) -> Iterator[_LocalRows]:
        config = plan.config

        def make() -> RowAnimator:
            made = animator or make_animator(config, None)
            made.expect_rows(plan.num_pending)
            return made

        first = make()
        calls = config.concurrent_rows() if animator is not None else first.batch_size + config.prefetch_range[0]
        worker = CatalogWorker(config, run_id=plan.run_id, animator=first, replace_animator=make)
        threads = worker.threads(calls)
        try:
            with StateWriter(config.output, lambda: worker.state):
                yield _LocalRows(worker, plan, threads)
        finally:
            worker.stop()
            threads.close()
            if animator is None:
                with suppress(TimeoutError):
                    Stages().call("closing the animator", worker.animator.close, limit_s=CLOSE_S)

    return open_rows


class _LocalRows:
    """The rows of a run in the threads of this process."""

    def __init__(self, worker: CatalogWorker, plan: RunPlan, threads: RowThreads) -> None:
        self._worker = worker
        self._plan = plan
        self._threads = threads
        self._draining = False

    def __iter__(self) -> Iterator[Sequence[ResultRow]]:
        running: deque[Future[ResultRow | None]] = deque()
        for item in _items(self._plan):
            if self._draining:
                break
            running.append(self._threads.submit(partial(self._worker.work, row_from_item(item))))
            # As many waiting as running, so that no thread is ever idle for want of a row.
            while len(running) >= 2 * self._threads.limit:
                yield _ended(running)
        while running:
            yield _ended(running)

    def drain(self) -> None:
        """Begins no other rows; those in the engine go on to their results."""
        self._draining = True
        self._worker.drain()

    @property
    def start(self) -> str:
        """Empty, because the model was loaded before the rows."""
        return ""

    @property
    def opening(self) -> str:
        """The model, which was loaded before the rows."""
        return "model"

    @property
    def start_s(self) -> dict[str, float]:
        """Empty, because the model was loaded before the rows."""
        return {}

    @property
    def is_drained(self) -> bool:
        """False, because the results end by themselves."""
        return False

    @property
    def outage(self) -> OutageState:
        """The outage of this process."""
        return self._worker.outage


def _items(plan: RunPlan) -> Iterator[dict[str, Any]]:
    """The pending items style by style, so that each model is loaded once; the ledger is read once for each."""
    for style in (DEFAULT_STYLE, *plan.config.styles):
        for table in ledger.read_items(plan.config.output, plan.run_id, columns=[*ledger.ROW_COLUMNS, "pending"]):
            wanted = pc.and_(table["pending"], pc.equal(table["style"], style))
            yield from table.filter(wanted).select(list(ledger.ROW_COLUMNS)).to_pylist()


def _ended(running: deque[Future[ResultRow | None]]) -> list[ResultRow]:
    done = wait(running, return_when=FIRST_COMPLETED).done
    for future in done:
        running.remove(future)
    return [row for future in done if (row := future.result()) is not None]
