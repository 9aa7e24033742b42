"""The kinds of forward that are compiled: by what occurs, what is left, and what compilation was measured to gain."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pia_ray.pia.unet.background_compilation import CHECKED, MOST_GRAPHS, PATIENCE, BackgroundCompilation
from pia_ray.pia.unet.compilation import CompiledCode
from pia_ray.pia.unet.compile_costs import CACHED_SHARE, CompileCosts, Cost


class Timed:
    """A stopwatch whose device took so many seconds."""

    def __init__(self, seconds: float, *, ended: bool = True) -> None:
        self.seconds, self.has_ended = seconds, ended


class Stream:
    """Forwards of a model whose kinds take the same time each, compiled and not."""

    def __init__(
        self, *, plain_s: float = 1.0, compiled_s: float = 0.5, ahead: float = math.inf, **how: object
    ) -> None:
        how = {"costs": CompileCosts(Cost(10.0, 2.0)), "start": lambda run: run(), **how}
        self.compilation = BackgroundCompilation(CompiledCode(mode="default", backend="eager"), **how)  # type: ignore[arg-type]
        self.seconds, self.ahead = (plain_s, compiled_s), ahead
        self.compiled: list[str] = []

    def run(self, kind: str, num: int = 1) -> list[bool]:
        """Whether each of so many forwards of that kind ran compiled."""
        found = []
        for _ in range(num):
            ready = self.compilation.is_ready((kind,), lambda: self.compiled.append(kind), ahead=self.ahead)
            self.compilation.add_time((kind,), Timed(self.seconds[ready]), compiled=ready)  # type: ignore[arg-type]
            found.append(ready)
        return found


def test_a_kind_is_compiled_beside_the_stream_once_it_is_seen_often() -> None:
    started: list[Callable[[], None]] = []
    stream = Stream(patience=2, start=started.append, costs=None)
    assert stream.run("often", 5) == [False] * 5
    assert not any(stream.run("rare", 2))
    assert not any(stream.run("other", 4)), "one compiles at a time"
    (run,) = started
    run()
    assert stream.compiled == ["often"]
    assert stream.run("often") == [True]
    assert stream.run("other") == [False]
    started[1]()
    assert stream.run("other") == [True]


def test_a_kind_that_cannot_be_compiled_stays_uncompiled_and_others_go_on(caplog: pytest.LogCaptureFixture) -> None:
    background = Stream(patience=0, costs=None).compilation

    def fails() -> None:
        raise RuntimeError("no compiler")

    assert not background.is_ready(("bad",), fails)
    assert "run uncompiled: RuntimeError: no compiler" in caplog.text
    assert not background.is_ready(("bad",), lambda: None), "it is tried once"
    assert background.is_ready(("good",), lambda: None)


def test_a_kind_is_compiled_later_where_no_thread_could_be_started(caplog: pytest.LogCaptureFixture) -> None:
    started: list[Callable[[], None]] = []

    def start(run: Callable[[], None]) -> None:
        started.append(run)
        if len(started) == 1:
            raise RuntimeError("can't start new thread")
        run()

    stream = Stream(patience=0, start=start, costs=None)
    assert stream.run("kind") == [False]
    assert "run uncompiled for now: can't start new thread" in caplog.text
    assert stream.run("kind") == [True]


@pytest.mark.parametrize(("rows_left", "compiles"), [(0.5, False), (1.0, False), (3.0, True), (math.inf, True)])
def test_a_kind_is_compiled_where_the_forwards_that_are_left_save_more_than_it_takes(
    rows_left: float, compiles: bool
) -> None:
    """A forward of 1 s saves half of it, compilation takes 10 s, and 9 forwards are seen when it is decided."""
    stream = Stream(ahead=rows_left)
    assert any(stream.run("kind", PATIENCE + 2)) == compiles


def test_a_cpu_compiles_nothing_while_nobody_knows_how_many_rows_come() -> None:
    stream = Stream(needs_end=True)
    assert not any(stream.run("kind", 50))
    assert not stream.compilation.is_on
    stream.ahead = 10.0
    assert stream.run("kind") == [True]
    assert stream.compilation.is_on


def test_a_kind_that_is_no_faster_compiled_runs_as_it_is_and_is_not_tried_again() -> None:
    costs = CompileCosts(Cost(10.0, 2.0))
    stream = Stream(plain_s=1.0, compiled_s=1.1, costs=costs)
    stream.run("kind", PATIENCE + 1 + CHECKED)
    assert not any(stream.run("kind", 50))
    assert stream.compiled == ["kind"]
    assert costs.of(("kind",)).gain == pytest.approx(1 / 1.1, abs=0.001)
    assert not any(stream.run("other", 50)), "the other kinds of the model are no faster by what is known"


def test_a_mode_that_is_asked_for_compiles_whatever_it_costs_and_measures_for_those_who_do_not_ask() -> None:
    costs = CompileCosts(Cost(95.0, 1.0))
    assert not any(Stream(costs=costs).run("kind", 50)), "no gain is known"
    asked = Stream(costs=costs, only_what_pays=False, ahead=0.0, plain_s=1.2, compiled_s=1.0)
    assert asked.run("kind", PATIENCE + 1 + CHECKED + 1)[-1]
    assert costs.of(("kind",)).gain == pytest.approx(1.2)
    assert Stream(costs=costs).run("kind", 50)[-1]


def test_timings_that_the_device_has_not_ended_are_not_waited_for() -> None:
    class Waits(Timed):
        def __init__(self) -> None:
            self.has_ended = False

    compilation = Stream().compilation
    for _ in range(200):
        assert not compilation.is_ready(("kind",), lambda: None)
        compilation.add_time(("kind",), Waits(), compiled=False)  # type: ignore[arg-type]


def test_the_kind_that_occurs_least_gives_way_to_one_that_occurs_more_often() -> None:
    stream = Stream(costs=None, most=2)
    stream.run("first", 40)
    stream.run("second", 20)
    assert not any(stream.run("third", 39)), "a kind gives way to one that occurs twice as often"
    assert stream.run("third", 2) == [True, True]
    assert [stream.run(kind)[0] for kind in ("first", "second", "third")] == [True, False, True]


def test_a_kind_that_has_become_rare_gives_way() -> None:
    stream = Stream(costs=None, most=1)
    stream.run("early", 9_000)
    assert any(stream.run("late", 9_000))
    assert stream.run("early") == [False]


def test_as_many_kinds_are_compiled_as_there_is_room_for() -> None:
    stream = Stream(costs=None, patience=0)
    assert sum(stream.run(str(kind))[0] for kind in range(2 * MOST_GRAPHS)) == MOST_GRAPHS


def test_a_warm_up_compiles_each_kind_at_once_whatever_it_costs() -> None:
    stream = Stream(ahead=0.0, start=lambda run: pytest.fail("it must not be left to another thread"))
    with stream.compilation.warming():
        assert stream.run("kind") == [True]
    assert stream.run("other", 50) == [False] * 50


def test_measured_costs_are_kept_for_the_next_process(tmp_path: Path) -> None:
    assumed = Cost(95.0, 1.1)
    first = CompileCosts(assumed, folder=tmp_path, about="model on one CPU")
    assert first.of(("small",)) == assumed
    first.record_seconds(("small",), 40.0)
    first.record_gain(("small",), 1.25)
    CompileCosts(assumed, folder=tmp_path, about="another model").record_seconds(("small",), 7.0)
    again = CompileCosts(assumed, folder=tmp_path, about="model on one CPU")
    assert again.of(("large",)) == Cost(40.0, 1.25), "an unknown kind is taken to be as the known ones"
    assert again.of(("small",)) == Cost(40.0 * CACHED_SHARE, 1.25), "its code is there"
    again.record_seconds(("small",), 6.0)
    third = CompileCosts(assumed, folder=tmp_path, about="model on one CPU")
    assert (third.of(("small",)).compile_s, third.of(("large",)).compile_s) == (6.0, 40.0)
    assert set(json.loads((tmp_path / "costs.json").read_text())) == {"model on one CPU", "another model"}


def test_costs_that_two_parts_of_a_model_measure_at_the_same_time_are_all_kept(tmp_path: Path) -> None:
    parts = [CompileCosts(Cost(95.0, 1.1), folder=tmp_path, about="model on one CPU") for _ in ("unet", "decoder")]
    for part in parts:
        assert part.of(("any",)).compile_s == 95.0  # read before the other has written

    def measure(part: CompileCosts, name: str) -> None:
        for number in range(20):
            part.record_seconds((name, number), 1.0 + number)

    with ThreadPoolExecutor() as pool:
        for measured in [pool.submit(measure, part, name) for part, name in zip(parts, "ab", strict=True)]:
            measured.result()
    again = CompileCosts(Cost(95.0, 1.1), folder=tmp_path, about="model on one CPU")
    assert [again.of((name, 19)).compile_s for name in "ab"] == [20.0 * CACHED_SHARE] * 2
    assert len(json.loads((tmp_path / "costs.json").read_text())["model on one CPU"]["compile_s"]) == 40


@pytest.mark.parametrize("content", [b"damaged", b"[]", b'{"model": 3}', b'{"model": {"gain": {"x": "fast"}}}'])
def test_costs_in_a_damaged_file_are_measured_anew(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "costs.json").write_bytes(content)
    costs = CompileCosts(Cost(95.0, 1.1), folder=tmp_path, about="model")
    assert costs.of(("kind",)) == Cost(95.0, 1.1)
    costs.record_gain(("kind",), 1.3)
    assert costs.of(("kind",)).gain == 1.3
