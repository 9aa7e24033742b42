"""Decides which results of a run are recorded, and when their failures end it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from pia_ray.config.catalog import CatalogConfig
from pia_ray.errors import (
    FetchUnavailable,
    InputChanged,
    JobError,
    TooManyFailures,
    UnexpectedError,
    row_errors,
    run_errors,
)
from pia_ray.formatting import count_of
from pia_ray.result_row import SUCCEEDED, ResultRow

ROWS_IN_A_ROW: Final = 20
"""So many failures with one code, and no success between them, stop a run."""

_RUN_ERRORS: Final = run_errors()
# A catalogue may name many pictures in a row of one dead host, or replaced ones. They cost no GPU and are tried again.
_SUSPECT: Final = (
    frozenset(code for code, kind in row_errors().items() if kind.fault == "world") | {UnexpectedError.code}
) - {FetchUnavailable.code, InputChanged.code}


def judged(rows: Sequence[ResultRow]) -> list[ResultRow]:
    """The rows that have ended; the others were put off because of the run's own trouble."""
    return [row for row in rows if row.error_code not in _RUN_ERRORS]


class Verdicts:
    """Takes results in the order in which they come.

    Failures that may not be the rows' own wait here until a success shows that others can do better. Where none comes,
    the run stops and nothing of them is recorded.
    """

    def __init__(self, config: CatalogConfig, *, num_pending: int) -> None:
        self._most = config.most_failures(num_pending)
        self._asked = config.max_failures
        self._num_failed = 0
        self._held: list[ResultRow] = []
        self.stop: JobError | None = None
        """The reason to stop, once there is one."""

    def take(self, rows: Sequence[ResultRow]) -> list[ResultRow]:
        """The results to record now."""
        ready: list[ResultRow] = []
        for row in rows:
            if (kind := _RUN_ERRORS.get(row.error_code or "")) is not None:
                self.stop = self.stop or kind(row.error_message or "")
                continue
            if row.status == SUCCEEDED:
                ready += [*self.held(), row]
                continue
            self._num_failed += 1
            if row.error_code not in _SUSPECT:
                ready.append(row)
                continue
            if self._held and self._held[0].error_code != row.error_code:
                ready += self.held()
            self._held.append(row)
        self.stop = self.stop or self._verdict()
        return ready

    def held(self) -> list[ResultRow]:
        """The results that waited, which are recorded at the end of a run that was not stopped for them."""
        held, self._held = self._held, []
        return held

    def _verdict(self) -> JobError | None:
        if len(self._held) >= ROWS_IN_A_ROW:
            last = self._held[-1]
            return TooManyFailures(
                f"{len(self._held)} rows in a row failed with {last.error_code}, and none succeeded between them; they "
                f"are not recorded as failed. The last one, {last.id}: {(last.error_message or '').splitlines()[0]}"
            )
        if self._num_failed > self._most:
            return TooManyFailures(
                f"{count_of(self._num_failed, 'row')} failed, more than --max-failures {self._asked} allows: "
                "see the results"
            )
        return None
