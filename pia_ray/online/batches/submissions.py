"""The lines of one batch on their way to video jobs: side by side, tried again, each failing by itself."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

from pia_ray.errors import Busy, NotReady, RowError, StorageError
from pia_ray.online.batches.input_file import BatchLine
from pia_ray.online.batches.outcomes import Outcomes
from pia_ray.online.batches.store import Batch, LineTries, Outcome
from pia_ray.online.public_errors import PublicError
from pia_ray.online.video_jobs import VideoJob
from pia_ray.online.video_jobs.creation import LineRequest
from pia_ray.online.video_jobs.document import VIDEO_JOBS

WINDOW: Final = 32
"""Lines of one batch that are video jobs at the same time."""

OWNER_WINDOW: Final = 4 * WINDOW
"""Lines of all batches of one owner that are video jobs at the same time, so that no owner fills the queue's head."""

SIDE_BY_SIDE: Final = 8
"""Lines of one batch whose pictures are fetched and whose jobs are made at the same time."""

MAX_WAITING: Final = 256
"""Lines of one batch that wait for another try; lines behind them are begun when some of these have ended."""

PAUSES_S: Final = (5.0, 30.0, 120.0)
"""Seconds between the tries of a line whose picture's server does not answer; after the last one the line fails."""

STEP_S: Final = 1.0
"""Seconds after which a step ends, although lines are still on their way: the batch's document is written then."""

_ENDPOINTS_OWN: Final = (Busy, NotReady, StorageError)
"""Errors that say nothing about a line: the endpoint cannot take it now. They are not counted as tries."""

_log = logging.getLogger(__name__)

Submit = Callable[[LineRequest], Awaitable[VideoJob]]
"""Makes the video job of a line, or finds the one that was made.

Raises:
    RowError: no job can be made of the body; a retryable one is tried again some times.
"""


@dataclass
class Progress:
    """The lines of a batch during a step. They are written to its document at the step's end."""

    jobs: dict[int, str]
    waiting: dict[int, LineTries]
    next_line: int
    outcomes: list[Outcome] = field(default_factory=list)

    @classmethod
    def of(cls, batch: Batch) -> Progress:
        """The progress that the document holds."""
        return cls(dict(batch.jobs), dict(batch.waiting), batch.next_line)


class Submissions:
    """The lines of one batch whose jobs are being made, from one step to the next."""

    def __init__(self, submit: Submit, *, pauses_s: Sequence[float]) -> None:
        self._submit = submit
        self._pauses_s = pauses_s
        self._tasks: dict[int, asyncio.Task[VideoJob]] = {}

    @property
    def is_busy(self) -> bool:
        """Whether lines are on their way."""
        return bool(self._tasks)

    def is_needed(self, batch: Batch, *, window: int) -> bool:
        """Whether there are lines on their way, to be tried again, or to be begun within the window."""
        is_room = batch.next_line < batch.num_lines and len(batch.jobs) < window
        return bool(self._tasks or batch.waiting) or is_room

    async def advance(
        self, batch: Batch, lines: Sequence[BatchLine], progress: Progress, *, now: float, window: int = WINDOW
    ) -> None:
        """Makes jobs of the lines that are due, until none is left or the step's time is over.

        At most `window` lines are video jobs at the same time.
        """
        deadline = time.monotonic() + STEP_S
        while True:
            self._begin(batch, lines, progress, now, window)
            left_s = deadline - time.monotonic()
            if not self._tasks or left_s <= 0:
                return
            await self._settle(batch, lines, progress, now, timeout_s=left_s)

    async def give_up(
        self, batch: Batch, lines: Sequence[BatchLine], progress: Progress, *, now: float, end: PublicError
    ) -> None:
        """Ends every line that is not a job. A line that is on its way stays, because it may become a job yet."""
        if self._tasks:
            await self._settle(batch, lines, progress, now, timeout_s=STEP_S)
        waiting = [index for index in sorted(progress.waiting) if index not in self._tasks]
        for line in (*(lines[index] for index in waiting), *lines[progress.next_line :]):
            progress.outcomes.append(Outcomes(batch.id, now).given_up(line, end))
            progress.waiting.pop(line.index, None)
        progress.next_line = len(lines)

    async def close(self) -> None:
        """Breaks off what is on its way. Whoever takes the batch over tries these lines again."""
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        self._tasks.clear()

    def _begin(self, batch: Batch, lines: Sequence[BatchLine], progress: Progress, now: float, window: int) -> None:
        for index in self._due(lines, progress, now):
            if len(self._tasks) >= SIDE_BY_SIDE or len(self._tasks) + len(progress.jobs) >= window:
                return
            progress.waiting.setdefault(index, LineTries())
            progress.next_line = max(progress.next_line, index + 1)
            request = LineRequest(
                batch.owner, batch.id, lines[index].body, f"{batch.id}:{index}", _job_id(batch, index)
            )
            self._tasks[index] = asyncio.ensure_future(self._submit(request))

    def _due(self, lines: Sequence[BatchLine], progress: Progress, now: float) -> Iterable[int]:
        """Lines to begin, in order: those whose pause was over as the step began, then new ones."""
        for index, tries in sorted(progress.waiting.items()):
            if index not in self._tasks and tries.not_before < now:
                yield index
        while progress.next_line < len(lines) and len(progress.waiting) < MAX_WAITING:
            yield progress.next_line

    async def _settle(
        self, batch: Batch, lines: Sequence[BatchLine], progress: Progress, now: float, *, timeout_s: float
    ) -> None:
        """Waits for one of the lines, and notes what became of all that are done."""
        await asyncio.wait(self._tasks.values(), timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        for index in [index for index, task in self._tasks.items() if task.done()]:
            task = self._tasks.pop(index)
            tries = progress.waiting.pop(index, LineTries())
            try:
                progress.jobs[index] = task.result().id
            except RowError as error:
                if (again := self._again(tries, error, now)) is not None:
                    _log.info("%s: line %d waits: %s", batch.id, index + 1, error.message)
                    progress.waiting[index] = again
                else:
                    progress.outcomes.append(Outcomes(batch.id, now).of_refusal(lines[index], error))

    def _again(self, tries: LineTries, error: RowError, now: float) -> LineTries | None:
        """The next try of a line; None if the error is final."""
        if not error.retryable:
            return None
        if isinstance(error, _ENDPOINTS_OWN):
            return LineTries(num_failed=tries.num_failed, not_before=now + self._pauses_s[0])
        if tries.num_failed >= len(self._pauses_s):
            return None
        return LineTries(num_failed=tries.num_failed + 1, not_before=now + self._pauses_s[tries.num_failed])


def _job_id(batch: Batch, index: int) -> str | None:
    """The id of a line's job, to be guessed only by who knows the batch's; None where a record of 0.1.0 has it."""
    if not batch.has_line_ids:
        return None
    random_digits = hashlib.sha256(f"{batch.id}:{index}".encode()).hexdigest()
    return VIDEO_JOBS.id_at(int(batch.created_at * 1e6) + index, digits=random_digits)
