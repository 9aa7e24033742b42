"""The end of every row: what hangs is timed out, a stop lets what denoises end, and only seen deaths are charged."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pia_ray import ledger, manifest, read_results, weights
from pia_ray.animation import Animation, RowAnimator
from pia_ray.catalog.actors.block_calls import BlockCalls
from pia_ray.catalog.actors.blocks import Received, blocks_of
from pia_ray.catalog.actors.kept_results import KeptResults
from pia_ray.catalog.local import run_local
from pia_ray.catalog.progress import Progress, RunSummary
from pia_ray.catalog.rows.attempt_records import AttemptRecords
from pia_ray.catalog.rows.in_flight import InFlight, InFlightRows
from pia_ray.catalog.rows.outage import Outage
from pia_ray.catalog.rows.patient_stages import PatientStages
from pia_ray.catalog.rows.stages import Stages
from pia_ray.catalog.stopping import CONTAINER_GRACE_S, GRACE_S, grace_of
from pia_ray.catalog.worker import CatalogWorker
from pia_ray.config.catalog import CatalogConfig
from pia_ray.config.knobs import AnimationParams
from pia_ray.config.model import build
from pia_ray.errors import DeviceLost, PiaRayError
from pia_ray.testing import FakeAnimator, draw_picture, make_fake
from pia_ray.types import AnimationRequest, ManifestRow
from tests.models import DEMO

STEPS = int(DEMO.defaults["num_inference_steps"])
"""Denoising steps of the demo model."""


def configure(folder: Path, prompts: dict[str, str], **settings: Any) -> CatalogConfig:
    """The config of a run over a row of that id and prompt for each; a picture is drawn where there is none."""
    rows = []
    for number, (name, prompt) in enumerate(prompts.items()):
        path = folder / f"{name}.png"
        if not path.exists():
            path.write_bytes(draw_picture((64, 48), seed=number))
        rows.append({"id": name, "image": path.name, "prompt": prompt})
    pq.write_table(pa.Table.from_pylist(rows), folder / "manifest.parquet")
    values = {"manifest": str(folder / "manifest.parquet"), "output": str(folder / "out"), "model": DEMO, **settings}
    return build(CatalogConfig, values)


def planned(config: CatalogConfig) -> dict[str, ManifestRow]:
    """The work items of the manifest by id."""
    opened = manifest.open_manifest(config)
    tables = manifest.plan(opened, config, model_version=weights.version(config.model))
    rows = [manifest.row_from_item(item) for table in tables for item in table.to_pylist()]
    return {row.id: row for row in rows}


def codes(config: CatalogConfig) -> dict[str, str | None]:
    return {row["id"]: row["error_code"] for row in read_results(config.output).to_pylist()}


def attempts(config: CatalogConfig) -> dict[str, int]:
    return {row["id"]: row["attempts"] for row in read_results(config.output).to_pylist()}


@pytest.fixture
def fifo(tmp_path: Path) -> Iterator[Path]:
    """A FIFO that nobody writes to, so that opening it blocks; its readers are let go at the end."""
    path = tmp_path / "behind.png"
    os.mkfifo(path)
    yield path
    descriptor = os.open(path, os.O_RDWR)  # lets threads that are opening it go on, and read its end
    time.sleep(0.1)
    os.close(descriptor)


# Rows that hang


def test_a_picture_that_cannot_be_opened_ends_as_timeout_and_its_neighbours_succeed(tmp_path: Path, fifo: Path) -> None:
    prompts = {"a": "sea", fifo.stem: "sea", "b": "sky"}
    config = configure(tmp_path, prompts, fetch_timeout_s=0.8, max_attempts=2)
    with FakeAnimator(DEMO) as animator:
        summary = run_local(config, animator=animator)
    assert codes(config) == {"a": None, "behind": "timeout", "b": None}
    assert attempts(config) == {"a": 1, "behind": 2, "b": 1}
    assert summary.exit_code == 1
    assert not ledger.count_attempts(config.output)


class StuckFrames(np.ndarray[Any, Any]):
    """Frames that an encoder never gets at, within the time of a test."""

    released = threading.Event()

    def __getitem__(self, key: Any) -> Any:
        self.released.wait(20)
        return super().__getitem__(key)


class StuckEncoder(FakeAnimator):
    """Gives the row `h` frames over which the encoder hangs."""

    def submit(self, request: AnimationRequest, **how: Any) -> Future[Animation]:
        made = super().submit(request, **how)
        if request.id != "h":
            return made
        future: Future[Animation] = Future()
        animation = made.result()
        future.set_result(replace(animation, frames=animation.frames.view(StuckFrames)))
        return future


def test_an_encoder_that_hangs_ends_by_the_publish_time_limit_and_its_neighbours_succeed(tmp_path: Path) -> None:
    config = configure(tmp_path, {"a": "sea", "h": "sea", "b": "sky"}, publish_timeout_s=3, max_attempts=1)
    with StuckEncoder(DEMO) as animator:
        run_local(config, animator=animator)
    StuckFrames.released.set()
    assert codes(config) == {"a": None, "h": "timeout", "b": None}
    assert attempts(config) == {"a": 1, "h": 1, "b": 1}
    assert not ledger.count_attempts(config.output)


def test_an_engine_that_hangs_over_a_row_is_replaced_and_the_row_ends_as_timeout(tmp_path: Path) -> None:
    prompts = {"a": "sea", "h": "stuck", "b": "sky", "c": "dunes"}
    limits = {"row_timeout_s": 0.5, "hang_timeout_s": 0.3, "max_attempts": 2}
    config = configure(tmp_path, prompts, batch_size=2, **limits)
    summary = run_local(config, make_animator=make_fake)
    assert codes(config) == {"a": None, "h": "timeout", "b": None, "c": None}
    assert attempts(config) == {"a": 1, "h": 2, "b": 1, "c": 1}
    assert summary.progress.errors == {"timeout": 1}


def test_a_row_that_hangs_once_succeeds_at_its_second_try(tmp_path: Path) -> None:
    config = configure(tmp_path, {"h": "stuck-once", "a": "sea"}, row_timeout_s=0.5, hang_timeout_s=0.3)
    (tmp_path / "marks").mkdir()
    assert run_local(config, make_animator=partial(make_fake, marks=tmp_path / "marks")).exit_code == 0
    assert attempts(config) == {"h": 2, "a": 1}


def test_an_engine_that_stands_still_charges_no_row_before_one_hangs_alone(tmp_path: Path) -> None:
    prompts = {"a": "sea", "b": "sky", "h": "stuck-all"}
    limits = {"row_timeout_s": 1, "hang_timeout_s": 0.3, "max_attempts": 1}
    config = configure(tmp_path, prompts, batch_size=3, **limits)
    # All three are in the engine when it stops moving, so nothing says whose doing it is.
    run_local(config, make_animator=partial(make_fake, seconds_per_step=0.05))
    assert codes(config) == {"a": None, "b": None, "h": "timeout"}
    assert attempts(config) == {"a": 1, "b": 1, "h": 1}


def test_an_animator_that_cannot_be_replaced_still_leaves_an_answer_for_each_row(tmp_path: Path) -> None:
    config = configure(tmp_path, {"h": "stuck"}, row_timeout_s=0.3, hang_timeout_s=0.2, max_attempts=1)
    with FakeAnimator(DEMO) as animator:
        run_local(config, animator=animator)
    assert codes(config) == {"h": "timeout"}


def test_an_error_without_a_text_fails_its_row_with_a_reason(tmp_path: Path) -> None:
    class Silent(FakeAnimator):
        def submit(self, *args: Any, **settings: Any) -> Future[Animation]:
            future: Future[Animation] = Future()
            future.set_exception(TimeoutError())
            return future

    config = configure(tmp_path, {"a": "sway"}, max_attempts=1)
    with Silent(DEMO) as animator:
        run_local(config, animator=animator)
    assert codes(config) == {"a": "timeout"}
    assert read_results(config.output)["error_message"].to_pylist() == ["a step of the row did not end in time"]


def test_a_stage_that_hangs_is_left_and_counted_and_its_own_errors_come_through() -> None:
    stages, release = Stages(), threading.Event()
    with pytest.raises(TimeoutError, match=r"encoding the video has not ended within 0\.05 s"):
        stages.call("encoding the video", release.wait, limit_s=0.05)
    assert stages.num_hung == 1
    release.set()
    for _ in range(100):
        if not stages.num_hung:
            break
        time.sleep(0.02)
    assert stages.num_hung == 0

    def fail() -> None:
        raise TimeoutError("of the socket")

    with pytest.raises(TimeoutError, match="of the socket"):
        stages.call("fetching", fail, limit_s=5)
    assert stages.call("fetching", lambda: 7, limit_s=5) == 7


def test_a_stage_whose_caller_has_gone_is_undone_when_it_ends() -> None:
    stages, release, undone = Stages(), threading.Event(), list[bool]()
    with pytest.raises(TimeoutError):
        stages.call("writing", lambda: release.wait(30), limit_s=0.05, undo=undone.append)
    release.set()
    stages.wait_until_undone(timeout_s=30)
    assert stages.call("writing", lambda: False, limit_s=30, undo=undone.append) is False
    assert undone == [True]


# Deaths


def worker(config: CatalogConfig, animator: FakeAnimator, *, run_id: str, **how: Any) -> CatalogWorker:
    return CatalogWorker(config, run_id=run_id, animator=animator, **how)


def leave(config: CatalogConfig, row: ManifestRow, *, times: int = 1, **record: Any) -> None:
    """Leaves records of the row as a worker's process does that ends without a word."""
    for _ in range(times):
        ledger.begin_attempt(config.output, row.work_key, worker="gone", **record)


