"""The lease of an output: who holds it, who may follow and when, on a local disk and on S3."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from pia_ray import storage
from pia_ray.errors import LeaseHeld
from pia_ray.ledger import Lease, layout
from tests.chaos_proxy import LOSE_ANSWER, ChaosProxy, chaos
from tests.s3_server import s3, s3_server

__all__ = ["chaos", "s3", "s3_server"]  # fixtures


@pytest.fixture
def output(tmp_path: Path) -> str:
    return str(tmp_path / "out")


def test_a_second_run_is_refused_and_told_who_holds_the_output(output: str) -> None:
    with (
        Lease(output, run_id="first") as lease,
        pytest.raises(LeaseHeld, match=rf"first \(process {os.getpid()} on .*started.*expires \d+ s"),
        Lease(output, run_id="second"),
    ):
        pass
    assert not lease.held
    with Lease(output, run_id="third") as lease:
        assert lease.held


def test_a_killed_run_on_this_machine_is_followed_at_once(output: str) -> None:
    script = f"""
import time
from pia_ray.ledger import Lease
with Lease({output!r}, run_id="first", ttl_s=3600):
    print("held", flush=True)
    time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(LeaseHeld, match=str(process.pid)), Lease(output, run_id="second"):
            pass
        process.kill()
    with Lease(output, run_id="second") as lease:
        assert lease.held


FOREIGN = {"run_id": "far", "host": "elsewhere", "pid": 1, "started_at": "2026", "process": "x/y/1:2"}


def write_foreign_lease(output: str, *, ttl_s: float, age_s: float = 0.0) -> Path:
    path = Path(output) / "_ledger" / "lease.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**FOREIGN, "ttl_s": ttl_s}))
    os.utime(path, (time.time() - age_s,) * 2)
    return path


def test_an_expired_lease_of_another_machine_is_taken_over(output: str) -> None:
    write_foreign_lease(output, ttl_s=60, age_s=61)
    with Lease(output, run_id="mine") as lease:
        assert lease.held
        assert "mine" in (Path(output) / "_ledger" / "lease.json").read_text()


def test_a_store_that_replaces_nothing_by_its_etag_has_no_lease(
    chaos: ChaosProxy, caplog: pytest.LogCaptureFixture
) -> None:
    output = f"{chaos.bucket}/out"
    storage.write_bytes(layout.lease_uri(output), json.dumps({**FOREIGN, "ttl_s": -2}).encode())
    turns = itertools.cycle([False, True])  # of two writes the first wants to create, the second to replace
    chaos.matches = lambda method, path: method == "PUT" and next(turns)
    chaos.faults.extend([412, 501])
    with Lease(output, run_id="mine") as lease:
        assert not lease.held
    assert "no lease, because the store replaces no object" in caplog.text


def test_a_lease_that_is_not_renewed_is_taken_over_when_it_expires(output: str) -> None:
    write_foreign_lease(output, ttl_s=1)
    with Lease(output, run_id="mine") as lease:
        assert lease.held


def test_a_lease_that_is_renewed_while_we_watch_is_respected(output: str) -> None:
    path = write_foreign_lease(output, ttl_s=3600)
    script = f"import os, time; time.sleep(1.5); os.utime({str(path)!r})"
    renewer = subprocess.Popen([sys.executable, "-c", script])
    with pytest.raises(LeaseHeld, match="elsewhere"), Lease(output, run_id="mine"):
        pass
    renewer.wait()
    assert "far" in path.read_text()


def take_over(uri: str, content: bytes) -> bool:
    """Puts another lease there as a run does: only if nobody renewed it since it was looked at."""
    found = storage.head(uri)
    return found is not None and storage.replace_bytes(uri, content, etag=found.etag) is not None


def test_a_holder_renews_its_lease_and_notices_a_takeover(output: str) -> None:
    path = Path(output) / "_ledger" / "lease.json"
    with Lease(output, run_id="mine", ttl_s=0.3) as lease:
        first = path.stat().st_mtime_ns
        deadline = time.monotonic() + 30
        while path.stat().st_mtime_ns == first and time.monotonic() < deadline:
            time.sleep(0.02)
        assert path.stat().st_mtime_ns != first
        assert lease.held
        while not take_over(str(path), b'{"run_id": "thief"}'):
            pass
        while lease.held and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not lease.held
    assert path.exists()


def test_a_lease_whose_file_is_deleted_is_written_anew(output: str, caplog: pytest.LogCaptureFixture) -> None:
    with Lease(output, run_id="first", ttl_s=0.3) as lease:
        path = Path(layout.lease_uri(output))
        path.unlink()
        deadline = time.monotonic() + 30
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        assert json.loads(path.read_text())["run_id"] == "first"
        assert lease.held
    assert not path.exists()
    assert "was deleted" in caplog.text
    assert "another run" not in caplog.text


def test_a_lease_file_that_is_no_lease_expires_like_one(output: str) -> None:
    path = write_foreign_lease(output, ttl_s=60, age_s=100)
    path.write_text("{")
    os.utime(path, (time.time() - 100,) * 2)
    with Lease(output, run_id="mine") as lease:
        assert lease.held


# On S3


def test_a_run_goes_on_without_a_lease_where_the_store_has_no_conditional_writes(
    chaos: ChaosProxy, caplog: pytest.LogCaptureFixture
) -> None:
    chaos.matches = lambda method, path: method == "PUT"
    chaos.faults.append(501)
    storage.probe(chaos.bucket)
    with Lease(chaos.bucket, run_id="one") as one, Lease(chaos.bucket, run_id="two") as two:
        assert not one.held
        assert not two.held
    assert "no lease" in caplog.text


def test_a_lease_whose_answers_are_lost_is_held_all_the_same(chaos: ChaosProxy) -> None:
    chaos.matches = lambda method, path: method == "PUT"
    chaos.faults.append(LOSE_ANSWER)
    with Lease(chaos.bucket, run_id="one") as lease:
        assert lease.held


@pytest.mark.parametrize("hours", [-2, 2])
def test_a_wrong_clock_neither_steals_nor_keeps_a_lease_of_another_machine(s3: str, hours: int) -> None:
    """Times that a holder with a wrong clock writes are for people; the store's own count."""
    started_at = (datetime.now(UTC) + timedelta(hours=hours)).isoformat()
    holder = {"run_id": "far", "host": "elsewhere", "pid": 1, "started_at": started_at, "process": "x/y/1:2"}
    storage.write_bytes(layout.lease_uri(s3), json.dumps({**holder, "ttl_s": 4}).encode())
    begin = time.monotonic()
    with Lease(s3, run_id="mine") as lease:
        assert lease.held
        assert time.monotonic() - begin > 1  # it waited for the lease to expire by the store's clock
