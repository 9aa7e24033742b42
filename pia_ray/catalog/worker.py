"""The three steps chained for one row, with its attempt record, its retries and its result. Knows no Ray.

An error of a row becomes a failed row; only an error that spoils the process is raised.
"""

from __future__ import annotations

import logging
import threading
import traceback
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Final

from pia_ray import ledger, storage
from pia_ray.animation import Animation, RowAnimator
from pia_ray.catalog import steps
from pia_ray.catalog.outage import Outage, Sources
from pia_ray.config.catalog import CatalogConfig
from pia_ray.errors import (
    Cancelled,
    FetchUnavailable,
    JobError,
    OutOfMemory,
    OutputError,
    OutputUnavailable,
    RowError,
    StorageDenied,
    StorageNotFound,
    StorageThrottled,
    StorageUnavailable,
    UnexpectedError,
    WorkerDied,
)
from pia_ray.manifest import redacted
from pia_ray.types import FAILED, AnimationRequest, ManifestRow, ResultRow

log = logging.getLogger(__name__)

TRANSIENT: Final = (FetchUnavailable, StorageThrottled, StorageUnavailable, OutOfMemory)
"""Errors after which the same worker tries the row again at once; the others wait for `--retry`."""

SOURCE_AWAY: Final = (FetchUnavailable, StorageThrottled, StorageUnavailable)
"""Errors of a row's inputs that may be of all pictures there."""

BACKOFF_S: Final = 1.0
"""Pause before the second try of a row; doubles with each one."""

MOST_BACKOFF_S: Final = 30.0


