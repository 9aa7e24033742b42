"""Long runs and killed runs leave nothing: memory, descriptors, threads and temporary folders stay as they were."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pia_ray import read_results
from pia_ray.catalog.local import run_local
from pia_ray.config.catalog import CatalogConfig
from pia_ray.config.model import ModelConfig, build
from pia_ray.testing import FakeAnimator, make_catalog
from tests.chaos.memory import slope
from tests.processes import alive, children, num_descriptors, private_bytes

ROOT = Path(__file__).parents[2]
DEMO = ModelConfig.named("demo").model_copy(update={"long_edge": 64})
MIB = 2**20


@pytest.fixture
def scratch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a path that is short enough for Ray's sockets; temporary files are in its `tmp` and `ray`."""
    with tempfile.TemporaryDirectory(prefix="chaos-", dir="/tmp") as name:
        folder = Path(name)
        for variable, part in (("TMPDIR", "tmp"), ("RAY_TMPDIR", "ray")):
            (folder / part).mkdir()
            monkeypatch.setenv(variable, str(folder / part))
        yield folder


def start_driver(scratch: Path, *, rows: int, **settings: Any) -> subprocess.Popen[str]:
    """A run with a cluster of its own over so many rows."""
    manifest = make_catalog(scratch / f"in-{rows}", rows=rows, sizes=((32, 32),))
    values = {
        "manifest": str(manifest),
        "output": str(scratch / f"out-{rows}"),
        "model": DEMO.model_dump(mode="json"),
        "defaults": {"num_frames": 2, "num_inference_steps": 1},
        "seconds_per_step": 0.0,
        "gpus_per_actor": 0,
        **settings,
    }
    (scratch / "marks").mkdir(exist_ok=True)
    log, marks = scratch / f"generations-{rows}", scratch / "marks"
    command = [sys.executable, "-m", "tests.chaos.driver", json.dumps(values), str(log), str(marks)]
    with (scratch / "drivers.log").open("ab") as said:
        return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=said, text=True)


def worker_of(driver: int) -> int | None:
    """The process that animates for this driver."""
    return next((pid for pid, command in children(driver).items() if "MapWorker" in command), None)


def test_runs_in_one_process_leave_no_descriptor_thread_or_temporary_file(scratch: Path) -> None:
    manifest = make_catalog(scratch, rows=3, broken=0.34, sizes=((32, 32),))
    counts = []
    with FakeAnimator(DEMO) as animator:
        for number in range(5):
            output = str(scratch / f"out-{number}")
            values = {"manifest": str(manifest), "output": output, "model": DEMO, "max_attempts": 1}
            run_local(build(CatalogConfig, values), animator=animator)
            counts.append((num_descriptors(os.getpid()), threading.active_count()))
    assert counts[1] == counts[-1]
    assert list((scratch / "tmp").iterdir()) == []


@pytest.mark.soak
def test_two_thousand_rows_leave_the_memory_of_driver_and_worker_flat(scratch: Path) -> None:
    driver, samples = start_driver(scratch, rows=2000), list[tuple[int, ...]]()
    log = scratch / "generations-2000"
    while driver.poll() is None:
        time.sleep(1)
        worker = worker_of(driver.pid)
        num = len(log.read_bytes().splitlines()) if log.exists() else 0
        if worker and num:
            try:
                facts = [(private_bytes(pid), num_descriptors(pid)) for pid in (driver.pid, worker)]
            except OSError:  # it has just ended
                continue
            samples.append((num, *facts[0], *facts[1]))
    assert driver.communicate()[0].strip().startswith('{"exit_code": 0')
    assert len(read_results(str(scratch / "out-2000"))) == 2000
    settled = [sample for sample in samples if 500 <= sample[0] < 1990]
    slopes = {name: slope([(each[0], each[n]) for each in settled]) for n, name in enumerate(NAMES, start=1)}
    sys.stdout.write(json.dumps({"samples": len(settled), "first": settled[0], "last": settled[-1], **slopes}))
    assert slopes["driver bytes"] < 10_000
    assert slopes["worker bytes"] < 10_000
    assert abs(settled[-1][2] - settled[0][2]) <= 4
    assert abs(settled[-1][4] - settled[0][4]) <= 4


NAMES = ("driver bytes", "driver descriptors", "worker bytes", "worker descriptors")


@pytest.mark.soak
def test_three_hundred_animations_of_many_prompts_leave_memory_flat() -> None:
    command = [sys.executable, "-m", "tests.chaos.memory", "300"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    samples = json.loads(done.stdout)
    settled = [sample for sample in samples if sample[0] > 150]
    sys.stdout.write(
        json.dumps({"samples": samples[::10], "bytes per animation": slope([each[:2] for each in settled])})
    )
    assert slope([each[:2] for each in settled]) < 0.2 * MIB
    assert {each[2] for each in settled} == {settled[0][2]}


@pytest.mark.soak
def test_ten_killed_runs_leave_no_folder_once_another_has_run(scratch: Path) -> None:
    log = scratch / "generations-200"
    for _ in range(10):
        before = len(log.read_bytes().splitlines()) if log.exists() else 0
        driver = start_driver(scratch, rows=200, seconds_per_step=0.1)
        while driver.poll() is None and (not log.exists() or len(log.read_bytes().splitlines()) < before + 5):
            time.sleep(0.2)
        below = children(driver.pid)
        driver.send_signal(signal.SIGKILL)
        driver.communicate()
        while any(alive(pid) for pid in below):
            time.sleep(0.2)
    assert len(list((scratch / "ray").iterdir())) <= 1, "each run removes what the one before has left"
    driver = start_driver(scratch, rows=200)
    assert driver.communicate()[0].strip().startswith('{"exit_code": 0')
    assert list((scratch / "ray").iterdir()) == []
    assert list((scratch / "tmp").iterdir()) == []
