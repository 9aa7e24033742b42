"""`BlockCalls`: an actor's calls with blocks, whose rows several threads work on in their order."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Final

import pyarrow as pa

from pia_ray.catalog.actors.blocks import items_in, result_tables
from pia_ray.catalog.actors.kept_results import KeptResults
from pia_ray.catalog.rows.row_threads import RowThreads, in_groups
from pia_ray.result_row import ResultRow

HOLD_S: Final = 0.9
"""Seconds that an actor of few holds a result back at most, so that others of its block travel with it."""

TABLES_PER_S: Final = 50
"""Tables of results a second that a run's actors send where their rows take long: each costs the driver some 6 ms."""

Item = Mapping[str, Any]


class BlockCalls:
    """The calls of one actor, which several threads make at once. `work` gives the result of an item.

    Whether blocks may come `again`, because the actor was restarted, decides whether their results are looked up.
    Results of one of many workers are held back for longer, but for those of its first block, and while it `drains`.
    """

    def __init__(
        self,
        work: Callable[[Item], ResultRow | None],
        threads: RowThreads,
        kept: KeptResults,
        *,
        again: bool,
        num_workers: int = 1,
        drains: Callable[[], bool] = lambda: False,
    ) -> None:
        self._work = work
        self._threads = threads
        self._kept = kept
        self._again = again
        self._num_workers = num_workers
        self._drains = drains
        self._has_ended_block = False

    def __call__(self, block: pa.Table) -> Iterator[pa.Table]:
        """The results of the block's items as they come, as tables for `Received`."""
        items = items_in(block).to_pylist()
        block_id: str = items[0]["work_key"]
        known = self._kept.of_block(block_id) if self._again else {}
        groups = self._results(items, block_id, known)
        yield from result_tables(groups, block_id=block_id, num_items=len(items), again=self._again)
        self._kept.end_block(block_id)
        self._has_ended_block = True

    def _hold_s(self) -> float:
        if self._drains() or not self._has_ended_block:
            return HOLD_S
        return max(HOLD_S, self._num_workers / TABLES_PER_S)

    def _results(
        self, items: Sequence[Item], block_id: str, known: Mapping[str, ResultRow]
    ) -> Iterator[list[ResultRow]]:
        """The results in groups; never ends where the run's stop has taken an item back."""
        if known:
            yield list(known.values())
        new = [item for item in items if item["work_key"] not in known]
        futures = [self._threads.submit(partial(self._work, item)) for item in new]
        num_ended = 0
        for group in in_groups(futures, hold_s=self._hold_s):
            if ended := [result for result in group if result is not None]:
                num_ended += len(ended)
                self._kept.keep(block_id, ended)
                yield ended
        if num_ended < len(new):
            threading.Event().wait()  # returning would have Ray Data send the next block, and so on to the last