def test_rows_in_flight_at_four_deaths_of_their_driver_are_not_charged_and_do_not_run_alone(tmp_path: Path) -> None:
    config = configure(tmp_path, {"a": "sea", "b": "sky"})
    for row in planned(config).values():
        leave(config, row, times=4, run_id="a driver that died", alone=True, state="animating")
    alone: dict[str, bool] = {}

    class Watching(FakeAnimator):
        def submit(self, request: AnimationRequest, *, alone: bool = False, **how: Any) -> Future[Animation]:
            asked[request.id] = alone
            return super().submit(request, alone=alone, **how)

    asked = alone
    with Watching(DEMO) as animator:
        assert run_local(config, animator=animator).exit_code == 0
    assert alone == {"a": False, "b": False}
    assert attempts(config) == {"a": 1, "b": 1}
    assert not ledger.count_attempts(config.output)


def test_rows_on_a_node_that_was_lost_three_times_are_not_charged(tmp_path: Path) -> None:
    config = configure(tmp_path, {"a": "sea"})
    row = planned(config)["a"]
    leave(config, row, times=3, run_id="r", node="lost", alone=True, state="animating")
    with FakeAnimator(DEMO) as animator:
        result = worker(config, animator, run_id="r", node_lives=lambda node: node != "lost").work(row)
    assert result is not None
    assert (result.status, result.attempts) == ("succeeded", 1)


