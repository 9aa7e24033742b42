"""Blocks of rows between a driver and its actors: every result counts once, soon, whatever is sent again."""

from __future__ import annotations

import dataclasses
import itertools
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from datetime import UTC, datetime

import pyarrow as pa
import pytest

from pia_ray.catalog.actors.blocks import MOST_ROWS, Received, blocks_of, items_in, result_tables
from pia_ray.catalog.result_reader import ResultReader
from pia_ray.catalog.rows.row_threads import RowThreads, in_groups
from pia_ray.errors import JobError, OutputError
from pia_ray.result_row import ResultRow

NULLS = {field.name: None for field in dataclasses.fields(ResultRow)}


def result(number: int) -> ResultRow:
    """A failed row."""
    texts = dict.fromkeys(("id", "status", "image_uri", "params", "work_key", "model", "run_id", "worker"), str(number))
    counts = dict.fromkeys(("video_index", "attempts", "seed"), number)
    return ResultRow(**{**NULLS, **texts, **counts, "finished_at": datetime(2026, 5, 1, tzinfo=UTC)})


def results_of(tables: Sequence[pa.Table]) -> list[int]:
    received = Received()
    return sorted(row.seed for table in tables for row in received.new(table))


def sent(*groups: Sequence[int], again: bool) -> list[pa.Table]:
    """The tables of one call with a block of five items."""
    rows = ([result(number) for number in group] for group in groups)
    return list(result_tables(rows, block_id="block", num_items=5, again=again))


def test_items_keep_their_order_in_blocks_that_are_small_at_the_end() -> None:
    items = pa.table({"row": range(400), "style": ["ink"] * 400})
    blocks = [items_in(block)["row"].to_pylist() for block in blocks_of(items, at_once=10)]
    assert list(itertools.chain(*blocks)) == list(range(400))
    sizes = [len(block) for block in blocks]
    assert sizes[0] == MOST_ROWS
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-20:] == [1] * 20, "what is left when each actor has its last blocks comes one by one"


def test_a_run_of_few_rows_has_blocks_of_one() -> None:
    few = pa.table({"row": range(20), "style": ["ink"] * 20})
    assert [len(items_in(block)) for block in blocks_of(few, at_once=6)] == [1] * 20


def styles_of(blocks: Sequence[pa.Table]) -> list[dict[str, int]]:
    return [dict(Counter(items_in(block)["style"].to_pylist())) for block in blocks]


def test_a_block_has_items_of_one_style_or_of_several_whole_ones() -> None:
    styles = ["default"] * 13 + ["ink"] * 2 + ["oil"] * 5 + ["pen"] * 2 + ["wax"] * 200
    items = pa.table({"row": range(222), "style": pa.chunked_array([styles[:7], styles[7:]])})
    blocks = list(blocks_of(items, at_once=2))
    assert styles_of(blocks)[:4] == [{"default": 8}, {"default": 5}, {"ink": 2, "oil": 5}, {"pen": 2}]
    assert all(block == {"wax": block["wax"]} for block in styles_of(blocks)[4:])
    assert pa.concat_tables(map(items_in, blocks))["row"].to_pylist() == list(range(222))
    assert list(blocks_of(items.slice(0, 0), at_once=2)) == []


def test_many_styles_of_few_items_have_as_few_blocks_as_one_style() -> None:
    items = pa.table({"row": range(1600), "style": [str(number // 2 + 10000) for number in range(1600)]})
    blocks = list(blocks_of(items, at_once=2))
    assert styles_of(blocks)[0] == {str(number + 10000): 2 for number in range(4)}
    assert len(blocks) == len(list(blocks_of(items.set_column(1, "style", pa.array(["ink"] * 1600)), at_once=2)))


def test_each_result_counts_once_whenever_actors_end_and_send_the_block_again() -> None:
    first = sent([0, 1], [2], [3, 4], again=False)
    second = sent([0, 1, 2, 3], [4], again=True)
    third = sent([4], [0], [1], [2], [3], again=True)
    for lost in range(len(first) + 1):
        assert results_of(first[:lost] + second[lost:]) == [0, 1, 2, 3, 4]
        for lost_again in range(lost, len(second) + 1):
            assert results_of(first[:lost] + second[lost:lost_again] + third[lost_again:]) == [0, 1, 2, 3, 4]


def test_results_of_several_blocks_are_told_apart() -> None:
    blocks = [
        list(result_tables([[result(number)]], block_id=str(number), num_items=1, again=True)) for number in (1, 2)
    ]
    received = Received()
    tables = [*blocks[0], *blocks[1], *blocks[0]]
    assert [[row.seed for row in received.new(table)] for table in tables] == [[1], [], [2], [], [], []]


def test_results_that_come_together_travel_together_and_no_result_waits_for_a_slow_one() -> None:
    slow = threading.Event()
    threads = RowThreads(4)
    calls = [lambda: 0, lambda: 1, lambda: 2, lambda: slow.wait(30)]
    groups = in_groups([threads.submit(call) for call in calls], hold_s=lambda: 0.2)
    assert sorted(next(groups)) == [0, 1, 2]
    slow.set()
    assert list(groups) == [[True]]


def test_a_value_that_is_held_back_comes_once_it_is_wanted_soon() -> None:
    threads, slow, hold_s = RowThreads(2), threading.Event(), [60.0]
    groups = in_groups([threads.submit(lambda: 0), threads.submit(lambda: slow.wait(30))], hold_s=lambda: hold_s[0])
    threading.Timer(0.1, hold_s.__setitem__, (0, 0.0)).start()
    assert next(groups) == [0]
    slow.set()
    assert next(groups) == [True]


def test_rows_begin_in_their_order_and_an_error_reaches_the_one_who_waits() -> None:
    begun: list[int] = []
    threads = RowThreads(1)
    futures: list[Future[None]] = [threads.submit(lambda number=number: begun.append(number)) for number in range(9)]
    futures.append(threads.submit(lambda: 1 // 0))
    with pytest.raises(ZeroDivisionError):
        list(in_groups(futures, hold_s=lambda: 0.0))
    assert begun == list(range(9))


def test_results_that_come_while_the_run_writes_are_taken_together_and_an_error_after_them() -> None:
    def results() -> Iterator[Sequence[ResultRow]]:
        yield [result(1)]
        yield [result(2), result(3)]
        raise ValueError("gone")

    reader = ResultReader(results())
    time.sleep(0.1)
    assert [row.seed for row in reader.take(timeout_s=1) or ()] == [1, 2, 3]
    for _ in range(2):
        with pytest.raises(JobError, match="the workers stopped: ValueError: gone"):
            reader.take(timeout_s=1)


def test_an_error_of_ours_that_ends_the_workers_keeps_its_kind() -> None:
    def results() -> Iterator[Sequence[ResultRow]]:
        yield from ()
        raise OutputError("full")

    with pytest.raises(OutputError, match="full"):
        ResultReader(results()).take(timeout_s=1)


def test_the_end_of_the_results_is_told_once_and_again() -> None:
    reader = ResultReader(iter([[result(1)]]))
    assert [row.seed for row in reader.take(timeout_s=1) or ()] == [1]
    assert (reader.take(timeout_s=1), reader.take(timeout_s=1)) == (None, None)
