"""The attempt records of a worker's rows: written before a row's first file is read, removed after its answer."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Final, TypeVar

from pia_ray import ledger, storage
from pia_ray.catalog.rows.in_flight import InFlight, InFlightRows
from pia_ray.catalog.rows.patient_stages import PatientStages
from pia_ray.catalog.steps import worker_name
from pia_ray.config.catalog import CatalogConfig
from pia_ray.types import ManifestRow

REMOVAL_PAUSE_S: Final = 1.0
"""Seconds between two removals: the records of all rows that end meanwhile go in one request."""

T = TypeVar("T")


class AttemptRecords:
    """The records of one worker. `node_lives` says whether a node has not been lost."""

    def __init__(
        self,
        config: CatalogConfig,
        *,
        run_id: str,
        node: str,
        node_lives: Callable[[str], bool],
        rows: InFlightRows,
        patient: PatientStages,
    ) -> None:
        self._output = config.output
        self._limit_s = config.fetch_timeout_s
        self._run_id = run_id
        self._node = node
        self._node_lives = node_lives
        self._rows = rows
        self._patient = patient
        self._ended: list[ledger.AttemptRecord] = []
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._removing: threading.Thread | None = None

    def begin(
        self, row: ManifestRow, read: Callable[[], T], *, starts: bool
    ) -> tuple[T, ledger.AttemptRecord | None, tuple[ledger.AttemptRecord, ...]]:
        """The value of `read`, the row's new record, and those that were there: then it has no new one yet.

        `read` and the record take one answer's time of the store. A row that `starts` as soon as it is fetched is
        charged from now on.

        Raises:
            Exception: what `read` raises; then the new record is removed.
            TimeoutError, CancelledError, OutputError: as `PatientStages.use_output`.
        """
        state: ledger.AttemptState = "animating" if starts else "waiting"

        def both() -> tuple[T, ledger.AttemptRecord | None, tuple[ledger.AttemptRecord, ...]]:
            made: list[ledger.AttemptRecord] = []

            def write() -> None:
                record = ledger.begin_first_attempt(
                    self._output,
                    row.work_key,
                    worker=worker_name(),
                    run_id=self._run_id,
                    node=self._node,
                    state=state,
                )
                made.extend([] if record is None else [record])

            try:
                if storage.is_s3(self._output):
                    value, _ = storage.side_by_side(read, write)
                else:  # a thread costs more than the answer of a local disk
                    write()
                    value = read()
            except Exception:
                self.remove_later(tuple(made))
                raise
            if made:
                return value, made[0], ()
            return value, None, ledger.earlier_attempts(self._output, row.work_key)

        return self._patient.use_output(
            "reading what is there of the row", both, limit_s=self._limit_s, undo=lambda begun: self._withdraw(begun[1])
        )

    def begin_again(self, row: ManifestRow, *, alone: bool) -> ledger.AttemptRecord:
        """The new record of a row that may have others.

        Raises:
            TimeoutError, CancelledError, OutputError: as `PatientStages.use_output`.
        """
        begin = partial(
            ledger.begin_attempt,
            self._output,
            row.work_key,
            worker=worker_name(),
            run_id=self._run_id,
            node=self._node,
            alone=alone,
            # Alone the row is charged from its beginning, because no other row can end the process.
            state="animating" if alone else "waiting",
        )
        return self._patient.use_output(
            "writing the row's attempt record", begin, limit_s=self._limit_s, undo=self._withdraw
        )

    def _withdraw(self, record: ledger.AttemptRecord | None) -> None:
        """Has a record removed that came to be after its row was stopped."""
        self.remove_later(() if record is None else (record,))

    def deaths(self, found: tuple[ledger.AttemptRecord, ...]) -> tuple[list[ledger.AttemptRecord], bool]:
        """The records that count against the row, and whether it has to run alone.

        A record of this run means that its driver lives and has seen the worker's process end, because it sends the
        row again. Records of other runs that nobody has counted were left by the end of their driver. A row that
        waited when its worker died may have entered the engine that moment: it counts once the row alone died, too.
        """
        deaths, suspicions = [], []
        for record in found:
            if record.counts:
                deaths.append(record)
            elif record.run_id == self._run_id and self._node_lives(record.node):
                if record.state == "animating":
                    deaths.append(self._rows.set_state(record, "died"))
                else:
                    suspicions.append(record)
        if any(record.alone for record in deaths):
            return [*suspicions, *deaths], True
        return deaths, bool(suspicions or deaths)

    def remove_own(self, entry: InFlight) -> None:
        """Removes the row's latest record now. The deaths of workers before still count."""
        if entry.record is not None:
            self._rows.remove((entry.record,))

    def remove_later(self, records: tuple[ledger.AttemptRecord, ...]) -> None:
        """Has the records removed, within some seconds, while their row's answer is on its way.

        Where the process ends before, its driver removes those that do not count, and planning those of ended rows.
        """
        with self._lock:
            self._ended.extend(records)
            if records and self._removing is None:
                self._removing = threading.Thread(target=self._remove, name="remove-attempts", daemon=True)
                self._removing.start()

    def close(self, *, timeout_s: float) -> None:
        """Waits until the records of ended rows are removed, or the time is over."""
        self._closing.set()
        if self._removing is not None:
            self._removing.join(timeout_s)

    def _remove(self) -> None:
        while True:
            closing = self._closing.wait(REMOVAL_PAUSE_S)
            with self._lock:
                ended, self._ended = self._ended, []
                if not ended:
                    self._removing = None  # the next one starts another thread
                    return
            self._rows.remove(ended)
            if closing and not self._ended:
                return
