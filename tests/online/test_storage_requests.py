"""Requests to storage: as many for a long queue as for a short one, and few where nothing happens."""

from __future__ import annotations

import asyncio
import importlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from pia_ray import storage
from pia_ray.config.knobs import AnimationParams
from pia_ray.config.serve import ServeConfig
from pia_ray.online.batches.runner import BatchRunner
from pia_ray.online.batches.store import BatchStore
from pia_ray.online.files import FileStore
from pia_ray.online.rendering.renderer import BATCH_LINE, RenderRequest
from pia_ray.online.service import create_endpoint
from pia_ray.online.video_jobs import JobStore, VideoJob
from pia_ray.online.video_jobs.creation import LineRequest
from pia_ray.online.video_jobs.dispatcher import MAX_ENTRIES, Dispatcher
from tests.online.video_jobs.test_dispatcher import ScriptedRenderer
from tests.online.video_server import batch_lines
from tests.s3_server import point_at

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Imports a module of the benchmarks."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


@pytest.fixture
def server(tools: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """An S3 server in this process, whose objects a test can put there at once."""
    with tools("s3_memory").S3Memory() as server:
        serving = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        serving.start()
        point_at(monkeypatch, server.environment, tmp_path)
        yield server
        storage.forget_clients()
        server.shutdown()
        serving.join()


def requests_of(call: Callable[[], object]) -> dict[str, int]:
    before = storage.usage().requests
    call()
    now = storage.usage().requests
    return {name: num - before.get(name, 0) for name, num in now.items() if num > before.get(name, 0)}


def total(requests: dict[str, int]) -> int:
    return sum(requests.values())


async def claim_one(jobs: JobStore) -> None:
    renderer = ScriptedRenderer(step_s=3600)
    working = asyncio.create_task(Dispatcher(renderer, jobs, max_in_flight=1, sweep_s=3600).run())
    while not renderer.begun:
        await asyncio.sleep(0.01)
    working.cancel()
    await asyncio.wait((working,))


def costs_of_calls(server: Any, seeds: ModuleType, num_jobs: int, tmp_path: Path) -> dict[str, dict[str, int]]:
    """The requests of each call where so many jobs wait, and as many of one owner have ended."""
    prefix = f"s3://jobs-{num_jobs}/serve"
    seeded = seeds.seeded(prefix, num_jobs, f"{tmp_path}/{num_jobs}")
    server.bucket(f"jobs-{num_jobs}").load({f"serve/{name}": content for name, content in seeded.items()})
    jobs = JobStore(prefix)
    dispatcher = Dispatcher(ScriptedRenderer(), jobs)
    job = seeds.create(jobs, "caller", "the first one reads the clock and looks for jobs of 0.1.0")
    page = jobs.list("archive", limit=20)
    ids = [each.id for each in page.documents]
    assert ids == sorted(ids, reverse=True)
    assert len(ids) == 20
    calls = {
        "create": lambda: seeds.create(jobs, "caller"),
        "status": lambda: jobs.get("caller", job.id),
        "first page": lambda: jobs.list("archive", limit=20),
        "next page": lambda: jobs.list("archive", limit=20, after=ids[-1]),
        "oldest page": lambda: jobs.list("archive", limit=20, order="asc"),
        "outlook": lambda: asyncio.run(dispatcher.outlook(job)),
        "cancel": lambda: jobs.cancel("caller", job.id),
        "claim": lambda: asyncio.run(claim_one(jobs)),
    }
    return {name: requests_of(call) for name, call in calls.items()}


def test_every_call_costs_as_many_requests_with_2000_jobs_as_with_50(
    server: Any, tools: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    few, many = (costs_of_calls(server, tools("seeded_jobs"), num_jobs, tmp_path) for num_jobs in (50, 2000))
    # The queue is a page of its own length, of which some owners' parts are read where it is longer.
    for name in ("create", "status", "first page", "next page", "cancel"):
        assert few[name] == many[name]
    assert total(few["create"]) == 5
    assert total(few["first page"]) == total(few["next page"]) == 22
    assert total(many["oldest page"]) <= total(few["oldest page"]) + 10
    for name, num_lists in (("outlook", 12), ("claim", 6)):
        assert total(many[name]) <= total(few[name]) + num_lists


def test_an_hour_without_calls_costs_less_than_400_requests(server: Any, tools: Callable[[str], ModuleType]) -> None:
    prefix = "s3://idle/serve"
    config = ServeConfig(storage=prefix, webhook_secret="whsec_" + "A" * 32)  # type: ignore[arg-type]
    app = create_endpoint(ScriptedRenderer(), JobStore(prefix), config)

    async def work(time_s: float) -> None:
        async with app.state.service.at_work():
            await asyncio.sleep(time_s)

    with tools("fake_clock").runner() as loop:
        # 20 are what each start reads.
        assert total(requests_of(lambda: loop.run(work(300)))) < 400 / 12 + 20


def test_each_owner_of_a_long_queue_gets_its_turn(tools: Callable[[str], ModuleType], tmp_path: Path) -> None:
    seeds, prefix, num_owners = tools("seeded_jobs"), str(tmp_path / "serve"), 10
    seeded = seeds.seeded(prefix, MAX_ENTRIES + 50, str(tmp_path / "seeds"), num_owners=num_owners)
    for name, content in seeded.items():
        path = Path(prefix, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    jobs, renderer = JobStore(prefix), ScriptedRenderer(step_s=0.0)
    late = seeds.create(jobs, "late", "late")

    async def work() -> None:
        async with asyncio.timeout(60):
            working = asyncio.create_task(Dispatcher(renderer, jobs, max_in_flight=2, poll_s=0.05).run())
            while late.params.prompt not in renderer.begun:
                await asyncio.sleep(0.005)
            working.cancel()
            await asyncio.wait((working,))

    asyncio.run(work())
    assert len(renderer.begun) <= 2 * num_owners  # about a job of each owner before it, not all that are older


def test_the_last_page_of_files_costs_as_much_as_the_first(server: Any) -> None:
    files = FileStore("s3://files/serve", ttl_s=3600)
    made = [files.create("ann", b"x", filename="x", purpose="vision").id for _ in range(40)]
    costs = []
    for after in (None, made[6]):
        page = files.list("ann", after=after, limit=5, order="desc", purpose="vision")
        assert len(page.documents) == 5
        costs.append(total(requests_of(lambda: files.list("ann", after=after, limit=5, order="desc"))))  # noqa: B023
    assert costs == [7, 7]


def test_a_batch_reads_its_input_file_once_however_many_are_open(server: Any, tmp_path: Path) -> None:
    files, batches = FileStore("s3://batches/serve", ttl_s=3600), BatchStore("s3://batches/serve", ttl_s=3600)
    jobs = JobStore("s3://batches/serve")

    async def submit(line: LineRequest) -> VideoJob:
        request = RenderRequest("", AnimationParams(prompt=f"{line.body['prompt']}"), b"x", priority=BATCH_LINE)
        return jobs.create(
            request,
            owner=line.owner,
            model="demo",
            seconds="2",
            size="64x64",
            batch_id=line.batch_id,
            job_id=line.job_id,
        )

    runner = BatchRunner(batches, files, jobs=jobs, submit=submit, video_object=lambda _: {})
    for _ in range(5):
        file = files.create("ann", batch_lines({"prompt": "waves"}), filename="lines", purpose="batch")
        batches.create("ann", file.id, metadata=None, window_s=3600)

    async def ticks(num: int) -> None:
        for _ in range(num):
            await runner.tick()

    with asyncio.Runner() as loop:
        loop.run(ticks(3))
        assert len(jobs.queue.entries()) == 5
        assert requests_of(lambda: loop.run(ticks(1))) == {"ListObjectsV2": 1 + 5, "GetObject": 5}
