"""`Results`: the result rows of a run's actors, as the driver reads them, and the way to stop the actors."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from ray.data import Dataset

from pia_ray.catalog.actors.blocks import Received
from pia_ray.catalog.actors.channel import RunChannel
from pia_ray.catalog.actors.start_reports import RunStart
from pia_ray.catalog.rows.outage import OutageState
from pia_ray.errors import JobError
from pia_ray.ray_runtime import first_cause, ray_errors
from pia_ray.result_row import ResultRow

log = logging.getLogger(__name__)


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
        received = Received()
        try:
            with ray_errors("the workers could not go on"):
                for table in self._dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
                    if rows := received.new(table):
                        yield rows
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
