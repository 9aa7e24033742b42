"""Catalogues on a real local Ray cluster, one for this file: every item ends once, whoever dies, as without Ray."""

from __future__ import annotations

import base64
import gc
import itertools
import json
import os
import re
import signal
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import ray.data
import torch
from ray import cloudpickle
from ray.data.block import BlockStats

from pia_ray import Animator, build_processor, ledger, read_results, storage
from pia_ray.animation import Animation
from pia_ray.catalog.actors.actor_pool import no_progress_s, size_pool
from pia_ray.catalog.actors.channel import RunChannel, follow_run
from pia_ray.catalog.cluster_run import run_catalog
from pia_ray.catalog.local import run_local
from pia_ray.catalog.progress import Progress
from pia_ray.catalog.rows.outage import NO_OUTAGE, OutageState
from pia_ray.config.catalog import CatalogConfig
from pia_ray.config.model import build
from pia_ray.errors import JobError
from pia_ray.testing import FakeAnimator, draw_picture, make_catalog, make_fake, make_pipeline_folder
from pia_ray.types import AnimationRequest
from tests.chaos_proxy import ChaosProxy, chaos
from tests.models import DEMO
from tests.processes import alive
from tests.ray_head import without_monitors
from tests.s3_server import s3_server
from tests.videos import decode_frames

__all__ = ["chaos", "s3_server"]  # fixtures