def test_a_row_that_waited_when_its_worker_died_runs_alone_uncharged_and_one_in_the_engine_is_charged(
    tmp_path: Path,
) -> None:
    config = configure(tmp_path, {"waited": "sea", "denoised": "sky"})
    rows = planned(config)
    leave(config, rows["waited"], run_id="r", state="waiting")
    leave(config, rows["denoised"], run_id="r", state="animating")
    with FakeAnimator(DEMO) as animator:
        results = [worker(config, animator, run_id="r").work(row) for row in rows.values()]
    assert [result and result.attempts for result in results] == [1, 2]


class Store:
    """The key-value store of a cluster, which outlives its actors."""

    def __init__(self) -> None:
        self._values: dict[str, bytes] = {}

    def put(self, key: str, value: bytes) -> None:
        self._values[key] = value

    def values(self, prefix: str) -> dict[str, bytes]:
        return {key: value for key, value in self._values.items() if key.startswith(prefix)}

    def remove(self, prefix: str) -> None:
        for key in self.values(prefix):
            del self._values[key]


class Unlucky(FakeAnimator):
    """Fails over a row at the take that is its number in `fails`; `late` waits for `endless` where it is set."""

    fails: dict[str, int] = {}  # noqa: RUF012
    endless: Future[Animation] | None = None
    begun: tuple[str, ...] = ()

    def submit(self, request: AnimationRequest, **how: Any) -> Future[Animation]:
        self.begun = (*self.begun, request.id)
        if self.endless is not None and request.id == "late":
            return self.endless
        if self.begun.count(request.id) == self.fails.get(request.id):
            request = replace(request, params=request.params.model_copy(update={"prompt": "nan"}))
        return super().submit(request, **how)


