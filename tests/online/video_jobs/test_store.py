"""Video jobs on a disk and on an S3 server: created once, listed in order, ended once, removed with all they left."""

from __future__ import annotations

import dataclasses
import itertools
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pia_ray import storage
from pia_ray.config.knobs import AnimationParams
from pia_ray.errors import (
    BadParameter,
    Busy,
    Cancelled,
    ConfigError,
    JobConflict,
    JobNotFound,
    OutOfMemory,
    OutputError,
    StorageNotFound,
    UnexpectedError,
)
from pia_ray.online.documents.document import Revision
from pia_ray.online.rendering.renderer import FinishedVideo, Rendered, RenderRequest
from pia_ray.online.video_jobs import JobStore, VideoJob
from tests.chaos_proxy import LOSE_ANSWER, ChaosProxy, chaos
from tests.s3_server import s3, s3_server

__all__ = ["chaos", "s3", "s3_server"]  # fixtures

SEED = 2**64 - 1


@pytest.fixture(params=["local", "s3"])
def prefix(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "serve") if request.param == "local" else f"{request.getfixturevalue('s3')}/serve"


@pytest.fixture
def local(tmp_path: Path) -> str:
    return str(tmp_path / "serve")


def request_for(prompt: str = "a boat", **knobs: object) -> RenderRequest:
    params = AnimationParams(prompt=prompt, **knobs)
    return RenderRequest(id="", params=params, image=b"picture", inputs={"end_image": b"second"})


def create(jobs: JobStore, prompt: str = "a boat", *, owner: str = "ann", **more: object) -> VideoJob:
    request = more.pop("request", None) or request_for(prompt)
    return jobs.create(request, owner=owner, model="demo", seconds="2", size="256x256", **more)


def rendered(job: VideoJob, content: bytes = b"video") -> Rendered:
    made = FinishedVideo(
        num_frames=12,
        width=64,
        height=48,
        fps=8,
        size_bytes=len(content),
        sha256="0" * 64,
        params=job.params.model_copy(update={"seed": SEED, "width": 64, "height": 48}),
        model_version="demo 1",
        gpu_s=1.0,
        animate_s=2.0,
        motion=0.1,
    )
    return Rendered(made, content, "mp4", b"thumbnail", b"sheet")


def next_open(jobs: JobStore) -> Revision[VideoJob]:
    return jobs.queue.read(jobs.queue.entries()[0])


def claim(jobs: JobStore, worker: str = "worker") -> Revision[VideoJob]:
    return jobs.queue.claim(next_open(jobs), worker=worker)


def finish(jobs: JobStore, held: Revision[VideoJob], made: Rendered) -> VideoJob:
    return jobs.queue.complete(held, jobs.queue.store(held, made))


def left_below(prefix: str) -> list[str]:
    return [found.uri.removeprefix(prefix) for found in storage.list_objects(prefix)]


def test_a_job_goes_from_queued_through_progress_to_its_video(prefix: str) -> None:
    jobs = JobStore(prefix)
    jobs.check()
    job = create(jobs, request=request_for(seed=SEED, affinity=(1, 0.5)))
    assert (job.status, job.progress, job.seconds, job.size) == ("queued", 0, "2", "256x256")
    assert abs(job.created_at - time.time()) < 30
    held = claim(jobs)
    asked = jobs.request(held.document, deadline_s=60)
    given = {"id": job.id, "deadline_s": 60, "priority": 1, "owner": "ann"}
    assert asked == dataclasses.replace(request_for(seed=SEED, affinity=(1, 0.5)), **given)
    assert asked.params.model_fields_set == {"prompt", "seed", "affinity"}

    held = jobs.queue.heartbeat(held)
    assert jobs.get("ann", job.id).status == "queued"  # it waits for the engine
    held = jobs.queue.heartbeat(held, progress=40, eta_s=50.0)
    now = jobs.get("ann", job.id)
    assert (now.status, now.progress) == ("in_progress", 40)
    assert now.started_at is not None
    assert now.eta_at is not None
    assert 0 <= now.eta_at - now.started_at - 50 < 1

    finish(jobs, held, rendered(job))
    done = jobs.get("ann", job.id)
    assert (done.status, done.progress, done.seconds, done.size) == ("completed", 100, "1.5", "64x48")
    assert done.completed_at is not None
    assert done.expires_at == done.completed_at + 86_400
    assert done.result is not None
    assert done.result.params.seed == SEED
    assert storage.read_bytes(done.result.video_uri) == b"video"
    assert storage.read_bytes(done.result.thumbnail_uri) == b"thumbnail"
    assert storage.read_bytes(done.result.spritesheet_uri) == b"sheet"
    assert jobs.queue.entries() == ()