pytestmark = [
    pytest.mark.heavy,
    # Ray Data sets its own deprecated settings whenever it makes a context.
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context"),
    # Ray leaves pipes and log files of the processes it started to the garbage collector.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # actors import what they use of this module, not all of it

# The record inside a video holds the timings, so its bytes differ as they do.
TIMINGS = {"fetch_s", "animate_s", "publish_s", "gpu_s", "finished_at", "run_id", "worker", "sha256", "size_bytes"}
URIS = ("video_uri", "thumbnail_uri", "input_thumbnail_uri")


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """A cluster with more CPUs than there are and two GPUs that are none: both are counted, not touched."""
    with without_monitors():
        ray.init(
            address="local",
            num_cpus=4,
            num_gpus=2,
            include_dashboard=False,
            log_to_driver=False,
            object_store_memory=200 * 2**20,
            logging_level="ERROR",
            _system_config={"metrics_report_interval_ms": 2000},
        )
    yield
    ray.shutdown()
    gc.collect()  # here Ray's sockets may be left to it, elsewhere a warning of them is an error


def configure(manifest: Path | str, output: Path, **settings: Any) -> CatalogConfig:
    values = {"model": DEMO, "gpus_per_actor": 0, **settings}
    return build(CatalogConfig, {"manifest": str(manifest), "output": str(output), **values})


def write(folder: Path, prompts: dict[str, str]) -> Path:
    """A manifest with a row of that id and prompt for each, and its picture."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number, (name, prompt) in enumerate(prompts.items()):
        (folder / f"{name}.png").write_bytes(draw_picture((64, 48), seed=number))
        rows.append({"id": name, "image": f"{name}.png", "prompt": prompt})
    path = folder / "manifest.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def by_id(config: CatalogConfig) -> dict[str, dict[str, Any]]:
    return {row["id"]: row for row in read_results(config.output).to_pylist()}


def begun(log: Path) -> list[dict[str, Any]]:
    """What the fake animators began, in order: id and pid."""
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def comparable(config: CatalogConfig) -> list[dict[str, Any]]:
    """The results but for timings, with URIs from the output's root."""
    rows = read_results(config.output).to_pylist()
    for row in rows:
        for name in URIS:
            row[name] = row[name] and str(row[name]).removeprefix(config.output)
    return [{name: value for name, value in row.items() if name not in TIMINGS} for row in rows]


def videos(config: CatalogConfig) -> dict[str, np.ndarray[Any, Any]]:
    """Decoded frames by id, of the rows that succeeded."""
    return {
        name: decode_frames(Path(row["video_uri"])).astype(np.int16)
        for name, row in by_id(config).items()
        if row["status"] == "succeeded"
    }


def test_actors_tell_the_driver_what_is_away_and_which_animations_wait() -> None:
    class Waiting:
        """An actor whose worker waits out an outage."""

        num_in_flight = 2

        def __init__(self, run_id: str) -> None:
            self.outage = NO_OUTAGE
            follow_run(self, run_id=run_id)

        def wait_for(self, state: OutageState) -> None:
            self.outage = state

        def drain(self) -> None:
            self.num_in_flight = 0

    actors = [ray.remote(num_cpus=0)(Waiting).remote("a run") for _ in range(2)]

    def told(number: int) -> OutageState:
        for _ in range(100):
            if channel.outage.num_animations == number:
                break
            time.sleep(0.1)
        return channel.outage

    with RunChannel("a run") as channel:
        assert told(0) == NO_OUTAGE
        ray.get([actor.wait_for.remote(OutageState("the store", "it answers 503", 2)) for actor in actors])
        assert told(4) == OutageState("the store", "it answers 503", 4)
        ray.get([actor.wait_for.remote(NO_OUTAGE) for actor in actors])
        assert told(0) == NO_OUTAGE
    for actor in actors:
        ray.kill(actor)


def test_run_local_and_ray_give_the_same_table_of_good_broken_and_bad_rows(tmp_path: Path) -> None:
    manifest = make_catalog(tmp_path, rows=12, broken=0.25)
    table = pq.read_table(manifest)
    scales = pa.array([9 if row == 4 else row % 3 for row in range(12)], pa.int8())
    prompts = pa.array(["oom" if row == 5 else f"picture {row}" for row in range(12)])
    table = table.set_column(3, "motion_scale", scales).set_column(2, "prompt", prompts)
    pq.write_table(table, manifest)
    here, there = (configure(manifest, tmp_path / name, max_attempts=1) for name in ("local", "ray"))
    with FakeAnimator(DEMO) as animator:
        local = run_local(here, animator=animator)
    summary = run_catalog(there, make_animator=make_fake)
    assert Counter(row["status"] for row in comparable(here))["failed"] == 5
    assert comparable(there) == comparable(here)
    expected, made = videos(here), videos(there)
    assert expected.keys() == made.keys()
    assert all(np.array_equal(expected[name], made[name]) for name in made)
    assert read_results(there.output).schema == read_results(here.output).schema
    assert (summary.exit_code, summary.progress.errors) == (local.exit_code, local.progress.errors)
    assert ray.is_initialized(), "a cluster that was there before the run stays"


def test_the_genuine_engine_makes_the_same_frames_on_ray_as_without(tmp_path: Path) -> None:
    folder = make_pipeline_folder(tmp_path / "model")
    defaults = {"num_inference_steps": 2, "num_frames": 4}
    model = {"base": str(folder), "name": "tiny", "device": "cpu", "long_edge": 64, "defaults": defaults}
    manifest = make_catalog(tmp_path, rows=4)
    # One row at a time: the encoder makes much of the last bit, in which rows that are packed otherwise may differ.
    here, there = (configure(manifest, tmp_path / name, model=model, batch_size=1) for name in ("local", "ray"))
    threads = torch.get_num_threads()
    with Animator(here.model, batch_size=1, cpu_threads=1) as animator:
        assert run_local(here, animator=animator).exit_code == 0
    torch.set_num_threads(threads)
    assert run_catalog(there).exit_code == 0
    tables = comparable(here), comparable(there)
    motions = [[row.pop("motion") for row in table] for table in tables]
    scores = [
        [row.pop(name) for row in table for name in sorted(row) if isinstance(row[name], float)] for table in tables
    ]
    assert tables[0] == tables[1]
    # Each process times its operators and may choose others, which differ in the last bit. Thresholds make much of it.
    assert scores[0] == pytest.approx(scores[1], rel=1e-3)
    assert motions[0] == pytest.approx(motions[1], abs=0.02)
    expected, made = videos(here), videos(there)
    assert expected.keys() == made.keys()
    # Of frames that are noise, the encoder keeps other details for another last bit; other frames would be 60 apart.
    assert max(np.abs(expected[name] - made[name]).mean() for name in made) < 5


def test_rows_that_finished_before_their_worker_is_killed_are_not_animated_again(tmp_path: Path) -> None:
    config = configure(make_catalog(tmp_path, rows=14), tmp_path / "out", batch_size=2, prefetch=1)
    log, killed = tmp_path / "log", dict[str, Any]()

    def kill_once(progress: Progress) -> None:
        if progress.num_succeeded >= 6 and not killed:
            killed["pid"] = begun(log)[-1]["pid"]
            os.kill(killed["pid"], signal.SIGKILL)

    slow = partial(make_fake, log=log, seconds_per_step=0.02)
    summary = run_catalog(config, make_animator=slow, observe=kill_once)
    assert summary.progress.num_succeeded == 14
    assert {row["status"] for row in by_id(config).values()} == {"succeeded"}
    times = Counter(line["id"] for line in begun(log))
    assert len(times) == 14
    again = {name for name, number in times.items() if number > 1}
    assert len(again) <= config.concurrent_rows(), "only what was in flight begins again"
    # A row may have been in the engine, then finished, but not committed when the kill came: twice, never more.
    assert max(times.values()) <= 2
    # A row that died in flight runs alone the second time, and says so.
    assert {row["attempts"] for name, row in by_id(config).items() if name in again} <= {2}
    assert not ledger.count_attempts(config.output) or ledger.count_attempts(config.output).total() <= 3


def test_a_row_that_kills_its_worker_fails_alone_and_its_neighbours_succeed(tmp_path: Path) -> None:
    prompts = {f"n{number}": "sea" for number in range(9)} | {"poison": "die", "unlucky": "die-once"}
    # In the first handful of the run, so that they have neighbours when they die.
    order = ["n0", "poison", "n1", "unlucky", *(f"n{number}" for number in range(2, 9))]
    manifest = write(tmp_path, {name: prompts[name] for name in order})
    config = configure(manifest, tmp_path / "out", batch_size=4, max_attempts=3)
    log, marks = tmp_path / "log", tmp_path / "marks"
    marks.mkdir()
    summary = run_catalog(config, make_animator=partial(make_fake, log=log, marks=marks, seconds_per_step=0.01))
    found = by_id(config)
    failed = {name: row["error_code"] for name, row in found.items() if row["status"] == "failed"}
    assert failed == {"poison": "worker_died"}
    assert len(found) == len(prompts)
    assert summary.progress.errors == {"worker_died": 1}
    times = Counter(line["id"] for line in begun(log))
    # Once in company, whoever killed the worker then, and alone from the second time on.
    assert found["poison"]["attempts"] == 3
    assert times["poison"] <= 3
    assert "--retry worker_died" in found["poison"]["error_message"]
    # A bystander can be in hand at one death in company; after that it is alone.
    assert max(times[name] for name in found if name not in ("poison", "unlucky")) <= 2
    assert run_catalog(config, make_animator=make_fake).progress.num_pending == 0


class OneOfTwo(FakeAnimator):
    """A fake whose rows from the fourth on wait until another actor's is there too."""

    there: Path
    num_rows = 0

    def submit(self, request: AnimationRequest, **how: Any) -> Future[Animation]:
        """As a fake, for three rows, and again from the moment on that there are two."""
        self.num_rows += 1
        deadline = time.monotonic() + 120
        while self.num_rows > 3 and len(list(self.there.iterdir())) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        return super().submit(request, **how)


def make_one_of_two(config: CatalogConfig, cpu_threads: int, *, there: Path, log: Path | None = None) -> OneOfTwo:
    assert config.model.device == "cuda", "a worker with a GPU must not fall back to its CPU"
    animator = OneOfTwo(config.model, batch_size=config.batch_size, seconds_per_step=0.02, log=log)
    animator.there = there
    (there / str(os.getpid())).touch()
    return animator


def test_more_actors_than_there_are_gpus_wait_two_share_the_rows_and_one_that_has_none_left_is_released(
    tmp_path: Path,
) -> None:
    manifest = write(tmp_path, {**{f"n{number}": "sea" for number in range(16)}, "long": "hang"})
    limits = {"row_timeout_s": 20, "max_attempts": 1}
    settings = {"actors": 3, "gpus_per_actor": 1, "batch_size": 1, "prefetch": 0, **limits}
    config = configure(manifest, tmp_path / "out", **settings)
    (tmp_path / "there").mkdir()
    log, released = tmp_path / "log", list[bool]()

    def observe(progress: Progress) -> None:
        if progress.num_left == 1:
            released.append(not all(alive(line["pid"]) for line in begun(log)))

    make = partial(make_one_of_two, there=tmp_path / "there", log=log)
    assert run_catalog(config, make_animator=make, observe=observe).progress.errors == {"timeout": 1}
    shares = Counter(line["pid"] for line in begun(log))
    assert len(shares) == 2
    assert min(shares.values()) >= 4
    assert any(released), "while the other goes on"


def test_a_pool_grows_from_its_least_to_its_most_with_a_gpu_that_comes_during_a_run(tmp_path: Path) -> None:
    other = ray.remote(num_gpus=1)(Holder).remote()
    ray.get(other.hold.remote())
    settings = {"actors": "1:2", "gpus_per_actor": 1, "batch_size": 1, "prefetch": 0}
    config = configure(make_catalog(tmp_path, rows=16), tmp_path / "out", **settings)
    (tmp_path / "there").mkdir()
    freed: list[int] = []

    def observe(progress: Progress) -> None:
        if progress.num_succeeded >= 3 and not freed:
            freed.append(progress.num_succeeded)
            ray.kill(other)

    make = partial(make_one_of_two, there=tmp_path / "there")
    assert run_catalog(config, make_animator=make, observe=observe).exit_code == 0
    assert len({row["worker"] for row in by_id(config).values()}) == 2


class Holder:
    """Another user's actor, which has a GPU."""

    def hold(self) -> None:
        """Returns once it has it."""


@pytest.mark.parametrize("setting", ["patience_s", "row_timeout_s", "publish_timeout_s"])
def test_a_run_without_a_result_is_not_ended_before_its_own_limits(tmp_path: Path, setting: str) -> None:
    assert 2 * 3600 <= no_progress_s(configure("m.parquet", tmp_path)) < 3 * 3600
    assert no_progress_s(configure("m.parquet", tmp_path, **{setting: 86400})) > 86400


def test_the_pool_is_one_actor_per_gpu_unless_said_otherwise(tmp_path: Path) -> None:
    config = configure("m.parquet", tmp_path, gpus_per_actor=None)
    pool = size_pool(config)
    assert (pool.least, pool.most, pool.num_gpus) == (1, 2, 1.0)
    assert pool.calls == config.concurrent_rows(1.0) > config.concurrent_rows(), "enough rows for the largest forwards"
    shared = size_pool(configure("m.parquet", tmp_path, gpus_per_actor=0.5))
    assert (shared.most, shared.num_gpus) == (4, 0.5)
    assert size_pool(configure("m.parquet", tmp_path)).most == 1


def test_a_model_that_no_actor_can_load_ends_the_run_in_the_words_of_its_own_error(tmp_path: Path) -> None:
    def fail(config: CatalogConfig, cpu_threads: int) -> FakeAnimator:
        raise RuntimeError("the driver is too old;\nget another") from KeyError("an earlier cause")

    config = configure(make_catalog(tmp_path, rows=2), tmp_path / "out")
    with pytest.raises(JobError) as caught:
        run_catalog(config, make_animator=fail)
    words = "the workers could not go on: RuntimeError: the driver is too old; get another"
    assert caught.value.message.startswith(words)
    assert "File" not in caught.value.message
    assert (tmp_path / "out" / "results.parquet").exists()


def test_a_deadline_stops_the_actors_of_a_cluster_that_lives_on(tmp_path: Path) -> None:
    manifest = write(tmp_path, {**{f"n{number}": "sea" for number in range(3)}, "h": "hang", "i": "hang"})
    log, num_succeeded = tmp_path / "log", 0
    for deadline_s in (8, 16, 32, 64):  # the first that leaves time for three rows, however slow the machine is
        config = configure(manifest, tmp_path / "out", batch_size=4, deadline_s=deadline_s, grace_s=0)
        at_end = list[bool]()

        def observe(progress: Progress, at_end: list[bool] = at_end) -> None:
            if progress.phase == "writing":
                at_end.append(any(alive(line["pid"]) for line in begun(log)))

        summary = run_catalog(config, make_animator=partial(make_fake, log=log), observe=observe)
        assert summary.exit_code == 4
        assert not any(at_end), "an actor that goes on would write to an output that the run has left"
        assert not ledger.count_attempts(config.output), "a row that was stopped has not killed its worker"
        num_succeeded += summary.progress.num_succeeded
        if num_succeeded == 3:
            break
    assert num_succeeded == 3


def test_a_run_says_what_its_actors_do_and_a_stop_lets_what_denoises_end_and_begins_nothing_new(tmp_path: Path) -> None:
    config = configure(make_catalog(tmp_path, rows=10), tmp_path / "out", batch_size=2, prefetch=1, grace_s=60)
    log, ended_at, starts = tmp_path / "log", time.monotonic() + 300, set()
    stopped: list[int] = []

    def stop_once(progress: Progress) -> None:
        starts.add(progress.start)
        if progress.num_succeeded and not stopped:
            stopped.append(len(begun(log)))
            raise KeyboardInterrupt

    summary = run_catalog(config, make_animator=partial(make_fake, log=log, seconds_per_step=0.4), observe=stop_once)
    assert summary.exit_code == 130
    assert time.monotonic() < ended_at
    assert any(start.startswith("the first row denoises, step ") for start in starts), starts
    assert Counter(line["id"] for line in begun(log)) == dict.fromkeys(by_id(config), 1), "each that began has ended"
    assert 2 <= summary.progress.num_succeeded <= stopped[0] + 2 < 10, "two may begin while the stop is on its way"
    assert not ledger.count_attempts(config.output)
    assert run_catalog(config, make_animator=make_fake).exit_code == 0
    assert {row["attempts"] for row in by_id(config).values()} == {1}


def test_an_actor_whose_engine_hangs_is_replaced_and_only_the_row_that_hung_is_charged(tmp_path: Path) -> None:
    prompts = {**{f"n{number}": "sea" for number in range(4)}, "h": "stuck", "m": "sea"}
    limits = {"row_timeout_s": 3, "hang_timeout_s": 1, "max_attempts": 2}
    config = configure(write(tmp_path, prompts), tmp_path / "out", batch_size=2, prefetch=1, **limits)
    assert run_catalog(config, make_animator=partial(make_fake, log=tmp_path / "log")).exit_code == 1
    found = by_id(config)
    assert {name: row["error_code"] for name, row in found.items() if row["error_code"]} == {"h": "timeout"}
    assert {name: row["attempts"] for name, row in found.items() if row["attempts"] > 1} == {"h": 2}
    assert len({line["pid"] for line in begun(tmp_path / "log") if line["id"] == "h"}) == 2


def rows_for(folder: Path, names: list[str]) -> list[dict[str, Any]]:
    return [
        {"key": name, "picture": draw_picture((64, 48), seed=number), "note": {"n": number}}
        for number, name in enumerate(names)
    ]


def test_a_processor_animates_rows_of_a_dataset_lazily_and_only_once(tmp_path: Path) -> None:
    log = tmp_path / "log"
    config = configure("", tmp_path / "out")
    (tmp_path / "there.png").write_bytes(draw_picture((64, 48), seed=9))
    rows = rows_for(tmp_path, ["a", "b", "c", "d"])
    rows[1]["picture"] = b"\0no picture"
    process = build_processor(
        config,
        preprocess=lambda row: {
            "id": row["key"],
            "image": row["picture"],
            "prompt": "sea",
            "motion_scale": 9 if row["key"] == "d" else 1,
        },
        postprocess=lambda row: {
            "key": row["key"],
            "n": row["note"]["n"],
            **{name: row[name] for name in ("status", "error_code", "video_uri", "seed", "worker")},
        },
        make_animator=partial(make_fake, log=log),
    )
    before = ray.data.DataContext.get_current().copy()
    dataset = process(ray.data.from_items(rows, override_num_blocks=1))
    assert not begun(log)
    assert ray.data.DataContext.get_current() == before
    made = {row["key"]: row for row in dataset.take_all()}
    codes = {name: (row["status"], row["error_code"]) for name, row in made.items()}
    assert codes == {
        "a": ("succeeded", None),
        "b": ("failed", "unsupported_image"),
        "c": ("succeeded", None),
        "d": ("failed", "bad_parameter"),
    }
    assert [made[name]["n"] for name in "abcd"] == [0, 1, 2, 3]
    assert Path(made["a"]["video_uri"]).stat().st_size > 0
    again = {
        row["key"]: row for row in process(ray.data.from_items([rows[0], rows[2]], override_num_blocks=1)).take_all()
    }
    assert again["a"]["video_uri"] == made["a"]["video_uri"]
    assert Counter(line["id"] for line in begun(log)) == {"a": 1, "c": 1}


def test_a_processor_keeps_the_columns_of_rows_with_paths_and_their_blocks_thin_and_takes_a_style_per_row(
    tmp_path: Path,
) -> None:
    names = [f"p{number}" for number in range(6)]
    for number, name in enumerate(names):
        (tmp_path / f"{name}.png").write_bytes(draw_picture((320, 240), seed=number))
    styles = ["ink", *["default"] * 4, "oil"]
    rows = [
        {"id": name, "image": str(tmp_path / f"{name}.png"), "prompt": "sea", "sku": 2**63 + 1, "style": style}
        for name, style in zip(names, styles, strict=True)
    ]
    strings = dict.fromkeys(("id", "image", "prompt", "style"), pa.string())
    given = pa.Table.from_pylist(rows, pa.schema({**strings, "sku": pa.uint64()}))
    config = configure(tmp_path, tmp_path / "out", styles={"ink": {"base": "embedded", "long_edge": 64}})
    dataset = build_processor(config, make_animator=make_fake)(ray.data.from_arrow(given)).materialize()
    table = pa.concat_tables(ray.get(dataset.to_arrow_refs()))
    assert table["sku"].to_pylist() == [2**63 + 1] * 6
    assert table.schema.field("seed").type == pa.uint64()
    made = {row["id"]: row for row in table.to_pylist()}
    assert made.pop("p5")["error_code"] == "bad_parameter", "there is no such style"
    assert {row["error_message"] for row in made.values()} == {None}
    assert made.pop("p0")["model"] == "ink@fake"
    assert [row["model"] for row in made.values()] == ["demo@fake"] * 4
    assert dataset.num_blocks() == 6
    assert dataset.size_bytes() / 6 < 4096


def configure_two_styles(folder: Path, *, num_rows: int) -> CatalogConfig:
    """A run of one actor whose rows have one of two styles, or none, by turns."""
    manifest = write(folder, {str(n): "pan left" for n in range(num_rows)})
    rows = pq.read_table(manifest).append_column("style", pa.array(["ink", "oil", None] * (num_rows // 3)))
    pq.write_table(rows, manifest)
    ink, oil = ({"base": "embedded", "long_edge": 64, "defaults": {"num_frames": frames}} for frames in (4, 3))
    settings = {"model": ink, "styles": {"ink": ink, "oil": oil}, "keep_models": 1, "batch_size": 1, "prefetch": 0}
    return configure(manifest, folder / "out", defaults={}, **settings)


def check_two_styles(config: CatalogConfig, log: Path, *, num_rows: int) -> None:
    """Asserts that all rows were made, style by style, and are in the results in the manifest's order."""
    order = [line["style"] for line in begun(log)]
    assert len(order) == num_rows
    assert sum(a != b for a, b in itertools.pairwise(order)) == 2, order
    assert [row["id"] for row in read_results(config.output).to_pylist()] == [str(n) for n in range(num_rows)]
    assert by_id(config)["1"]["num_frames"] == 3
    assert by_id(config)["0"]["model"] == "ink@fake"


def test_an_actor_goes_through_the_styles_one_after_the_other(tmp_path: Path) -> None:
    config = configure_two_styles(tmp_path, num_rows=12)
    assert run_catalog(config, make_animator=partial(make_fake, log=tmp_path / "log")).exit_code == 0
    check_two_styles(config, tmp_path / "log", num_rows=12)


def test_of_many_rows_too_styles_come_in_order_and_results_a_few_at_a_time_and_the_driver_stays_thin(
    tmp_path: Path,
) -> None:
    num_rows = 102  # up to 100 the driver hands over itself, and Ray Data has no blocks of them
    config = configure_two_styles(tmp_path, num_rows=num_rows)
    seen, kept = set[int](), list[int]()

    def observe(progress: Progress) -> None:
        seen.add(progress.num_succeeded)
        if progress.num_succeeded > 90 and progress.num_left:
            kept.append(sum(type(each) is BlockStats for each in gc.get_objects()))

    make = partial(make_fake, log=tmp_path / "log", seconds_per_step=0.01)
    assert run_catalog(config, observe=observe, make_animator=make).exit_code == 0
    check_two_styles(config, tmp_path / "log", num_rows=num_rows)
    assert kept and max(kept) < 45, "the driver keeps nothing of blocks that are done"
    assert len(seen) > 20, "none is held back for long"


def test_a_run_exports_each_metric_that_the_dashboard_asks_for_and_logs_json_with_run_worker_row_and_attempt(
    chaos: ChaosProxy, tmp_path: Path
) -> None:
    picture = f"data:image/png;base64,{base64.b64encode(draw_picture((64, 48), seed=1)).decode()}"
    lines = [json.dumps({"id": name, "image": picture, "prompt": "sea"}) for name in ("a", "b")]
    broken = f"data:image/png;base64,{base64.b64encode(b'no picture').decode()}"
    lines.append(json.dumps({"id": "broken", "image": broken, "prompt": "sea"}))
    storage.write_bytes(f"{chaos.bucket}/manifest.jsonl", "\n".join(lines).encode())
    chaos.faults.append(503)  # so that there is a retry
    monitoring = Path(__file__).parents[2] / "cluster" / "k8s" / "components" / "monitoring"
    dashboard = json.loads((monitoring / "dashboard.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    wanted = set(re.findall(r"ray_pia_ray_run_\w+", " ".join(queries)))
    (node,) = ray.nodes()
    series: set[tuple[str, str]] = set()
    scraped_at = [0.0]

    def scrape(progress: Progress) -> None:
        if time.monotonic() < scraped_at[0] + 1:  # an answer takes Ray's agent some time
            return
        scraped_at[0] = time.monotonic()
        url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        with urllib.request.urlopen(url) as answer:
            found = re.findall(r'^(ray_pia_ray_run_\w+)\{.*run_id="([^"]+)"', answer.read().decode(), re.MULTILINE)
        series.update(found)

    config = configure(f"{chaos.bucket}/manifest.jsonl", tmp_path / "out", batch_size=1, log="json")
    summary = run_catalog(config, observe=scrape, make_animator=partial(make_fake, seconds_per_step=0.5))
    assert summary.progress.errors == {"unsupported_image": 1}
    assert len(wanted) > 10
    assert wanted - {name for name, run_id in series if run_id == summary.run_id} == set()

    folder = Path(ray._private.worker.global_worker.node.get_session_dir_path()) / "logs"
    logged = [line for path in folder.glob("worker-*.err") for line in path.read_text().splitlines()]
    values = [json.loads(line) for line in logged if summary.run_id in line]
    (failed,) = [value for value in values if value["message"].startswith("row broken failed")]
    assert failed["level"] == "WARNING"
    assert (failed["run_id"], failed["worker"]) == (summary.run_id, by_id(config)["broken"]["worker"])
    assert (failed["row_id"], failed["attempt"]) == ("broken", 1)
