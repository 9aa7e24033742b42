"""`pia-ray jobs` on the storage of an endpoint: jobs are listed, shown, tried again, cancelled and deleted."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path

import pytest

from pia_ray.cli.main import main
from pia_ray.config.knobs import AnimationParams
from pia_ray.config.serve import owner_of_hash
from pia_ray.errors import JobConflict, OutOfMemory
from pia_ray.online.rendering.renderer import BATCH_LINE, RenderRequest
from pia_ray.online.video_jobs import JobStore, VideoJob
from pia_ray.online.video_jobs.webhook_outbox import TryResult
from pia_ray.online.video_jobs.webhooks import event_id

KEY_SHA256 = hashlib.sha256(b"a key").hexdigest()


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    return str(tmp_path / "serve")


@pytest.fixture
def jobs(prefix: str) -> JobStore:
    return JobStore(prefix, failed_job_ttl_s=604_800.0)


def create(jobs: JobStore, *, owner: str = "ann", webhook_url: str | None = None, batch: str | None = None) -> VideoJob:
    priority = 1 if batch is None else BATCH_LINE
    request = RenderRequest(id="", params=AnimationParams(prompt="a boat"), image=b"picture", priority=priority)
    return jobs.create(
        request, owner=owner, model="demo", seconds="2", size="64x64", webhook_url=webhook_url, batch_id=batch
    )


def fail(jobs: JobStore, job: VideoJob) -> VideoJob:
    entry = next(each for each in jobs.queue.entries() if each.id == job.id)
    return jobs.queue.fail(jobs.queue.claim(jobs.queue.read(entry), worker="w"), OutOfMemory("the GPU is full"))


def listed(capsys: pytest.CaptureFixture[str], prefix: str, *flags: str) -> list[str]:
    assert main(["jobs", "list", "--storage", prefix, "--json", *flags]) == 0
    return [json.loads(line)["id"] for line in capsys.readouterr().out.splitlines()]


def test_jobs_are_listed_by_status_owner_and_age_the_newest_first(
    prefix: str, jobs: JobStore, capsys: pytest.CaptureFixture[str]
) -> None:
    failed, queued = fail(jobs, create(jobs)), create(jobs, owner="bob")
    cancelled = jobs.cancel("ann", create(jobs).id)
    of_key = create(jobs, owner=owner_of_hash(bytes.fromhex(KEY_SHA256)))
    assert listed(capsys, prefix) == [of_key.id, cancelled.id, queued.id, failed.id]
    assert listed(capsys, prefix, "--status", "failed") == [failed.id]
    assert listed(capsys, prefix, "--status", "cancelled") == [cancelled.id]
    assert listed(capsys, prefix, "--owner", "bob") == [queued.id]
    assert listed(capsys, prefix, "--owner", KEY_SHA256) == [of_key.id]
    assert listed(capsys, prefix, "--limit", "2") == [of_key.id, cancelled.id]
    assert listed(capsys, prefix, "--older-than", "1h") == []
    assert len(listed(capsys, prefix, "--newer-than", "1h")) == 4
    assert main(["jobs", "list", "--storage", prefix]) == 0
    out = capsys.readouterr().out
    assert queued.id in out and "out_of_memory" in out and "4 jobs" in out


def test_a_job_is_shown_with_its_error_its_attempts_and_its_times(
    prefix: str, jobs: JobStore, capsys: pytest.CaptureFixture[str]
) -> None:
    job = fail(jobs, create(jobs))
    assert main(["jobs", "show", job.id, "--storage", prefix]) == 0
    out = capsys.readouterr().out
    assert "the GPU is full" in out and "attempts    1" in out and "expires" in out
    assert main(["jobs", "show", job.id.replace("video_0", "video_f"), "--storage", prefix]) == 2
    assert main(["jobs", "show", "../x", "--storage", prefix]) == 2


def test_a_job_is_shown_with_the_delivery_of_its_webhook_and_without_the_webhook_s_url(
    prefix: str, jobs: JobStore, capsys: pytest.CaptureFixture[str]
) -> None:
    job = fail(jobs, create(jobs, webhook_url="https://hooks.example.com/secret?token=secret"))
    held = jobs.outbox.claim(jobs.outbox.read(next(jobs.outbox.due())), worker="sender")
    jobs.outbox.postpone(held, TryResult(503, "fetch_unavailable"), delay_s=60)
    assert main(["jobs", "show", job.id, "--storage", prefix]) == 0
    out = capsys.readouterr().out
    assert "pending, to hooks.example.com, 1 attempt, answer 503, fetch_unavailable, next at" in out
    assert "secret" not in out


def test_a_failed_job_is_queued_again_under_its_id_with_all_its_attempts(prefix: str, jobs: JobStore) -> None:
    failed = fail(jobs, create(jobs, webhook_url="https://example.com/hook"))
    assert [entry.id for entry in jobs.outbox.entries()] == [failed.id]
    assert failed.expires_at - jobs.now() > 600_000
    assert main(["jobs", "retry", failed.id, "--storage", prefix]) == 0
    queued = jobs.get("ann", failed.id)
    assert (queued.status, queued.attempt, queued.error, queued.expires_at) == ("queued", 0, None, None)
    assert jobs.outbox.entries() == ()
    assert jobs.request(queued).image == b"picture"
    held = jobs.queue.claim(jobs.queue.read(jobs.queue.entries()[0]), worker="w")
    assert main(["jobs", "retry", failed.id, "--storage", prefix]) == 1  # it is being rendered
    assert jobs.queue.heartbeat(held, progress=5).document.status == "in_progress"
    assert event_id(held.document) != event_id(failed)


def test_a_worker_that_lost_a_job_cannot_write_to_it_after_it_was_queued_again(prefix: str, jobs: JobStore) -> None:
    lost = JobStore(prefix, lease_s=-60.0)  # a claim of it has run out at once, whatever the clocks differ by
    job = create(jobs)
    old = lost.queue.claim(lost.queue.read(lost.queue.entries()[0]), worker="w")
    fail(jobs, job)
    jobs.retry(job.id)
    now = jobs.queue.claim(jobs.queue.read(jobs.queue.entries()[0]), worker="w")
    assert (now.document.attempt, now.document.lease_owner) == (old.document.attempt, old.document.lease_owner)
    with pytest.raises(JobConflict):
        jobs.queue.fail(old, OutOfMemory("late"))
    assert jobs.queue.heartbeat(now, progress=5).document.status == "in_progress"


def test_a_job_stays_in_the_queue_where_a_worker_removes_its_entry_while_it_is_queued_again(jobs: JobStore) -> None:
    job = create(jobs)
    entry = jobs.queue.entries()[0]
    fail(jobs, job)
    jobs.retry(job.id)
    Path(entry.uri).unlink()  # by a worker that read the failed job before
    Path(entry.uri).touch()
    assert jobs.queue.read(entry).document.status == "queued"
    assert [each.id for each in jobs.queue.entries()] == [job.id]


def test_jobs_that_cannot_be_tried_again_are_refused_with_the_reason(
    prefix: str, jobs: JobStore, capsys: pytest.CaptureFixture[str]
) -> None:
    queued, cancelled = create(jobs), jobs.cancel("ann", create(jobs).id)
    of_batch = fail(jobs, create(jobs, batch="batch_1"))
    bare = fail(jobs, create(jobs, owner="bob"))
    Path(bare.inputs["image"]).unlink()
    soon = JobStore(prefix, failed_job_ttl_s=30.0)
    expiring = fail(soon, create(soon, owner="eve"))
    ids = [queued.id, cancelled.id, of_batch.id, bare.id, expiring.id]
    assert main(["jobs", "retry", *ids, "--storage", prefix]) == 1
    reasons = capsys.readouterr().err.splitlines()
    for reason, word in zip(reasons, ("is queued", "was cancelled", "batch_1", "image", "expired"), strict=True):
        assert word in reason
    assert [jobs.find(each).status for each in ids] == ["queued", *["failed"] * 4]


def test_an_operator_cancels_jobs_of_any_owner(prefix: str, jobs: JobStore) -> None:
    job = create(jobs, owner="bob")
    assert main(["jobs", "cancel", job.id, "--storage", prefix]) == 0
    assert jobs.get("bob", job.id).cancelled
    assert jobs.queue.entries() == ()
    assert main(["jobs", "cancel", fail(jobs, create(jobs)).id, "--storage", prefix]) == 1


def test_purge_deletes_ended_jobs_of_a_status_and_an_age_alone(
    prefix: str, jobs: JobStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    failed, queued = fail(jobs, create(jobs)), create(jobs)
    cancelled = jobs.cancel("ann", create(jobs).id)
    purge = ["jobs", "purge", "--storage", prefix]
    assert main([*purge, "--status", "failed", "--older-than", "1h"]) == 0
    assert main([*purge, "--older-than", "0s", "--dry-run"]) == 0
    assert "2 jobs would be deleted" in capsys.readouterr().out
    assert len(listed(capsys, prefix)) == 3
    assert main([*purge, "--status", "failed"]) == 0
    capsys.readouterr()
    assert listed(capsys, prefix) == [cancelled.id, queued.id]
    assert not [path for path in tmp_path.rglob("*") if failed.id in str(path) and path.is_file()]
    with pytest.raises(JobConflict):
        jobs.purge(queued)
    assert main(purge) == 2


def test_flags_of_other_actions_are_refused(prefix: str, jobs: JobStore, capsys: pytest.CaptureFixture[str]) -> None:
    create(jobs)
    for words, said in (
        (["retry"], "needs the id"),
        (["list", "video_1"], "takes no ids"),
        (["show", "video_1", "--status", "failed"], "--status is not a flag of jobs show"),
        (["purge", "--status", "queued"], "cancel the others first"),
    ):
        assert main(["jobs", *words, "--storage", prefix]) == 2
        assert said in capsys.readouterr().err


def test_a_failed_job_stays_longer_than_a_completed_or_cancelled_one(prefix: str) -> None:
    jobs = JobStore(prefix, job_ttl_s=0.0, failed_job_ttl_s=604_800.0)
    failed = fail(jobs, create(jobs))
    jobs.cancel("ann", create(jobs).id)
    time.sleep(1)
    assert jobs.sweep() == 1
    assert [job.id for job in jobs.each()] == [failed.id]


@pytest.mark.parametrize("action", [["list"], ["show", "video_x"], ["purge", "--status", "failed"]])
def test_a_storage_that_does_not_exist_exits_2_and_is_not_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], action: list[str]
) -> None:
    assert main(["jobs", *action, "--storage", str(tmp_path / "srve")]) == 2
    assert (
        capsys.readouterr().err == f"pia-ray: there is no folder {tmp_path}/srve: give the endpoint's own --storage\n"
    )
    assert not (tmp_path / "srve").exists()