def test_a_job_is_seen_by_its_owner_alone(local: str) -> None:
    jobs = JobStore(local)
    job = create(jobs)
    for call in (jobs.get, jobs.cancel, jobs.delete):
        with pytest.raises(JobNotFound):
            call("bob", job.id)
    assert jobs.list("bob").documents == ()
    assert jobs.num_open("bob") == 0
    assert jobs.get("ann", job.id) == job


@pytest.mark.parametrize("bad", ["", "video_1", "../../x", "video_" + "g" * 46, "video_" + "0" * 46 + "\n"])
def test_what_is_not_an_id_names_no_job(local: str, bad: str) -> None:
    with pytest.raises(JobNotFound):
        JobStore(local).get("ann", bad)
    with pytest.raises(JobNotFound):
        JobStore(local).list("ann", after=bad)


def test_a_file_that_belongs_to_no_knob_is_refused(local: str) -> None:
    with pytest.raises(BadParameter, match=r"\.\./x"):
        create(JobStore(local), request=dataclasses.replace(request_for(), inputs={"../x": b""}))
    assert left_below(local) == []


def test_pages_hold_every_job_once_in_order_of_creation(prefix: str) -> None:
    jobs = JobStore(prefix)
    ids = [create(jobs).id for _ in range(7)]
    create(jobs, owner="bob")
    for order, wanted in (("asc", ids), ("desc", ids[::-1])):
        seen, after, more = [], None, True
        while more:
            page = jobs.list("ann", after=after, limit=3, order=order)
            seen += [job.id for job in page.documents]
            after, more = seen[-1], page.has_more
        assert seen == wanted
    assert jobs.list("ann", limit=7).has_more is False
    jobs.delete("ann", ids[3])
    assert [job.id for job in jobs.list("ann", after=ids[3], order="asc").documents] == ids[4:]


def test_the_queue_goes_by_priority_and_then_by_creation(local: str) -> None:
    jobs = JobStore(local)
    line = create(jobs, request=dataclasses.replace(request_for(), priority=2))
    first, second = create(jobs), create(jobs, owner="bob")
    assert [entry.id for entry in jobs.queue.entries()] == [first.id, second.id, line.id]
    assert [entry.id for entry in jobs.queue.entries(2)] == [first.id, second.id]
    assert jobs.num_open("ann") == 1  # lines of batches do not count


def test_what_a_crash_leaves_in_the_queue_is_cleared_by_the_next_reader(local: str) -> None:
    jobs = JobStore(local)
    ended, broken_off = create(jobs), create(jobs, owner="bob")
    entries = jobs.queue.entries()
    jobs.cancel("ann", ended.id)
    storage.write_bytes(entries[0].uri, b"")  # its writer died before it removed this
    assert jobs.queue.read(entries[0]).document.ended
    documents = storage.list_objects(f"{local}/jobs/{entries[1].owner_folder}")
    storage.delete(next(found.uri for found in documents))  # its writer died before it wrote this
    with pytest.raises(JobNotFound):
        jobs.queue.read(entries[1])
    assert jobs.queue.entries() == entries[1:]
    os.utime(entries[1].uri, (time.time() - 7200,) * 2)
    with pytest.raises(JobNotFound):
        jobs.queue.read(jobs.queue.entries()[0])
    assert jobs.queue.entries() == ()
    assert not [uri for uri in left_below(local) if uri.startswith("/inputs") and broken_off.id in uri]


def test_one_idempotency_key_makes_one_job(prefix: str) -> None:
    jobs = JobStore(prefix)
    first = create(jobs, idempotency_key="k")
    assert create(jobs, idempotency_key="k") == first
    assert create(jobs, idempotency_key="k2").id != first.id
    assert create(jobs, idempotency_key="k", owner="bob").id != first.id
    with pytest.raises(JobConflict, match="another request"):
        create(jobs, "a ship", idempotency_key="k")
    with pytest.raises(JobConflict, match="another request"):
        create(jobs, request=request_for(seed=1), idempotency_key="k")


