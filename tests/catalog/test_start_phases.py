"""The phases of a run's start."""

from __future__ import annotations

from pia_ray.catalog.start_phases import phases_in_words, start_phases


def test_the_phases_of_a_start_come_in_order_and_workers_have_the_rest_of_the_time() -> None:
    engine_s = {"imports": 2.9, "model": 0.3}
    phases = start_phases(planning_s=0.2, opening="Ray", opening_s=2.5, engine_s=engine_s, row_s=1.2, all_s=8.1)
    assert list(phases) == ["planning", "Ray", "workers", "imports", "model", "first row"]
    assert phases["workers"] == 1.0
    assert sum(phases.values()) == 8.1
    words = "planning 0.2 s, Ray 2.5 s, workers 1.0 s, imports 2.9 s, model 0.3 s, first row 1.2 s"
    assert phases_in_words(phases) == words


def test_phases_that_take_no_time_are_left_out() -> None:
    phases = start_phases(planning_s=0.1, opening="model", opening_s=0.0, engine_s={}, row_s=0.4, all_s=0.5)
    assert phases == {"planning": 0.1, "first row": 0.4}
