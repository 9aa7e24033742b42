"""A finished video is described alike by every answer, and no field of an earlier version is missing."""

from __future__ import annotations

from pathlib import Path

from pia_ray.online.routes.animations import animation_object
from pia_ray.online.routes.videos import video_object
from pia_ray.online.video_jobs import JobStore
from pia_ray.online.video_jobs.dispatcher import Outlook
from tests.online.video_jobs.test_store import SEED, claim, create, finish, rendered

ANIMATION = "id object model seed params width height num_frames fps format size_bytes sha256 gpu_s animate_s motion"
VIDEO = """
id object created_at completed_at expires_at status model progress seconds size prompt error remixed_from_video_id
format params batch_id queue_position estimated_completion_at num_frames fps size_bytes sha256 model_version gpu_seconds
motion
"""
"""The fields of version 0.1.0."""


def test_calls_and_video_jobs_describe_a_finished_video_by_the_same_fields(tmp_path: Path) -> None:
    jobs = JobStore(str(tmp_path))
    job = create(jobs)
    made = rendered(job)
    finish(jobs, claim(jobs), made)
    called = animation_object("anim_1", made).model_dump(mode="json")
    asked = video_object(jobs.get("ann", job.id)).model_dump(mode="json")
    assert set(called) >= set(ANIMATION.split())
    assert set(asked) >= set(VIDEO.split())
    described = dict(made.video, model_version="demo 1")
    for name in set(described) - {"params"}:
        assert called[name] == asked[name] == described[name]
    assert called["params"] == asked["params"]
    assert called["seed"] == asked["params"]["seed"] == str(SEED)
    assert asked["gpu_seconds"] == asked["gpu_s"]
    assert (called["model"], asked["model"]) == ("demo 1", "demo")


def test_a_video_that_is_not_finished_has_the_knobs_that_were_given_and_no_facts(tmp_path: Path) -> None:
    job = create(JobStore(str(tmp_path)))
    shown = video_object(job).model_dump(mode="json")
    assert shown["params"] == {"prompt": "a boat"}
    assert (shown["created_at"], shown["completed_at"]) == (int(job.created_at), None)
    for name in ("model_version", "width", "num_frames", "size_bytes", "gpu_s", "gpu_seconds", "motion"):
        assert shown[name] is None


def test_the_estimated_completion_is_by_the_clock_of_the_store_as_all_times_of_a_video(tmp_path: Path) -> None:
    jobs = JobStore(str(tmp_path))
    job = create(jobs)
    shown = video_object(job, Outlook(position=0, eta_s=60.0), now=job.created_at + 5).model_dump(mode="json")
    assert 65 <= shown["estimated_completion_at"] - shown["created_at"] <= 67
