"""The run at work as other machines see it: its lease's holder, its workers, and their rows with stages and ages."""

from __future__ import annotations

import os
import time
from pathlib import Path

from pia_ray import ledger, storage
from pia_ray.ledger import Lease, RowInFlight, WorkerState, layout


def state_of(worker: str, run_id: str = "2026-b") -> WorkerState:
    rows = (RowInFlight("car", "ab" * 32, "animate", stage_s=2.0, age_s=3.0),)
    return WorkerState(worker, run_id, "node", rows, busy_share=0.5, outage="", num_waiting=0)


def age(uri: str, seconds: float) -> None:
    """Lets the file be so old."""
    then = time.time() - seconds
    os.utime(storage.local_path(uri), (then, then))


def test_an_output_without_a_run_at_work_has_no_live_run(tmp_path: Path) -> None:
    assert ledger.live_run(str(tmp_path)) is None


def test_a_live_run_is_that_of_the_lease_with_its_workers_and_their_rows(tmp_path: Path) -> None:
    output = str(tmp_path)
    with Lease(output, run_id="2026-b"):
        ledger.write_worker(output, state_of("host:1"))
        ledger.write_worker(output, state_of("host:2"))
        ledger.write_worker(output, state_of("host:3", run_id="2025-a"))  # what a killed run has left
        live = ledger.live_run(output)
    assert live is not None
    assert (live.run_id, live.expired, live.num_in_flight) == ("2026-b", False, 2)
    assert live.driver.endswith(f":{os.getpid()}")
    assert [worker.worker for worker in live.workers] == ["host:1", "host:2"]
    (row,) = live.workers[0].rows
    assert (row.id, row.stage) == ("car", "animate")


def test_ages_go_on_by_the_stores_clock_after_a_worker_has_written(tmp_path: Path) -> None:
    output = str(tmp_path)
    with Lease(output, run_id="2026-b"):
        ledger.write_worker(output, state_of("host:1"))
        (record,) = storage.list_objects(layout.workers_uri(output))
        age(record.uri, 100)
        age(layout.lease_uri(output), 3600)
        live = ledger.live_run(output)
    assert live is not None
    assert live.renewed_s is not None
    assert 3599 <= live.renewed_s < 3660
    assert live.expired
    (worker,) = live.workers
    assert 99 <= worker.seen_s < 160
    assert 101 <= worker.rows[0].stage_s < 162
    assert 102 <= worker.rows[0].age_s < 163


def test_a_damaged_record_of_a_worker_is_left_out(tmp_path: Path) -> None:
    output = str(tmp_path)
    ledger.write_worker(output, state_of("host:1"))
    storage.write_bytes(storage.join(layout.workers_uri(output), "2026-b.host-2.json"), b"{")
    live = ledger.live_run(output)  # as on a store without leases
    assert live is not None
    assert (live.run_id, live.renewed_s) == ("2026-b", None)
    assert [worker.worker for worker in live.workers] == ["host:1"]


def test_the_end_of_a_run_removes_its_workers_and_those_of_earlier_runs(tmp_path: Path) -> None:
    output = str(tmp_path)
    for run_id in ("2025-a", "2026-b", "2027-c"):
        ledger.write_worker(output, state_of("host:1", run_id=run_id))
    ledger.remove_workers_of_run(output, "2026-b")
    live = ledger.live_run(output)
    assert live is not None
    assert live.run_id == "2027-c"
    assert len(list(storage.list_objects(layout.workers_uri(output)))) == 1