def test_tries_with_one_key_at_the_same_time_make_one_job(prefix: str) -> None:
    stores = [JobStore(prefix) for _ in range(8)]
    with ThreadPoolExecutor(8) as threads:
        made = list(threads.map(lambda jobs: create(jobs, idempotency_key="k").id, stores))
    assert len(set(made)) == 1
    assert len(stores[0].list("ann").documents) == 1
    assert [entry.id for entry in stores[0].queue.entries()] == made[:1]


def test_a_request_that_broke_off_is_completed_by_the_next_try(local: str) -> None:
    jobs = JobStore(local)
    job = create(jobs, idempotency_key="k")
    # As if the process had died before it wrote the document.
    storage.delete(next(found.uri for found in storage.list_objects(f"{local}/jobs")))
    with pytest.raises(JobNotFound):
        jobs.queue.read(jobs.queue.entries()[0])
    again = create(jobs, idempotency_key="k")
    assert again.id == job.id
    assert jobs.request(again).image == b"picture"
    assert len(jobs.queue.entries()) == 1


def test_a_clients_own_retry_gets_the_job_of_its_first_try(local: str) -> None:
    jobs = JobStore(local)
    first = create(jobs)
    assert create(jobs, retry_count=1).id == first.id
    assert create(jobs, retry_count=2).id == first.id
    on_purpose = create(jobs)
    assert on_purpose.id != first.id
    assert create(jobs, retry_count=1).id == on_purpose.id
    others = [
        create(jobs, retry_count=1, owner="bob"),
        create(jobs, "a ship", retry_count=1),
        create(jobs, request=dataclasses.replace(request_for(), image=b"other"), retry_count=1),
    ]
    assert len({first.id, on_purpose.id, *(job.id for job in others)}) == 5


def test_a_retry_after_the_job_was_deleted_makes_a_new_one(local: str) -> None:
    jobs = JobStore(local)
    first = create(jobs)
    jobs.delete("ann", first.id)
    assert create(jobs, retry_count=1).id != first.id


def test_an_owner_may_have_so_many_open_jobs(local: str) -> None:
    jobs = JobStore(local)
    first = create(jobs, max_open=2, idempotency_key="k")
    create(jobs, max_open=2)
    with pytest.raises(Busy, match="2 of your videos"):
        create(jobs, max_open=2)
    assert create(jobs, max_open=2, idempotency_key="k") == first
    create(jobs, max_open=2, owner="bob")
    jobs.cancel("ann", first.id)
    create(jobs, max_open=2)


def test_of_many_workers_one_claims_and_one_finishes(prefix: str) -> None:
    stores = [JobStore(prefix) for _ in range(6)]
    job = create(stores[0])
    found = [next_open(jobs) for jobs in stores]

    def race(at: int) -> str:
        try:
            held = stores[at].queue.claim(found[at], worker=f"worker-{at}")
        except JobConflict:
            return "refused"
        held = stores[at].queue.heartbeat(held, progress=50)
        return finish(stores[at], held, rendered(job, f"by {at}".encode())).status

    with ThreadPoolExecutor(6) as threads:
        outcomes = Counter(threads.map(race, range(6)))
    assert outcomes == {"refused": 5, "completed": 1}


def test_a_claim_in_time_is_left_alone_and_an_expired_one_is_taken_over(prefix: str) -> None:
    jobs = JobStore(prefix, lease_s=2.5)
    job = create(jobs)
    slow = jobs.queue.heartbeat(claim(jobs, "slow"), progress=70)
    with pytest.raises(JobConflict, match="another worker"):
        claim(jobs, "quick")
    time.sleep(2.6)
    quick = claim(jobs, "quick")
    assert (quick.document.attempt, quick.document.progress, quick.document.status) == (2, 0, "queued")
    with pytest.raises(JobConflict):
        jobs.queue.heartbeat(slow, progress=80)
    with pytest.raises(JobConflict):
        finish(jobs, slow, rendered(job, b"too late"))
    with pytest.raises(JobConflict):
        jobs.queue.fail(slow, OutOfMemory("too late"))
    done = finish(jobs, quick, rendered(job, b"in time"))
    assert done.result is not None
    assert storage.read_bytes(done.result.video_uri) == b"in time"
    assert sum("video.mp4" in uri for uri in left_below(prefix)) == 1
    assert done.lease_owner is None


