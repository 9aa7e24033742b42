"""The size of forwards, found from times that are made up here."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pia_ray.pia.device.batch_tuner import SAMPLES, ForwardTuner


def tune(seconds_of: Callable[[int], float], *, most: int = 16, warm_up_s: float = 0.0) -> ForwardTuner:
    tuner = ForwardTuner(most=most)
    tried: set[int] = set()
    for _ in range(100):
        size = tuner.limit
        tuner.record(size, seconds_of(size) + (0.0 if size in tried else warm_up_s))
        tried.add(size)
    assert tuner.settled
    return tuner


def test_forwards_grow_while_an_evaluation_gets_cheaper() -> None:
    assert tune(lambda size: 10 + size).limit == 16


def test_forwards_stay_small_where_larger_ones_cost_in_proportion() -> None:
    assert tune(lambda size: 1.0 * size).limit == 2


def test_growing_ends_where_an_evaluation_gets_dearer() -> None:
    assert tune({2: 2.0, 4: 3.0, 8: 7.0, 16: 30.0}.__getitem__).limit == 4


@pytest.mark.parametrize("most", [1, 2, 3, 5, 12])
def test_the_bound_is_never_passed(most: int) -> None:
    tuner = ForwardTuner(most=most)
    for _ in range(50):
        assert 1 <= tuner.limit <= most
        tuner.record(tuner.limit, 1.0)


def test_the_first_forward_of_each_size_does_not_count() -> None:
    assert tune(lambda size: 10 + size, warm_up_s=1000.0).limit == 16


def test_forwards_of_other_sizes_tell_nothing() -> None:
    tuner = ForwardTuner(most=8)
    for _ in range(10 * SAMPLES):
        tuner.record(1, 1e-9)
    assert not tuner.settled
    assert tuner.limit == 2


def test_what_memory_does_not_hold_is_not_tried_again() -> None:
    tuner = ForwardTuner(most=16)
    while tuner.limit < 8:
        tuner.record(tuner.limit, 1.0)
    tuner.shrink(4)
    for _ in range(20):
        tuner.record(tuner.limit, 1e-6)
    assert tuner.settled
    assert tuner.limit == 4


def test_room_that_goes_and_comes_back_bounds_forwards_while_it_lasts() -> None:
    tuner = tune(lambda size: 10 + size, most=8)
    tuner.room = 3
    assert tuner.limit == 3
    tuner.room = None
    assert tuner.limit == 8


def test_sizes_that_there_is_no_room_for_are_tried_once_there_is() -> None:
    tuner = ForwardTuner(most=8)
    tuner.room = 2
    while tuner.limit == 2 and not tuner.settled:
        tuner.record(2, 1.0)
    assert tuner.limit == 2
    tuner.room = 8
    assert not tuner.settled
    assert tuner.limit == 4


def test_where_the_start_is_the_bound_there_is_nothing_to_find() -> None:
    tuner = ForwardTuner(most=6, start=6)
    assert tuner.settled
    assert tuner.limit == 6
