"""One catalogue on real Ray and a real S3 server through faults in order, and what is counted afterwards.

Faults that show in one process without Ray are in `tests/catalog`, `tests/ledger` and `tests/storage`; `make soak`
draws from all of them.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import suppress
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

MATRIX = ("lost answers", "kill worker", "throttling", "cut bodies", "damage part", "kill driver")


@pytest.mark.heavy
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # of the proxy's sockets, whose clients are killed
def test_a_catalogue_under_fire_is_complete_and_nothing_is_made_twice_but_what_was_in_flight() -> None:
    with Ground(seed=1) as ground:
        ended = Round(ground, seed=1, num_rows=36, faults=MATRIX, plain=True).play()
        ground.problems += ended.problems
    assert not ground.problems, "\n".join(ground.problems)
    assert set(ended.faults) == set(MATRIX)
    assert ended.workers_ended >= 2


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 2 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "disk", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this machine lets tests mount no small disk")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.parametrize("phase", ["animating", "writing"])
def test_a_disk_that_is_full_for_a_while_is_waited_for_and_fails_no_row(phase: str, disk: Path, tmp_path: Path) -> None:
    ballast, waits = disk / "ballast", set[str]()

    def observe(progress: Progress) -> None:
        if progress.phase == phase and not waits and not ballast.exists():
            fill(ballast)
        if progress.away:
            waits.add(progress.away_reason)
            ballast.unlink(missing_ok=True)

    values = {"manifest": str(make_catalog(tmp_path, rows=12)), "output": str(disk / "out"), "model": DEMO}
    config = build(CatalogConfig, values)
    with FakeAnimator(DEMO, seconds_per_step=0.01) as animator:
        summary = run_local(config, animator=animator, observe=observe)
    assert any("No space left" in reason for reason in waits)
    assert summary.exit_code == 0
    assert {row["status"] for row in read_results(config.output).to_pylist()} == {"succeeded"}


def fill(path: Path) -> None:
    """Writes until there is no space left."""
    with suppress(OSError), path.open("wb", buffering=0) as stream:
        while True:
            stream.write(b"\0" * 4096)