def test_a_worker_whose_answer_was_lost_goes_on(local: str) -> None:
    jobs = JobStore(local)
    create(jobs)
    held = claim(jobs)
    jobs.queue.heartbeat(held, progress=10)  # the worker never hears that this was written
    assert jobs.queue.heartbeat(held, progress=20).document.progress == 20


def test_a_store_that_compares_no_etags_is_refused(chaos: ChaosProxy) -> None:
    jobs = JobStore(f"{chaos.bucket}/serve")
    jobs.check()
    chaos.ignored.add("if-match")
    with pytest.raises(ConfigError, match="If-Match"):
        jobs.check()
    chaos.ignored.remove("if-match")
    # Two of the last three writes replace: those of the first probe lie one folder deeper.
    turns = itertools.cycle([False, True, True])
    chaos.matches = lambda method, path: method == "PUT" and path.count("/") == 3 and next(turns)
    chaos.faults.extend([412] * 2)
    with pytest.raises(ConfigError, match="If-Match"):
        jobs.check()


def test_lost_answers_and_a_throttling_store_change_nothing(chaos: ChaosProxy) -> None:
    jobs = JobStore(f"{chaos.bucket}/serve")
    chaos.matches = lambda method, path: method == "PUT"
    chaos.faults.extend([LOSE_ANSWER, 503, LOSE_ANSWER])
    job = create(jobs, idempotency_key="k")
    chaos.faults.extend([LOSE_ANSWER])
    held = claim(jobs)
    chaos.faults.extend([LOSE_ANSWER])
    held = jobs.queue.heartbeat(held, progress=10)
    chaos.faults.extend([LOSE_ANSWER] * 5)
    done = finish(jobs, held, rendered(job))
    assert not chaos.faults
    assert (done.status, done.attempt) == ("completed", 1)
    assert [one.id for one in jobs.list("ann").documents] == [job.id]


def test_a_job_given_back_is_free_at_once_and_one_postponed_later(local: str) -> None:
    jobs = JobStore(local)
    create(jobs)
    jobs.queue.give_back(jobs.queue.heartbeat(claim(jobs), progress=30))
    assert (next_open(jobs).document.status, next_open(jobs).document.attempt, next_open(jobs).document.progress) == (
        "queued",
        0,
        0,
    )
    jobs.queue.postpone(claim(jobs), delay_s=2)
    with pytest.raises(JobConflict):
        claim(jobs)
    time.sleep(2)
    assert claim(jobs).document.attempt == 2


def test_a_cancelled_job_has_failed_for_everybody(prefix: str) -> None:
    jobs = JobStore(prefix)
    job = create(jobs)
    held = jobs.queue.heartbeat(claim(jobs), progress=30)
    cancelled = jobs.cancel("ann", job.id)
    assert cancelled.error is not None
    assert (cancelled.status, cancelled.error.code, cancelled.progress) == ("failed", "cancelled", 30)
    assert jobs.cancel("ann", job.id) == cancelled
    with pytest.raises(JobConflict):
        jobs.queue.heartbeat(held, progress=40)
    with pytest.raises(JobConflict):
        finish(jobs, held, rendered(job))
    assert jobs.queue.entries() == ()
    assert not [uri for uri in left_below(prefix) if uri.startswith("/content")]


def test_a_job_that_failed_with_its_engine_was_not_cancelled_by_its_owner(local: str) -> None:
    jobs = JobStore(local)
    job = create(jobs)
    failed = jobs.queue.fail(claim(jobs), Cancelled("the engine is shutting down"))
    assert (failed.error is not None and failed.error.code, failed.cancelled) == ("cancelled", False)
    with pytest.raises(JobConflict, match="failed already"):
        jobs.cancel("ann", job.id)


def test_what_has_ended_cannot_be_cancelled(local: str) -> None:
    jobs = JobStore(local)
    job = create(jobs)
    finish(jobs, claim(jobs), rendered(job))
    with pytest.raises(JobConflict, match="completed already"):
        jobs.cancel("ann", job.id)