class CatalogWorker:
    """Animates rows of one run with one warm animator; `work` may be called by several threads at once."""

    def __init__(
        self, config: CatalogConfig, *, run_id: str, animator: RowAnimator, outage: Outage | None = None
    ) -> None:
        self._config = config
        self._run_id = run_id
        self._animator = animator
        self._lock = _RowLock()
        self._outage = outage or Outage()
        self._sources = Sources(patience_s=config.patience_s)
        self._running: set[Future[Animation]] = set()
        self._stopped = threading.Event()

    def work(self, row: ManifestRow) -> ResultRow:
        """The result of the row, whose video is committed before this returns.

        Trouble of the output is not a row's: the row waits for it, and if it stays, comes back with the code of a
        `JobError`, which is no verdict and is not to be recorded.

        Raises:
            JobError: the process is spoiled and needs a new one; the row's attempt record stays behind.
        """
        config = self._config
        try:
            with self._output():
                if (found := steps.committed(row, config)) is not None:
                    return found
                earlier = ledger.earlier_attempts(config.output, row.work_key)
        except Exception as error:  # noqa: BLE001 - the row boundary
            return self._failed(row, _row_error(error), attempts=1)
        # The record is written once the row is let in: a row that only waits must not be charged with a death.
        with self._lock.hold(alone=bool(earlier)):
            return self._attempt(row, earlier)

    def stop(self) -> None:
        """Takes back the rows in the engine, which fail as cancelled at its next step, and begins no others."""
        self._stopped.set()
        for future in tuple(self._running):
            future.cancel()

    def _attempt(self, row: ManifestRow, earlier: tuple[str, ...]) -> ResultRow:
        config, tries = self._config, 0
        # The first death may have been a neighbour's doing; since then the row was alone, and each one was its own.
        if len(earlier) >= max(config.max_attempts, 2):
            died = WorkerDied(
                f"the worker died each of the {len(earlier)} times that this row was tried: check its picture "
                "and size, then run again with --retry worker_died"
            )
            # The records stay until the failure is in the ledger: should this worker die of another row before its
            # answer is out, this row must not be tried all over again.
            return self._failed(row, died, attempts=len(earlier))
        try:
            with self._output():
                attempt = ledger.begin_attempt(config.output, row.work_key, worker=steps.worker_name(), earlier=earlier)
        except Exception as error:  # noqa: BLE001 - the row boundary
            return self._failed(row, _row_error(error), attempts=1)
        alone = attempt.num_earlier > 0
        pause_s = BACKOFF_S
        while True:
            tries += 1
            attempts = attempt.num_earlier + tries
            try:
                outputs = self._make(row, alone=alone, attempts=attempts)
                with self._output(num_animations=1):
                    result = steps.commit(outputs, attempts=attempts)
                break
            except OutputError as error:
                return self._put_off(row, error, attempt)
            except JobError:
                raise  # the process is spoiled: the record stays, and counts against the row
            except Exception as error:  # noqa: BLE001 - the row boundary
                failure = _row_error(error)
            away = isinstance(failure, SOURCE_AWAY) and self._sources.is_away(row)
            if not away and (not isinstance(failure, TRANSIENT) or attempts >= config.max_attempts):
                result = self._failed(row, failure, attempts=attempts)
                break
            tries -= away  # waiting for a host is no try at the row
            log.warning("row %s, try %d: %s", row.id, attempts, failure)
            alone = alone or isinstance(failure, OutOfMemory)
            if self._stopped.wait(pause_s):
                result = self._failed(row, failure, attempts=attempts)
                break
            pause_s = min(MOST_BACKOFF_S, 2 * pause_s)
        if self._stopped.is_set() and result.status == FAILED:
            # Nobody records this failure: the row leaves without a result, and the workers it killed still count.
            ledger.withdraw_attempt(attempt)
        else:
            ledger.end_attempt(attempt)
        return result

    def _put_off(self, row: ManifestRow, error: OutputError, attempt: ledger.AttemptRecord) -> ResultRow:
        """The row without a verdict, because of its output; the workers it killed before still count."""
        with storage.hurry():
            ledger.withdraw_attempt(attempt)
        return self._failed(row, error, attempts=attempt.num_earlier + 1)

    @contextmanager
    def _output(self, *, num_animations: int = 0) -> Iterator[None]:
        """Waits while the output's store is away; so many finished animations wait in memory meanwhile.

        Raises:
            OutputError: the store denies it, or its bucket is gone.
            OutputUnavailable: patience is spent.
        """
        notice = self._outage.notice(num_animations=num_animations)
        try:
            with storage.patience(self._config.patience_s, stopped=self._stopped, notice=notice, from_start=True):
                yield
        except (StorageThrottled, StorageUnavailable) as error:
            raise OutputUnavailable(f"the output {self._config.output} stayed away: {error.message}") from None
        except (StorageDenied, StorageNotFound) as error:
            raise OutputError(f"the output {self._config.output} cannot be used: {error.message}") from None

    def _make(self, row: ManifestRow, *, alone: bool, attempts: int) -> steps.Outputs:
        config = self._config
        fetched = steps.fetch(row, config)
        self._sources.succeeded(row)
        animation = self._animate(steps.request_of(row, fetched, deadline_s=config.row_timeout_s), alone=alone)
        return steps.encode_outputs(
            animation, row, fetched=fetched, config=config, run_id=self._run_id, attempts=attempts
        )

    def _animate(self, request: AnimationRequest, *, alone: bool) -> Animation:
        future = self._animator.submit(request, alone=alone)
        self._running.add(future)
        try:
            if self._stopped.is_set():
                future.cancel()
            return future.result()
        except CancelledError:
            raise Cancelled("the run was stopped") from None
        finally:
            self._running.discard(future)

    def _failed(self, row: ManifestRow, error: RowError | OutputError, *, attempts: int) -> ResultRow:
        log.warning("row %s failed: %s: %s", row.id, error.code, error.message.splitlines()[0])
        return ResultRow.failed(
            error,
            id=row.id,
            video_index=row.video_index,
            work_key=row.work_key,
            image_uri=redacted(row.image),
            params=row.params,
            model=self._animator.version_of(row.params.style),
            run_id=self._run_id,
            worker=steps.worker_name(),
            attempts=attempts,
            finished_at=datetime.now(UTC),
        )


class _RowLock:
    """A lock that the rows of one process hold together, or one row alone.

    A row that was in the engine when its worker died is a suspect: alone it can neither end its neighbours nor be
    charged with what they do. Suspects go first, so that a stream of other rows does not keep them waiting.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._num_holding = 0
        self._held_alone = False
        self._num_suspects = 0

    @contextmanager
    def hold(self, *, alone: bool) -> Iterator[None]:
        """Waits until the row may begin; holds the lock for the block."""
        with self._changed:
            if alone:
                self._num_suspects += 1
                self._changed.wait_for(lambda: not self._num_holding)
                self._num_suspects -= 1
                self._held_alone = True
            else:
                self._changed.wait_for(lambda: not self._held_alone and not self._num_suspects)
            self._num_holding += 1
        try:
            yield
        finally:
            with self._changed:
                self._num_holding -= 1
                self._held_alone = False
                self._changed.notify_all()


def _row_error(error: Exception) -> RowError | OutputError:
    if isinstance(error, RowError | OutputError):
        return error
    text = "".join(traceback.format_exception(error)).strip()
    return UnexpectedError(f"{type(error).__name__}: {error}\n{text}")