@pytest.mark.parametrize(
    ("settings", "fails"),
    [
        ({}, {"b": 1}),
        ({"provenance": "none"}, {"b": 1}),
        ({"accept": ["flicker<=0"], "retakes": 1}, {"b": 1, "a": 2}),
    ],
)
def test_a_block_that_comes_again_ends_as_before_also_where_no_video_says_how(
    tmp_path: Path, settings: dict[str, Any], fails: dict[str, int]
) -> None:
    config = configure(tmp_path, {"a": "uneven", "b": "uneven", "late": "uneven"}, max_attempts=1, **settings)
    opened = manifest.open_manifest(config)
    items = pa.concat_tables(manifest.plan(opened, config, model_version=weights.version(config.model)))
    block = next(blocks_of(pa.concat_tables([items, items]), at_once=1))
    store, received = Store(), Received()

    def call(animator: FakeAnimator, *, again: bool) -> Iterator[pa.Table]:
        works = worker(config, animator, run_id="r")
        kept = KeptResults(store, run_id="r", all_rows=config.provenance != "full")
        work = lambda item: works.work(manifest.row_from_item(item))  # noqa: E731
        return BlockCalls(work, works.threads(1), kept, again=again)(block)

    with Unlucky(DEMO) as killed, Unlucky(DEMO) as restarted:
        killed.fails, killed.endless = fails, Future()
        results = received.new(next(call(killed, again=False)))
        assert [result.id for result in results] == ["a", "b"]
        results += [result for table in call(restarted, again=True) for result in received.new(table)]
        killed.endless.cancel()
    assert set(restarted.begun) == {"late"}
    assert {result.id: result.error_code for result in results} == {"a": None, "b": "nan_frames", "late": None}
    told = {result.sha256 for result in results if result.video_uri is not None}
    assert {sha256(path.read_bytes()).hexdigest() for path in (tmp_path / "out").rglob("*.mp4")} == told


def test_a_death_that_its_driver_saw_counts_for_later_runs_too(tmp_path: Path) -> None:
    config = configure(tmp_path, {"p": "stuck"}, max_attempts=2, row_timeout_s=60)
    row = planned(config)["p"]
    leave(config, row, run_id="first", state="animating")
    leave(config, row, run_id="first", state="animating", alone=True)
    with FakeAnimator(DEMO) as animator:
        found = worker(config, animator, run_id="first").work(row)
        assert found is not None
        assert (found.error_code, found.attempts) == ("worker_died", 2)
        later = worker(config, animator, run_id="second").work(row)
    assert later is not None
    assert (later.error_code, later.attempts) == ("worker_died", 2)


def test_a_worker_whose_engine_hangs_ends_with_the_row_charged_and_its_neighbour_not(tmp_path: Path) -> None:
    limits = {"row_timeout_s": 1, "hang_timeout_s": 0.5, "max_attempts": 1}
    config = configure(tmp_path, {"h": "stuck", "n": "sea"}, **limits)
    rows = planned(config)
    with FakeAnimator(DEMO, batch_size=2, seconds_per_step=0.9 / STEPS) as animator:
        at_work = worker(config, animator, run_id="r")
        # The neighbour moves while the other hangs, and is still there when the process has to end.
        neighbour = threading.Timer(0.9, at_work.work, args=(rows["n"],))
        neighbour.start()
        with pytest.raises(DeviceLost, match="row h: animating has not ended within 1 s"):
            at_work.work(rows["h"])
        assert ledger.count_attempts(config.output) == {rows["h"].work_key: 1}
        neighbour.join()
        result = worker(config, animator, run_id="r").work(rows["h"])
    assert result is not None
    assert (result.error_code, result.attempts) == ("timeout", 1)
    assert "--retry timeout" in (result.error_message or "")


# Stops


def test_the_record_of_a_row_that_was_stopped_while_it_was_written_is_removed(tmp_path: Path) -> None:
    config = configure(tmp_path, {"a": "sea"})
    row, rows, answer = planned(config)["a"], InFlightRows(hang_timeout_s=60), threading.Event()
    patient = PatientStages(rows.stages, Outage(), config, stopped=threading.Event())
    records = AttemptRecords(config, run_id="r", node="", node_lives=lambda node: True, rows=rows, patient=patient)
    with ThreadPoolExecutor() as pool:
        begun = pool.submit(records.begin, row, lambda: answer.wait(30), starts=True)
        while not ledger.count_attempts(config.output):
            time.sleep(0.01)
        rows.stages.cancel()
        with pytest.raises(CancelledError):
            begun.result(30)
        answer.set()
    rows.stages.wait_until_undone(timeout_s=30)
    records.close(timeout_s=30)
    assert not ledger.count_attempts(config.output)


