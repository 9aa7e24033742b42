"""Blocks: several items on their way to an actor, and several results on their way back, each in one row of Ray Data.

A row of Ray Data costs its driver and Ray some milliseconds each, so that it holds several in bytes.
"""

from __future__ import annotations

import pickle
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

import pyarrow as pa
import pyarrow.compute as pc

from pia_ray.result_row import ResultRow

MOST_ROWS: Final = 8
"""Items of a block at most. A driver that pays for a block what it paid for a row is not the limit then."""

_ENDED_BLOCKS: Final = 4096
"""Ended blocks that are remembered, because an actor may end after its last results and before its call has ended."""


def blocks_of(items: pa.Table, *, at_once: int) -> Iterator[pa.Table]:
    """The items, sorted by style, in blocks of one style or of several whole ones.

    An actor may get its first two blocks in either order, and loads no model twice for it. `at_once` is the number of
    blocks that all actors have at once; they hold half of the items that are left at most. The last blocks have fewer
    items, down to one, so that actors end at the same time.
    """
    ends = [0, *pc.run_end_encode(items["style"].combine_chunks()).run_ends.to_pylist()]
    begin = 0
    while begin < len(items):
        most = begin + max(1, min(MOST_ROWS, (len(items) - begin) // (2 * at_once)))
        first = bisect_right(ends, begin)  # the end of the style of the first item
        last = bisect_right(ends, most) - 1 if ends[first - 1] == begin else first
        end = ends[last] if begin < ends[last] <= most else most
        yield pa.table({"items": pa.array([_packed(items.slice(begin, end - begin))], pa.binary())})
        begin = end


def items_in(block: pa.Table) -> pa.Table:
    """The items of a block."""
    (content,) = block["items"].to_pylist()
    with pa.ipc.open_stream(content) as reader:
        return reader.read_all()


def result_tables(
    groups: Iterable[Sequence[ResultRow]], *, block_id: str, num_items: int, again: bool
) -> Iterator[pa.Table]:
    """The tables for `Received` of a block's results, which come in groups of at least one.

    Of what an actor that was restarted sends `again`, Ray leaves out as many tables as have come before, whatever is in
    them. So each of its tables holds all results until then, and the last one has a number that no first call reaches.
    """
    results: list[ResultRow] = []
    num_tables = 0
    for group in groups:
        results += group
        num_tables += 1
        yield _table(block_id, num_items, results if again else group)
    for _ in range(num_tables, num_items + 1) if again else ():
        yield _table(block_id, num_items, results)


def _table(block_id: str, num_items: int, results: Sequence[ResultRow]) -> pa.Table:
    # As a table of one row per result they took ten times the CPU time, in the actor and in the driver.
    content = pa.array([pickle.dumps(results)], pa.binary())
    return pa.table({"block": [block_id], "items": [num_items], "results": content})


class Received:
    """The results of a run's blocks as they come. What an actor sends again, because it was restarted, counts once."""

    def __init__(self) -> None:
        self._keys: dict[str, set[str]] = {}
        """The work keys of results that have come, of the blocks that have not ended."""
        self._ended: OrderedDict[str, None] = OrderedDict()

    def new(self, table: pa.Table) -> list[ResultRow]:
        """The results of a table of `result_tables` that have not come before."""
        found: list[ResultRow] = []
        for record in table.to_pylist():
            block_id = record["block"]
            if block_id in self._ended:
                continue
            rows: Sequence[ResultRow] = pickle.loads(record["results"])  # noqa: S301 - of this run's actors
            keys = self._keys.setdefault(block_id, set())
            found += [row for row in rows if row.work_key not in keys]
            keys.update(row.work_key for row in rows)
            if len(keys) >= record["items"]:
                self._end(block_id)
        return found

    def _end(self, block_id: str) -> None:
        del self._keys[block_id]
        self._ended[block_id] = None
        if len(self._ended) > _ENDED_BLOCKS:
            self._ended.popitem(last=False)


def _packed(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    content: bytes = sink.getvalue().to_pybytes()
    return content
