"""The size of forwards, found from times that are made up here."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import pytest

from pia_ray.pia.device.batch_tuner import REMEASURE_S, RETRY_S, SAMPLES, ForwardTuner


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


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def settle(tuner: ForwardTuner, seconds_of: Callable[[int], float]) -> None:
    tuner.reconsider()
    for _ in range(300):
        tuner.record(tuner.limit, seconds_of(tuner.limit))
    assert tuner.settled


@pytest.mark.parametrize("slow_from", range(0, 60, 4))
@pytest.mark.parametrize("pays", [True, False])
def test_a_while_in_which_others_use_the_device_does_not_decide(slow_from: int, pays: bool) -> None:
    tuner, forwards = ForwardTuner(most=4), 0
    while not tuner.settled:
        others = 2.0 if slow_from <= forwards < slow_from + 5 else 1.0
        tuner.record(tuner.limit, others * (10 + tuner.limit if pays else tuner.limit))
        forwards += 1
    assert tuner.limit == (4 if pays else 2)


def test_noise_above_the_gain_decides_wrongly_in_few_of_many_runs() -> None:
    wrong = 0
    for seed in range(100):
        random = Random(seed)
        tuner = ForwardTuner(most=4)
        while not tuner.settled:
            seconds = {2: 2.0, 4: 3.6}[tuner.limit]  # a tenth less per evaluation
            tuner.record(tuner.limit, seconds * random.lognormvariate(0, 0.1))
        wrong += tuner.limit != 4
    assert wrong <= 10


def test_the_size_follows_a_device_that_others_fill_and_leave_again() -> None:
    clock = Clock()
    tuner = ForwardTuner(most=16, clock=clock)
    for seconds_of, expected in [
        (lambda size: 10.0 + size, 16),
        (lambda size: 1.0 * size, 2),
        (lambda size: 10.0 + size, 16),
    ]:
        for _ in range(4):
            clock.now += REMEASURE_S
            settle(tuner, seconds_of)
        assert tuner.limit == expected


def test_a_size_is_not_compared_again_before_its_time() -> None:
    clock = Clock()
    tuner = ForwardTuner(most=8, clock=clock)
    settle(tuner, lambda size: 10.0 + size)
    clock.now += REMEASURE_S - 1
    tuner.reconsider()
    assert tuner.settled


def test_the_size_comes_back_some_time_after_memory_ran_out() -> None:
    clock = Clock()
    tuner = ForwardTuner(most=8, start=8, clock=clock)
    assert tuner.shrink(4) == RETRY_S
    assert tuner.shrink(2) == RETRY_S
    limits = []
    for _ in range(4):
        tuner.reconsider()
        limits.append(tuner.limit)
        clock.now += RETRY_S
    assert limits == [2, 4, 8, 8]


def test_sizes_that_run_out_of_memory_again_are_tried_ever_more_seldom() -> None:
    clock = Clock()
    tuner = ForwardTuner(most=8, start=8, clock=clock)
    tuner.shrink(4)
    failures = 0
    for _ in range(24 * 60):  # a day
        clock.now += 60
        tuner.reconsider()
        if tuner.limit == 8:
            tuner.shrink(4)
            failures += 1
    assert 10 <= failures <= 20


def test_an_out_of_memory_long_after_the_last_starts_with_a_short_wait_again() -> None:
    clock = Clock()
    tuner = ForwardTuner(most=8, start=8, clock=clock)
    tuner.shrink(4)
    clock.now += RETRY_S
    tuner.reconsider()
    assert tuner.shrink(4) == 2 * RETRY_S
    clock.now += 2 * RETRY_S
    tuner.reconsider()
    clock.now += 10 * RETRY_S
    assert tuner.shrink(4) == RETRY_S


def test_halving_twice_in_one_call_doubles_the_wait_once() -> None:
    clock = Clock()
    tuner = ForwardTuner(most=16, start=16, clock=clock)
    tuner.shrink(8)
    clock.now += RETRY_S
    tuner.reconsider()
    assert tuner.shrink(8) == 2 * RETRY_S
    assert tuner.shrink(4) == 2 * RETRY_S


def test_memory_that_runs_out_while_a_size_is_tried_ends_the_comparison() -> None:
    clock = Clock()
    tuner = ForwardTuner(most=8, clock=clock)
    while tuner.limit < 8:
        tuner.record(tuner.limit, 1.0)
    tuner.shrink(4)
    assert tuner.settled
    clock.now += RETRY_S
    settle(tuner, lambda size: 10.0 + size)
    assert tuner.limit == 8


def test_rows_for_the_larger_size_are_wanted_while_the_smaller_one_is_timed() -> None:
    tuner = ForwardTuner(most=8)
    assert (tuner.limit, tuner.largest) == (2, 4)
    tuner.room = 3
    assert tuner.largest == 3
