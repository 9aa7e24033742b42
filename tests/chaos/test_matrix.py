"""One catalogue on real Ray and a real S3 server through faults in order, and what is counted afterwards.

Faults that show in one process without Ray are in `tests/catalog`, `tests/ledger` and `tests/storage`; `make soak`
draws from all of them.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from pia_ray import read_results
from pia_ray.catalog.local import run_local
from pia_ray.catalog.run import Progress
from pia_ray.config.catalog import CatalogConfig
from pia_ray.config.model import build
from pia_ray.testing import FakeAnimator, make_catalog
from tests.chaos.ground import Ground
from tests.chaos.round import DEMO, Round

MATRIX = ("lost answers", "kill worker", "throttling", "cut bodies", "second driver", "damage part", "kill driver")


@pytest.mark.heavy
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # of the proxy's sockets, whose clients are killed
def test_a_catalogue_under_fire_is_complete_and_nothing_is_made_twice_but_what_was_in_flight() -> None:
    with Ground(seed=1) as ground:
        ended = Round(ground, seed=1, num_rows=36, faults=MATRIX, plain=True).play()
        ground.problems += ended.problems
    assert not ground.problems, "\n".join(ground.problems)
    assert set(ended.faults) == set(MATRIX)
    assert ended.workers_ended >= 2


def test_a_full_disk_holds_animations_back_and_fails_no_row(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "disk", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this machine lets tests mount no small disk")
    waited = False

    def observe(progress: Progress) -> None:
        nonlocal waited
        if progress.phase == "animating" and not waited:
            if not (disk / "ballast").exists():
                fill(disk / "ballast")
            elif progress.num_waiting:
                waited = True
                (disk / "ballast").unlink()

    try:
        manifest = make_catalog(tmp_path, rows=12)
        values = {"manifest": str(manifest), "output": str(disk / "out"), "model": DEMO}
        config = build(CatalogConfig, values)
        with FakeAnimator(DEMO, seconds_per_step=0.01) as animator:
            summary = run_local(config, animator=animator, observe=observe)
        assert waited
        assert summary.exit_code == 0
        assert {row["status"] for row in read_results(config.output).to_pylist()} == {"succeeded"}
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def fill(path: Path) -> None:
    """Writes until there is no space left."""
    try:
        with path.open("wb", buffering=0) as stream:
            while True:
                stream.write(b"\0" * 4096)
    except OSError:
        return
