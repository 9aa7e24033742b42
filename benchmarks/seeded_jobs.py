"""Many video jobs at once, as objects to write without their requests, for benchmarks and tests of long queues."""

from __future__ import annotations

import os
import time

from pia_ray import storage
from pia_ray.config.knobs import AnimationParams
from pia_ray.errors import Cancelled
from pia_ray.online.rendering.renderer import RenderRequest
from pia_ray.online.video_jobs import JobStore, VideoJob


def create(jobs: JobStore, owner: str = "owner-0", prompt: str = "waves") -> VideoJob:
    """A new job of that owner."""
    request = RenderRequest("", AnimationParams(prompt=prompt, num_inference_steps=25), b"picture", priority=1)
    return jobs.create(request, owner=owner, model="demo", seconds="2", size="64x64", max_open=1000)


def seeded(prefix: str, num_jobs: int, scratch: str, *, num_owners: int = 100) -> dict[str, str]:
    """Objects by their names below the prefix: of that many waiting jobs of some owners and ended ones of "archive".

    They are copies of two jobs that are made below `scratch`, a folder of a disk.
    """
    found_of_all = {"inputs/all/image": "picture"}
    for owner, ended in (("owner-0", False), ("archive", True)):
        jobs = JobStore(f"{scratch}/{owner}")
        job = create(jobs, owner)
        if ended:
            jobs.queue.fail(
                jobs.queue.claim(jobs.queue.read(jobs.queue.entries()[0]), worker="seed"), Cancelled("seeded")
            )
        found = {each.uri: storage.read_bytes(each.uri).decode() for each in storage.list_objects(f"{scratch}/{owner}")}
        objects = {
            uri.removeprefix(f"{scratch}/{owner}/"): content
            for uri, content in found.items()
            if "/inputs/" not in uri and "/requests/" not in uri
        }
        folder = jobs.owner_folder(owner)
        began_us = int(time.time() * 1e6) - 10**6 * num_jobs
        for number in range(num_jobs):
            other = owner if ended else f"owner-{number % num_owners}"
            names = {
                job.inputs["image"]: f"{prefix}/inputs/all/image",
                **_names(job.id, _other_id(job.id, began_us + number * 10**6)),
                folder: jobs.owner_folder(other),
                f'"owner":"{owner}"': f'"owner":"{other}"',
            }
            for name, content in objects.items():
                found_of_all[_replaced(name, names)] = _replaced(content, names)
    return found_of_all


def _other_id(job_id: str, time_us: int) -> str:
    return f"video_{time_us:014x}{job_id[20:40]}{os.urandom(6).hex()}"


def _names(job_id: str, other_id: str) -> dict[str, str]:
    """What stands for a job's id in names and documents: the id itself, and its time backwards, in one part or two."""
    before, after = _backwards(job_id), _backwards(other_id)
    return {
        job_id: other_id,
        before: after,
        f"{before[:6]}/{before[6:]}": f"{after[:6]}/{after[6:]}",
    }


def _backwards(job_id: str) -> str:
    return f"{2**52 - 1 - int(job_id.removeprefix('video_')[:14], 16):013x}"


def _replaced(text: str, names: dict[str, str]) -> str:
    for name, other in names.items():
        text = text.replace(name, other)
    return text