def stopped(config: CatalogConfig, animator: FakeAnimator, stop: Callable[[], None]) -> RunSummary:
    """A run that is stopped as soon as rows denoise."""
    done = threading.Event()

    def denoises() -> bool:
        try:
            return any(each.state == "animating" for each in records(config))
        except PiaRayError:  # a folder was removed while it was listed
            return False

    def watch() -> None:
        while not done.is_set() and not denoises():
            time.sleep(0.02)
        stop()

    # A shell's background jobs are started with the signal ignored.
    kept = signal.signal(signal.SIGINT, signal.default_int_handler)
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        return run_local(config, animator=animator)
    finally:
        done.set()
        watcher.join()
        signal.signal(signal.SIGINT, kept)


def records(config: CatalogConfig) -> list[ledger.AttemptRecord]:
    found = []
    for key in ledger.count_attempts(config.output):
        found += ledger.earlier_attempts(config.output, key)
    return found


def signal_self() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def slow(tmp_path: Path, **settings: Any) -> CatalogConfig:
    return configure(tmp_path, {str(number): "sea" for number in range(6)}, prefetch=2, batch_size=2, **settings)


def test_a_first_signal_lets_what_denoises_end_and_begins_nothing_new(tmp_path: Path) -> None:
    config = slow(tmp_path, grace_s=30)
    with FakeAnimator(DEMO, batch_size=2, seconds_per_step=1.5 / STEPS) as animator:
        summary = stopped(config, animator, signal_self)
    assert (summary.exit_code, summary.ending) == (130, "interrupted")
    assert set(codes(config).values()) == {None}
    assert summary.progress.num_succeeded == 2, "the two in the engine, and no other"
    assert summary.progress.num_left == 4
    assert not ledger.count_attempts(config.output)
    with FakeAnimator(DEMO) as animator:
        assert run_local(config, animator=animator).exit_code == 0
    assert set(attempts(config).values()) == {1}


def test_a_second_signal_stops_at_once(tmp_path: Path) -> None:
    config = slow(tmp_path, grace_s=600, row_timeout_s=600)

    def twice() -> None:
        signal_self()
        time.sleep(2)  # the system makes one of two signals that come before the first is handled
        signal_self()

    started = time.monotonic()
    with FakeAnimator(DEMO, batch_size=2, seconds_per_step=20) as animator:
        summary = stopped(config, animator, twice)
    assert (summary.exit_code, summary.progress.num_succeeded) == (130, 0)
    assert time.monotonic() - started < 30
    assert not ledger.count_attempts(config.output)


def test_rows_that_denoise_beyond_the_grace_are_given_back(tmp_path: Path) -> None:
    config = configure(tmp_path, {"h": "hang"}, grace_s=0.3)
    with FakeAnimator(DEMO) as animator:
        summary = stopped(config, animator, signal_self)
    assert (summary.exit_code, summary.progress.num_left) == (130, 1)
    assert not ledger.count_attempts(config.output)


def test_a_deadline_lets_what_denoises_end_and_a_run_that_ends_by_it_has_finished(tmp_path: Path) -> None:
    config = slow(tmp_path, grace_s=30, deadline_s=0.01)
    with FakeAnimator(DEMO, batch_size=2, seconds_per_step=0.02) as animator:
        assert run_local(config, animator=animator).exit_code == 4
    last = configure(tmp_path, {"only": "sea"}, grace_s=30)
    with FakeAnimator(DEMO, seconds_per_step=0.8 / STEPS) as animator:
        assert stopped(last, animator, signal_self).exit_code == 0


