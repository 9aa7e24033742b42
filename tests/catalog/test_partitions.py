"""Several runs at one output, each with a share of the work items of the same manifest."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from pia_ray import ledger, read_results
from pia_ray.catalog.local import run_local
from pia_ray.config.catalog import CatalogConfig
from pia_ray.config.model import build
from pia_ray.errors import ConfigError, LeaseHeld
from pia_ray.ledger import Lease
from pia_ray.testing import FakeAnimator, make_catalog
from tests.models import DEMO

ROWS = 9


def configure(folder: Path, **settings: Any) -> CatalogConfig:
    values = {"manifest": str(folder / "manifest.parquet"), "output": str(folder / "out"), "model": DEMO, **settings}
    return build(CatalogConfig, values)


@pytest.fixture
def catalogue(tmp_path: Path) -> Path:
    """A folder with a manifest of nine rows, one of which has no picture."""
    make_catalog(tmp_path, rows=ROWS, broken=1 / ROWS)
    return tmp_path


class Counting(FakeAnimator):
    """Counts the rows that it is asked for."""

    def __init__(self) -> None:
        super().__init__(DEMO, batch_size=4)
        self.asked: list[str] = []

    def submit(self, request: Any, **how: Any) -> Any:
        self.asked.append(request.id)
        return super().submit(request, **how)


def test_two_partitions_at_once_make_one_complete_results_table_and_leave_nothing_to_do(catalogue: Path) -> None:
    summaries: dict[str, Any] = {}

    def run(partition: str) -> None:
        with FakeAnimator(DEMO, batch_size=4) as animator:
            summaries[partition] = run_local(configure(catalogue, partition=partition), animator=animator)

    threads = [threading.Thread(target=run, args=(partition,)) for partition in ("1/2", "2/2")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    parts = [summaries[partition].progress for partition in ("1/2", "2/2")]
    assert [part.num_items for part in parts] == [part.num_pending for part in parts]
    assert sum(part.num_items for part in parts) == ROWS
    assert min(part.num_items for part in parts) > 0
    assert [part.num_left for part in parts] == [0, 0]
    results = read_results(str(catalogue / "out"))
    assert results["id"].to_pylist() == [f"item-{row:06d}" for row in range(ROWS)]
    assert results["sku"].to_pylist() == [f"SKU{row:05d}" for row in range(ROWS)]
    assert results["status"].to_pylist().count("succeeded") == ROWS - 1
    with Counting() as animator:
        whole = run_local(configure(catalogue), animator=animator)
        again = run_local(configure(catalogue, partition="1/2"), animator=animator)
    assert animator.asked == []
    assert (whole.progress.num_pending, again.progress.num_pending) == (0, 0)
    assert whole.progress.num_before == ROWS - 1
    assert read_results(str(catalogue / "out")).num_rows == ROWS
    assert not ledger.count_attempts(str(catalogue / "out"))


def test_one_partition_makes_its_share_and_the_whole_run_makes_the_rest(catalogue: Path) -> None:
    with Counting() as animator:
        first = run_local(configure(catalogue, partition="2/3"), animator=animator)
        assert first.progress.num_items == first.progress.num_pending < ROWS
        assert read_results(str(catalogue / "out")).num_rows == first.progress.num_items
        whole = run_local(configure(catalogue), animator=animator)
    assert whole.progress.num_items == ROWS
    assert len(animator.asked) == len(set(animator.asked)) == ROWS - 1
    assert read_results(str(catalogue / "out")).num_rows == ROWS


def test_a_partition_is_not_run_twice_at_once_and_others_are_not_kept_waiting(catalogue: Path) -> None:
    output = str(catalogue / "out")
    with Lease(output, run_id="another", partition=(1, 2)), FakeAnimator(DEMO) as animator:
        with pytest.raises(LeaseHeld, match="another"):
            run_local(configure(catalogue, partition="1/2"), animator=animator)
        run_local(configure(catalogue, partition="2/2"), animator=animator)


@pytest.mark.parametrize("text", ["0/2", "3/2", "2", "1/0", "a/b", "1/2000", "-1/2", "1/2/3"])
def test_a_partition_that_is_not_one_of_so_many_is_refused(catalogue: Path, text: str) -> None:
    with pytest.raises(ConfigError, match="partition"):
        configure(catalogue, partition=text)
