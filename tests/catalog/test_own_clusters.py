"""Clusters of a run's own, a driver that is killed, and S3: each run on Ray here starts its own."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any, Final

import pytest
import ray

from pia_ray import read_results, storage
from pia_ray.catalog.cluster_run import run_catalog
from pia_ray.catalog.local import run_local
from pia_ray.config.catalog import CatalogConfig
from pia_ray.config.model import ModelConfig, build
from pia_ray.errors import ConfigError
from pia_ray.testing import FakeAnimator, make_catalog, make_fake
from tests.processes import children
from tests.s3_server import s3, s3_server

__all__ = ["s3", "s3_server"]  # fixtures

pytestmark = [
    pytest.mark.heavy,
    # Ray Data sets its own deprecated settings whenever it makes a context.
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context"),
    # Ray leaves pipes and log files of the processes it started to the garbage collector.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

FEW_FRAMES: Final = {"model": "demo", "defaults": {"num_frames": 4}}

DRIVER = """
import json, sys
from functools import partial
from pathlib import Path
from pia_ray.catalog.cluster_run import run_catalog
from pia_ray.config.catalog import CatalogConfig, build
from pia_ray.testing import make_fake

values = json.loads(sys.argv[1])
fake = partial(make_fake, seconds_per_step=0.02, log=Path(sys.argv[2]))
run_catalog(build(CatalogConfig, values), make_animator=fake)
"""


def begun(log: Path) -> list[dict[str, Any]]:
    """What the fake animators began, in order: id and pid."""
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def ray_processes() -> dict[int, str]:
    """The processes of Ray's nodes below this one, which may hold a cluster for other tests."""
    return {pid: line for pid, line in children().items() if "raylet" in line or "gcs_server" in line}


def until(condition: Any) -> bool:
    """Whether it comes true within the patience of a test."""
    for _ in range(3000):  # a busy machine takes a minute to start a cluster
        if condition():
            return True
        time.sleep(0.1)
    return False


def test_a_run_on_s3_with_a_cluster_of_its_own_gives_the_local_table_and_leaves_no_ray(s3: str, tmp_path: Path) -> None:
    manifest = make_catalog(tmp_path, rows=6, broken=0.34)
    values = {**FEW_FRAMES, "manifest": str(manifest), "max_attempts": 1}
    here = build(CatalogConfig, {**values, "output": str(tmp_path / "out")})
    there = build(CatalogConfig, {**values, "output": f"{s3}/out"})
    with FakeAnimator(ModelConfig.named("demo")) as animator:
        run_local(here, animator=animator)
    handler = signal.getsignal(signal.SIGTERM)
    before = ray_processes().keys()
    summary = run_catalog(there, make_animator=make_fake)
    assert not ray.is_initialized()
    assert until(lambda: ray_processes().keys() <= before), ray_processes()
    assert signal.getsignal(signal.SIGTERM) is handler
    assert summary.exit_code == 1
    tables = [read_results(config.output).to_pylist() for config in (here, there)]
    for one, other in zip(*tables, strict=True):
        for name in ("id", "status", "error_code", "work_key", "input_sha256", "seed", "params", "sku"):
            assert one[name] == other[name]
        if other["video_uri"]:
            assert other["video_uri"] == f"{s3}/out" + one["video_uri"].removeprefix(here.output)
            assert storage.exists(other["video_uri"])
    with pytest.raises(ConfigError, match="gpus-per-actor"):
        again = there.model_copy(update={"gpus_per_actor": 1.0, "retry": ("failed",)})
        run_catalog(again, make_animator=make_fake)
    assert not ray.is_initialized()


def test_after_a_kill_of_the_driver_the_next_run_does_the_rest_and_the_third_nothing(tmp_path: Path) -> None:
    manifest, log = make_catalog(tmp_path, rows=30), tmp_path / "log"
    values = {**FEW_FRAMES, "manifest": str(manifest), "output": str(tmp_path / "out"), "batch_size": 2}
    command = [sys.executable, "-c", DRIVER, json.dumps(values), str(log)]
    driver = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    videos = tmp_path / "out" / "videos"
    assert until(lambda: len(list(videos.glob("*/*.mp4"))) >= 8 or driver.poll() is not None)
    assert driver.poll() is None
    helpers = re.compile(r"^ray::\w*(Stats|Coordinator|Tracker)|/(dashboard|monitor|log_monitor)\.py\b")
    found = [line for line in children(driver.pid).values() if helpers.search(line)]
    assert found == [], "Ray's and Ray Data's helpers are for clusters that grow and have a dashboard"
    driver.kill()
    driver.wait()
    pids = {line["pid"] for line in begun(log)}
    assert until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids)), "no actor outlives its driver"
    committed = {path: path.stat().st_mtime_ns for path in videos.glob("*/*.mp4")}
    assert 8 <= len(committed) < 30

    config = build(CatalogConfig, values)
    with make_fake(config, 1, log=log) as animator:
        second = run_local(config, animator=animator)
    # What was committed and not yet recorded counts as pending, and is found, not animated.
    assert second.exit_code == 0
    rows = read_results(values["output"]).to_pylist()
    assert Counter(row["status"] for row in rows) == {"succeeded": 30}
    assert len({row["video_uri"] for row in rows}) == 30
    assert {path: path.stat().st_mtime_ns for path in committed} == committed
    times = Counter(line["id"] for line in begun(log))
    assert len(times) == 30
    assert sum(times.values()) <= 30 + 4, "only what was in flight begins again"

    with make_fake(config, 1) as animator:
        third = run_local(config, animator=animator)
    assert (third.progress.num_pending, third.exit_code) == (0, 0)