def test_a_deleted_job_leaves_nothing(prefix: str) -> None:
    jobs = JobStore(prefix)
    done, queued = create(jobs, idempotency_key="k", webhook_url="https://example.com/"), create(jobs)
    finish(jobs, claim(jobs), rendered(done))
    jobs.delete("ann", done.id)
    jobs.delete("ann", queued.id)
    with pytest.raises(JobNotFound):
        jobs.get("ann", done.id)
    with pytest.raises(JobNotFound):
        jobs.delete("ann", done.id)
    assert left_below(prefix) == []


def test_a_job_deleted_at_work_is_lost_to_its_worker(local: str) -> None:
    jobs = JobStore(local)
    job = create(jobs)
    held = claim(jobs)
    jobs.delete("ann", job.id)
    with pytest.raises(JobNotFound):
        jobs.queue.heartbeat(held, progress=1)
    with pytest.raises(JobNotFound):
        finish(jobs, held, rendered(job))
    assert not [uri for uri in left_below(local) if uri.startswith(("/content", "/inputs", "/jobs", "/queue"))]


def test_ended_jobs_expire_and_others_stay(prefix: str) -> None:
    jobs = JobStore(prefix, job_ttl_s=0.0)
    ended = [create(jobs), create(jobs)]
    finish(jobs, claim(jobs), rendered(ended[0]))
    jobs.cancel("ann", ended[1].id)
    queued = create(jobs)
    time.sleep(1)
    assert jobs.sweep() == 2
    assert [job.id for job in jobs.list("ann").documents] == [queued.id]
    assert not [uri for uri in left_below(prefix) if ended[0].id in uri or ended[1].id in uri]
    assert JobStore(prefix).sweep() == 0
    assert jobs.request(queued).image == b"picture"


def test_an_error_shows_its_code_but_nothing_of_the_server(local: str) -> None:
    jobs = JobStore(local)
    told = {}
    errors = (
        OutOfMemory("the video does not fit"),
        UnexpectedError("Traceback: /srv/secret.py"),
        StorageNotFound("s3://secret/x"),
        OutputError("/srv/secret"),
    )
    for error in errors:
        create(jobs)
        job = jobs.queue.fail(claim(jobs), error)
        assert job.error is not None
        told[job.error.code] = job.error.message
    assert told["out_of_memory"] == "the video does not fit"
    assert not [text for text in told.values() if "secret" in text]
    assert set(told) == {"out_of_memory", "unexpected", "storage_not_found", "bad_output"}


def test_fields_of_a_newer_version_survive_a_change_by_an_older_one(local: str) -> None:
    jobs = JobStore(local)
    job = create(jobs)
    found = next(storage.list_objects(f"{local}/jobs"))
    document = storage.read_bytes(found.uri).replace(b'"owner"', b'"colour":"blue","owner"')
    storage.write_bytes(found.uri, document)
    claim(jobs)
    assert jobs.get("ann", job.id).model_extra == {"colour": "blue"}


@pytest.mark.heavy
def test_changes_from_many_processes_are_all_kept(local: str) -> None:
    jobs = JobStore(local)
    job = create(jobs)
    script = f"""
import sys
from pia_ray.errors import JobConflict
from pia_ray.online.video_jobs import JobStore
jobs = JobStore({local!r})
done = 0
while done < 40:
    try:
        jobs.queue.give_back(jobs.queue.claim(jobs.queue.read(jobs.queue.entries()[0]), worker=sys.argv[1]))
        done += 1
    except JobConflict:
        pass
"""
    processes = [subprocess.Popen([sys.executable, "-c", script, str(at)]) for at in range(3)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0, 0]
    now = jobs.get("ann", job.id)
    assert (now.revision, now.attempt) == (240, 0)


def test_creating_from_many_threads_keeps_ids_apart_and_in_order(local: str) -> None:
    jobs = JobStore(local)
    lock, ids = threading.Lock(), []

    def work(_: int) -> None:
        with lock:
            ids.append(create(jobs).id)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(work, range(12)))
    assert [job.id for job in jobs.list("ann", order="asc").documents] == ids == sorted(set(ids))