def test_the_phase_of_a_run_that_stops_is_stopping(tmp_path: Path) -> None:
    config, seen = slow(tmp_path, grace_s=30), list[Progress]()

    def interrupt_once(progress: Progress) -> None:
        seen.append(progress)
        if progress.phase == "animating" and progress.num_succeeded:
            raise KeyboardInterrupt

    with FakeAnimator(DEMO, batch_size=2, seconds_per_step=1.0 / STEPS) as animator:
        assert run_local(config, animator=animator, observe=interrupt_once).exit_code == 130
    phases = list(dict.fromkeys(progress.phase for progress in seen))
    assert phases == ["planning", "starting", "animating", "stopping", "writing", "ended"]


def test_the_grace_is_that_of_the_config_or_of_the_machine() -> None:
    assert grace_of(3.0) == 3.0
    assert grace_of(None) in (CONTAINER_GRACE_S, GRACE_S)
    assert CONTAINER_GRACE_S < 30 < GRACE_S, "a container is killed 30 s after its signal"


def test_only_the_last_try_of_a_row_is_logged_as_its_failure(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = configure(tmp_path, {"a": "oom"}, max_attempts=2)
    with caplog.at_level(logging.INFO), FakeAnimator(DEMO) as animator:
        run_local(config, animator=animator)
    said = [(record.levelname, record.getMessage()) for record in caplog.records if "row a" in record.getMessage()]
    assert [level for level, _ in said] == ["INFO", "WARNING"]
    assert said[0][1].startswith("row a, try 1 of 2: ")
    assert said[1][1].startswith("row a failed: out_of_memory: ")


# The first row


def test_the_first_row_of_a_worker_has_the_engine_to_itself_where_that_is_asked_for(tmp_path: Path) -> None:
    config = configure(tmp_path, {"a": "sea", "b": "sky", "c": "sun"})
    asked: list[bool] = []

    class Watching(FakeAnimator):
        def submit(self, request: AnimationRequest, *, alone: bool = False, **how: Any) -> Future[Animation]:
            asked.append(alone)
            return super().submit(request, alone=alone, **how)

    with Watching(DEMO, batch_size=3) as animator:
        each = worker(config, animator, run_id="r", first_alone=True)
        with ThreadPoolExecutor(3) as pool:
            results = list(pool.map(each.work, planned(config).values()))
        each.stop()  # attempt records are removed after their rows' answers
    assert [result and result.status for result in results] == ["succeeded"] * 3
    assert sorted(asked) == [False, False, True]
    assert not ledger.count_attempts(config.output)


def test_others_have_no_room_while_the_first_row_has_the_engine_and_have_it_afterwards() -> None:
    rows = InFlightRows(hang_timeout_s=60, first_alone=True)
    with FakeAnimator(DEMO, batch_size=3) as animator:
        first, second = InFlight(rows, "a", "ka"), InFlight(rows, "b", "kb")
        with rows.first.turn() as is_first:
            assert is_first
        with rows.first.turn() as is_first:
            assert not is_first
        first.has_room = True
        assert (rows.take_room(first, animator), rows.take_room(second, animator)) == (True, False)
        rows.first.end()
        assert rows.take_room(second, animator)


def test_no_row_comes_to_the_engine_while_the_first_one_is_on_its_way() -> None:
    on_its_way, go_on = threading.Event(), threading.Event()
    asked: list[bool] = []

    class Watching(FakeAnimator):
        def submit(self, request: AnimationRequest, *, alone: bool = False, **how: Any) -> Future[Animation]:
            asked.append(alone)
            return super().submit(request, alone=alone, **how)

    class Recorded(InFlightRows):
        def take_room(self, entry: InFlight, animator: RowAnimator) -> bool:
            if entry.row_id == "a":  # its record is written
                on_its_way.set()
                go_on.wait(60)
            return super().take_room(entry, animator)

    rows = Recorded(hang_timeout_s=60, first_alone=True)
    request = AnimationRequest(Image.new("RGB", (64, 64)), AnimationParams(prompt="sea"))
    with Watching(DEMO, batch_size=2) as animator, ThreadPoolExecutor(2) as pool:
        first = pool.submit(InFlight(rows, "a", "ka").submit, animator, request, alone=False)
        assert on_its_way.wait(60)
        second = pool.submit(InFlight(rows, "b", "kb").submit, animator, request, alone=False)
        time.sleep(0.2)  # the second row would be there by now
        go_on.set()
        assert [each.result(60).result(60).frames.shape[0] for each in (first, second)] == [4, 4]
    assert asked == [True, False]
