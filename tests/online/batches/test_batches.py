"""/v1/files and /v1/batches with the real openai client, and batches that outlive servers and their time."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI
from openai.types import Batch, Video

from pia_ray import ledger, storage
from pia_ray.cli.main import main
from pia_ray.config.knobs import AnimationParams
from pia_ray.errors import BadParameter, Busy, FetchUnavailable, NotFound
from pia_ray.media import video
from pia_ray.online.batches.input_file import read_lines
from pia_ray.online.batches.runner import BatchRunner
from pia_ray.online.batches.store import Batch as StoredBatch
from pia_ray.online.batches.store import BatchStore
from pia_ray.online.files import FileStore
from pia_ray.online.rendering.renderer import BATCH_LINE, RenderRequest
from pia_ray.online.routes.videos import video_object
from pia_ray.online.video_jobs import JobStore, VideoJob
from pia_ray.online.video_jobs.creation import LineRequest
from tests.online.video_server import QUICK, VideoServer, batch_lines, data_url, hash_of, png, serve_videos
from tests.s3_server import s3, s3_server
from tests.tables import num_entries

__all__ = ["s3", "s3_server"]  # fixtures

pytestmark = pytest.mark.filterwarnings("ignore:The Sora API is scheduled:DeprecationWarning")

heavy = pytest.mark.heavy


def body(prompt: str = "waves", **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "image": data_url(png()), **QUICK, **more}


def upload(client: OpenAI, content: bytes, purpose: Any = "batch", name: str = "lines.jsonl") -> str:
    return client.files.create(file=(name, content), purpose=purpose).id


def begin(client: OpenAI, content: bytes, **more: Any) -> Batch:
    return client.batches.create(
        input_file_id=upload(client, content), endpoint="/v1/videos", completion_window="24h", **more
    )


def wait_for(client: OpenAI, batch: Batch, *, timeout_s: float = 60) -> Batch:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        batch = client.batches.retrieve(batch.id)
        if batch.status in ("completed", "failed", "expired", "cancelled"):
            return batch
        time.sleep(0.1)
    raise AssertionError(f"the batch is still {batch.status}: {batch.request_counts}")


def wait_until(done: Callable[[], bool], *, timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def lines_of(client: OpenAI, file_id: str | None) -> dict[str, dict[str, Any]]:
    if file_id is None:
        return {}
    found = [json.loads(line) for line in client.files.content(file_id).text.splitlines()]
    return {line["custom_id"]: line for line in found}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VideoServer]:
    keys = [hash_of(key) for key in ("ann", "bob", "list")]
    with serve_videos(str(tmp_path_factory.mktemp("serve")), step_s=0.02, api_keys=keys) as up:
        yield up


@pytest.fixture
def client(server: VideoServer) -> OpenAI:
    return server.client("ann")


@heavy
@pytest.mark.parametrize("store", ["local", "s3"])
def test_a_batch_makes_its_videos_and_names_the_lines_that_failed(
    store: str, tmp_path: Path, request: pytest.FixtureRequest
):
    prefix = str(tmp_path / "serve") if store == "local" else f"{request.getfixturevalue('s3')}/serve"
    with serve_videos(prefix) as up:
        client = up.client()
        picture = upload(client, png(96, 48), "vision", "cat.png")
        asked = batch_lines(
            body("first", seed=2**64 - 1),
            {**body("by file", width=None, height=None), "image": {"file_id": picture}},
            body("wrong knob", motion_scale=99),
            body("nan"),
        )
        batch = wait_for(client, begin(client, asked, metadata={"season": "autumn"}))
        assert (batch.status, batch.errors, batch.metadata) == ("completed", None, {"season": "autumn"})
        assert batch.request_counts is not None
        assert batch.request_counts.model_dump() == {"total": 4, "completed": 2, "failed": 2}
        made, wrong = lines_of(client, batch.output_file_id), lines_of(client, batch.error_file_id)
        assert (set(made), set(wrong)) == ({"line-0", "line-1"}, {"line-2", "line-3"})
        first = Video.construct(**made["line-0"]["response"]["body"])
        assert (first.status, first.prompt, first.params["seed"]) == ("completed", "first", str(2**64 - 1))
        assert video.probe(client.videos.download_content(first.id).content).num_frames == 4
        assert client.videos.retrieve(first.id).batch_id == batch.id
        assert wrong["line-2"]["response"]["status_code"] == 400
        assert wrong["line-2"]["response"]["body"]["error"]["param"] == "motion_scale"
        assert wrong["line-3"]["error"]["code"] == "nan_frames"
    output = storage.join(prefix, "batches", "outputs", batch.id)
    rows = {row["id"]: row for row in ledger.read_results(output).to_pylist()}
    assert [rows[f"line-{n}"]["error_code"] for n in range(4)] == [None, None, "bad_parameter", "nan_frames"]
    assert rows["line-0"]["seed"] == 2**64 - 1
    assert storage.head(rows["line-0"]["video_uri"]).size_bytes == rows["line-0"]["size_bytes"]
    summary = ledger.summary(ledger.Ledger.open(output))
    assert (summary.num_succeeded, summary.num_failed) == (2, 2)
    assert main(["report", output]) in (0, 1)
    assert main(["gallery", output]) == 0
    assert b"by file" in storage.read_bytes(storage.join(output, "index.html"))


@heavy
def test_an_input_file_with_faults_fails_as_a_whole_and_names_the_lines(client: OpenAI):
    content = batch_lines(body(), body()).replace(b'"line-1"', b'"line-0"') + b"\nno json\n[]\n"
    content += b'{"custom_id": "x", "method": "GET", "url": "/v1/videos", "body": {}}\n'
    content += b'{"custom_id": "y", "method": "POST", "url": "/v1/responses", "body": {}}\n'
    batch = wait_for(client, begin(client, content))
    assert (batch.status, batch.output_file_id) == ("failed", None)
    assert batch.errors is not None and batch.errors.data is not None
    assert [(fault.line, fault.code) for fault in batch.errors.data] == [
        (2, "duplicate_custom_id"),
        (4, "invalid_json_line"),
        (5, "invalid_json_line"),
        (6, "invalid_method"),
        (7, "invalid_url"),
    ]
    empty = wait_for(client, begin(client, b"\n\n"))
    assert empty.errors is not None and empty.errors.data is not None
    assert empty.errors.data[0].code == "empty_file"


@heavy
def test_a_cancelled_batch_keeps_what_is_made_and_frees_the_engines(client: OpenAI):
    # The engine takes two rows: one line that hangs leaves room for the quick one, whichever is made a job first.
    batch = begin(client, batch_lines(body("quick"), body("hang")))
    wait_until(lambda: client.batches.retrieve(batch.id).request_counts.completed == 1)
    others = begin(client, batch_lines(*[body("hang", seed=n) for n in range(1, 4)]))
    wait_until(lambda: client.batches.retrieve(others.id).status == "in_progress")
    for asked in (batch, others):
        assert client.batches.cancel(asked.id).status == "cancelling"
    assert wait_for(client, others).status == "cancelled"
    batch = wait_for(client, batch)
    assert (batch.status, set(lines_of(client, batch.output_file_id))) == ("cancelled", {"line-0"})
    assert {line["error"]["code"] for line in lines_of(client, batch.error_file_id).values()} == {"batch_cancelled"}
    assert client.batches.cancel(batch.id).status == "cancelled"
    alone = client.videos.create(prompt="waves", input_reference=png(), extra_body=QUICK)
    assert client.videos.poll(alone.id).status == "completed"


@heavy
def test_a_video_that_somebody_waits_for_goes_before_the_lines_of_a_batch(client: OpenAI):
    slow = [body(f"line {n}", num_inference_steps=20, seed=n) for n in range(12)]
    batch = begin(client, batch_lines(*slow))
    deadline = time.monotonic() + 30
    while client.batches.retrieve(batch.id).status == "validating" and time.monotonic() < deadline:
        time.sleep(0.05)
    alone = client.videos.create(prompt="now", input_reference=png(), extra_body=QUICK)
    alone = client.videos.poll(alone.id)
    batch = wait_for(client, batch)
    made = [line["response"]["body"]["completed_at"] for line in lines_of(client, batch.output_file_id).values()]
    assert len(made) == 12
    assert sum(at > alone.completed_at for at in made) >= 1


@heavy
def test_a_batch_outlives_its_server_and_the_deletion_of_its_file_and_makes_each_line_once(tmp_path: Path):
    asked = batch_lines(*[body(f"number {n}", num_inference_steps=10) for n in range(8)])
    with serve_videos(str(tmp_path), step_s=0.03) as up:
        client = up.client()
        batch = begin(client, asked)
        while client.batches.retrieve(batch.id).request_counts.completed < 2:
            time.sleep(0.05)
        client.files.delete(batch.input_file_id)
    with serve_videos(str(tmp_path)) as one, serve_videos(str(tmp_path)) as two:  # two at once
        client = one.client()
        batch = wait_for(two.client(), batch)
        assert (batch.status, len(lines_of(client, batch.output_file_id))) == ("completed", 8)
        assert sorted(each.prompt for each in client.videos.list(limit=100)) == [f"number {n}" for n in range(8)]


@heavy
def test_files_are_listed_downloaded_and_deleted_by_their_key_alone(server: VideoServer):
    client, other = server.client("list"), server.client("bob")
    ids = [upload(client, f"number {n}".encode(), "user_data", f"../{n}.txt") for n in range(5)]
    assert [each.id for each in client.files.list(limit=2)] == ids[::-1]
    assert [each.id for each in client.files.list(limit=2, order="asc", purpose="user_data")] == ids
    assert list(client.files.list(purpose="batch")) == []
    found = client.files.retrieve(ids[3])
    assert (found.filename, found.bytes, found.purpose, found.status) == ("3.txt", 8, "user_data", "processed")
    answer = client.files.content(ids[3])
    assert answer.content == b"number 3"
    assert answer.response.headers["content-disposition"].startswith("attachment")
    for call in (other.files.retrieve, other.files.content, other.files.delete):
        with pytest.raises(openai.NotFoundError):
            call(ids[0])
    assert client.files.delete(ids[0]).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.content(ids[0])
    batch = begin(client, batch_lines(body()))
    with pytest.raises(openai.NotFoundError):
        other.batches.retrieve(batch.id)
    with pytest.raises(openai.NotFoundError):
        other.batches.cancel(batch.id)
    with pytest.raises(openai.NotFoundError):
        other.batches.create(input_file_id=batch.input_file_id, endpoint="/v1/videos", completion_window="24h")
    assert list(other.batches.list()) == []
    newer = begin(client, b"no json")
    assert [each.id for each in client.batches.list(limit=1)] == [newer.id, batch.id]
    wait_for(client, batch)


@heavy
def test_what_is_not_a_file_or_batch_of_the_caller_is_refused(client: OpenAI):
    def refused(call: Any) -> str | None:
        with pytest.raises(openai.BadRequestError) as caught:
            call()
        return caught.value.param

    file_id = upload(client, b"x", "user_data")
    new: Any = client.batches.create
    good = {"input_file_id": file_id, "endpoint": "/v1/videos", "completion_window": "24h"}
    assert refused(lambda: new(**good)) == "input_file_id"
    assert refused(lambda: new(**{**good, "endpoint": "/v1/responses"})) == "endpoint"
    assert refused(lambda: new(**{**good, "completion_window": "1h"})) == "completion_window"
    assert refused(lambda: new(**good, metadata={"k": "v" * 600})) == "metadata"
    assert refused(lambda: new(**good, extra_body={"output_path": "/tmp/x"})) == "output_path"
    assert refused(lambda: upload(client, b"x", "fine-tune")) == "purpose"
    assert refused(lambda: upload(client, b"", "batch")) == "file"
    expires: Any = {"anchor": "created_at", "seconds": 5}
    assert refused(lambda: client.files.create(file=b"x", purpose="batch", expires_after=expires)) == "expires_after"
    expires["seconds"] = 3600
    kept = client.files.create(file=b"x", purpose="batch", expires_after=expires)
    assert kept.expires_at == pytest.approx(kept.created_at + 3600, abs=1)


class BatchStores:
    """A batch runner over local storage, whose lines become jobs that nobody renders."""

    def __init__(self, folder: Path, loop: asyncio.Runner) -> None:
        self.loop = loop
        self.files = FileStore(str(folder), ttl_s=3600)
        self.batches = BatchStore(str(folder), ttl_s=0)
        self.jobs = JobStore(str(folder))
        self.fault: Exception | None = None
        self.down: set[str] = set()
        """Prompts of lines whose picture's server does not answer."""
        self.slow: set[str] = set()
        """Prompts of bob's lines whose picture's server never ends its answer."""
        self.pauses_s: Sequence[float] = (0.0, 0.0, 0.0)
        self.asked: list[LineRequest] = []
        self.runner = self.new_runner()

    def new_runner(self, **how: Any) -> BatchRunner:
        show = lambda job: video_object(job).model_dump(mode="json")  # noqa: E731
        given = {"pauses_s": self.pauses_s, **how}
        return BatchRunner(self.batches, self.files, jobs=self.jobs, submit=self.submit, video_object=show, **given)

    async def submit(self, line: LineRequest) -> VideoJob:
        self.asked.append(line)
        if self.fault is not None:
            raise self.fault
        if line.body["prompt"] in self.down:
            raise FetchUnavailable("the server does not answer")
        if line.owner == "bob" and line.body["prompt"] in self.slow:
            await asyncio.Event().wait()
        params = AnimationParams(prompt=str(line.body["prompt"]))
        request = RenderRequest(id="", params=params, image=b"x", priority=BATCH_LINE)
        return self.jobs.create(
            request,
            owner=line.owner,
            model="demo",
            seconds="2",
            size="64x64",
            batch_id=line.batch_id,
            idempotency_key=line.idempotency_key,
        )

    def begin(self, count: int, *, owner: str = "ann", window_s: float = 3600) -> str:
        lines = batch_lines(*[{"prompt": f"number {n}"} for n in range(count)])
        file = self.files.create(owner, lines, filename="lines.jsonl", purpose="batch")
        return self.batches.create(owner, file.id, metadata=None, window_s=window_s).id

    def tick(self, times: int = 1) -> None:
        for _ in range(times):
            self.loop.run(self.runner.tick())


@pytest.fixture
def stores(tmp_path: Path) -> Iterator[BatchStores]:
    with asyncio.Runner() as loop:  # one for all ticks: lines that a tick leaves on their way go on in the next
        yield BatchStores(tmp_path, loop)


def test_a_batch_whose_time_is_over_gives_up_what_is_not_made(stores: BatchStores):
    batch_id = stores.begin(3)
    stores.tick(2)
    assert len(stores.jobs.list("ann").documents) == 3
    stores.batches.change("ann", batch_id, lambda _: {"expires_at": time.time() - 1})
    stores.tick(2)
    batch = stores.batches.get("ann", batch_id)
    assert (batch.status, batch.num_failed, batch.output_file_id) == ("expired", 3, None)
    assert all(job.cancelled for job in stores.jobs.list("ann").documents)
    assert batch.error_file_id is not None
    codes = [json.loads(line)["error"]["code"] for line in stores.files.read("ann", batch.error_file_id).splitlines()]
    assert codes == ["batch_expired"] * 3
    assert list(stores.batches.open_batches()) == []


def test_a_batch_makes_so_many_jobs_at_once_and_more_as_they_end(stores: BatchStores):
    stores.begin(40)
    stores.tick(9)
    assert stores.jobs.num_open("ann") == 0  # lines take no places of the key's own
    waiting = stores.jobs.queue.entries()
    assert len(waiting) == 32
    for entry in waiting[:5]:
        stores.jobs.cancel("ann", entry.id)
    stores.tick(5)
    assert len(stores.jobs.queue.entries()) == 32


def test_keys_whose_batches_have_ended_take_no_memory(stores: BatchStores):
    def end_batches(first: int) -> int:
        """Entries that the runner holds after batches of so many more keys were refused."""
        for number in range(first, first + 5):
            stores.batches.create(f"key {number}", "file-" + "0" * 48, metadata=None, window_s=60)
        stores.tick(2)
        assert list(stores.batches.open_batches()) == []
        return num_entries(stores.runner)

    before = end_batches(0)
    assert end_batches(5) == before


def test_the_batches_of_one_key_are_so_many_jobs_together_and_hold_no_other_key(stores: BatchStores):
    stores.runner = stores.new_runner(owner_window=10)
    for _ in range(3):
        stores.begin(6)
    stores.begin(4, owner="bob")

    def num_jobs(owner: str) -> int:
        return len(stores.jobs.list(owner, limit=50).documents)

    def tick_until(ann: int) -> None:
        for _ in range(20):
            stores.tick()
            if (num_jobs("ann"), num_jobs("bob")) == (ann, 4):
                break
        stores.tick()
        assert (num_jobs("ann"), num_jobs("bob")) == (ann, 4)

    tick_until(10)
    for job in stores.jobs.list("ann").documents[:4]:
        stores.jobs.cancel("ann", job.id)
    tick_until(14)


def test_a_line_that_the_endpoint_cannot_take_now_waits_as_long_as_it_takes(stores: BatchStores):
    batch_id = stores.begin(2)
    stores.fault = Busy("later")
    stores.tick(9)
    assert stores.batches.get("ann", batch_id).num_failed == 0
    stores.fault = BadParameter("never", "prompt")
    stores.tick(2)
    batch = stores.batches.get("ann", batch_id)
    assert (batch.status, batch.num_failed) == ("completed", 2)


def test_a_line_whose_pictures_server_is_down_fails_alone_after_some_tries(stores: BatchStores):
    batch_id = stores.begin(12)
    stores.down = {"number 0", "number 5"}
    stores.tick(2)
    assert len(stores.jobs.queue.entries()) == 10  # also of the lines behind those that wait
    stores.tick(4)
    asked = [line.body["prompt"] for line in stores.asked]
    assert (asked.count("number 0"), asked.count("number 5"), asked.count("number 1")) == (4, 4, 1)
    for entry in stores.jobs.queue.entries():
        stores.jobs.delete("ann", entry.id)
    stores.tick()
    batch = stores.batches.get("ann", batch_id)
    assert (batch.status, batch.num_failed) == ("completed", 12)
    outcomes = stores.batches.read_outcomes(batch)
    failed = [each for each in outcomes if each.row["error_code"] == "fetch_unavailable"]
    assert [each.line for each in failed] == [0, 5]
    assert failed[0].record["response"]["body"]["error"]["code"] == "fetch_unavailable"


def test_a_pause_grows_with_each_try_of_a_line(stores: BatchStores):
    batch_id = stores.begin(1)
    stores.down, stores.pauses_s = {"number 0"}, (100.0, 1000.0)
    stores.runner = stores.new_runner()
    pauses = []
    stores.tick()
    for _ in range(2):
        began = time.time()
        stores.tick(3)
        waits = stores.batches.get("ann", batch_id).waiting[0]
        pauses.append(round(waits.not_before - began, -2))
        due = {0: waits.model_copy(update={"not_before": 0.0})}
        stores.batches.change("ann", batch_id, lambda _, due=due: {"waiting": due})
    assert (pauses, len(stores.asked)) == ([100, 1000], 2)


def test_slow_servers_of_one_key_hold_no_other_key_and_no_line_behind_them(stores: BatchStores):
    slow, other = stores.begin(20, owner="bob"), stores.begin(3)
    stores.slow = {f"number {n}" for n in range(5)}

    async def work() -> None:
        running = asyncio.create_task(stores.runner.run(0.01))
        async with asyncio.timeout(20):
            while len(stores.batches.get("ann", other).jobs) < 3 or len(stores.batches.get("bob", slow).jobs) < 15:
                await asyncio.sleep(0.01)
        waiting = stores.batches.get("bob", slow).waiting
        assert sorted(waiting) == [0, 1, 2, 3, 4]
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)

    asyncio.run(work())
    stores.slow = set()
    stores.tick()  # of whoever takes over
    assert len(stores.jobs.list("bob").documents) == 20


def test_a_cancelled_batch_gives_up_the_lines_that_wait_for_another_try(stores: BatchStores):
    batch_id = stores.begin(3)
    stores.down, stores.pauses_s = {"number 1"}, (100.0,)
    stores.runner = stores.new_runner()
    stores.tick(2)
    stores.batches.cancel("ann", batch_id)
    stores.tick(2)
    batch = stores.batches.get("ann", batch_id)
    assert (batch.status, batch.num_failed, batch.waiting) == ("cancelled", 3, {})


def test_another_runner_takes_over_only_when_the_lease_is_over_and_makes_no_line_twice(stores: BatchStores):
    batch_id = stores.begin(3)
    stores.tick(2)
    first, stores.runner = stores.runner, stores.new_runner()
    stores.tick()
    num_asked = len(stores.asked)
    forgotten = {"lease_until": 0.0, "next_line": 0, "jobs": {}}  # as if it had died before it wrote the jobs down
    stores.batches.change("ann", batch_id, lambda _: forgotten)
    stores.tick()
    assert len(stores.asked) == num_asked + 3
    assert len(stores.jobs.list("ann").documents) == 3
    asyncio.run(first.tick())
    assert len(stores.asked) == num_asked + 3


class SlowStore(BatchStore):
    """A store whose changes wait until they are let on, once that is asked for."""

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder), ttl_s=0)
        self.held, self.let_on = threading.Event(), threading.Event()

    def change_read(self, batch: StoredBatch, edit: Callable[[StoredBatch], Mapping[str, Any]]) -> StoredBatch:
        if not self.let_on.is_set():
            self.held.set()
            assert self.let_on.wait(60)
        return super().change_read(batch, edit)


def test_a_runner_that_is_ended_in_the_midst_of_a_change_leaves_its_batches_to_others_at_once(
    stores: BatchStores, tmp_path: Path
):
    batch_id = stores.begin(2)
    ready, stores.batches = stores.batches, SlowStore(tmp_path)
    slow, runner = stores.batches, stores.new_runner()

    async def work() -> None:
        running = asyncio.create_task(runner.run(0.01))
        assert await asyncio.to_thread(slow.held.wait, 60)
        running.cancel()
        await asyncio.sleep(0)
        slow.let_on.set()
        await asyncio.gather(running, return_exceptions=True)

    asyncio.run(work())
    assert ready.get("ann", batch_id).lease_owner  # the change was made, though its caller had gone
    assert ready.get("ann", batch_id).lease_until == 0
    stores.tick(2)
    assert len(stores.jobs.list("ann").documents) == 2


def test_a_line_whose_video_is_deleted_fails_as_such(stores: BatchStores):
    batch_id = stores.begin(1)
    stores.tick(2)
    stores.jobs.delete("ann", stores.jobs.list("ann").documents[0].id)
    stores.tick()
    batch = stores.batches.get("ann", batch_id)
    assert (batch.status, batch.num_failed) == ("completed", 1)
    outcomes = stores.batches.read_outcomes(batch)
    assert [each.record["error"]["code"] for each in outcomes] == ["video_deleted"]


def test_what_has_expired_is_swept_and_what_is_open_stays(stores: BatchStores):
    old = stores.files.create("ann", b"old", filename="old", purpose="vision", ttl_s=-1)
    with pytest.raises(NotFound):
        stores.files.get("ann", old.id)
    kept = stores.files.create("ann", b"new", filename="new", purpose="vision")
    assert (stores.files.sweep(), stores.files.read("ann", kept.id)) == (1, b"new")
    ended, open_still = stores.begin(1, window_s=-1), stores.begin(1)
    stores.tick(3)
    time.sleep(0.01)
    assert stores.batches.sweep() == 1
    with pytest.raises(NotFound):
        stores.batches.get("ann", ended)
    assert stores.batches.get("ann", open_still).status == "in_progress"


def test_an_id_of_any_other_form_reaches_no_path(stores: BatchStores):
    for file_id in ("../../x", "file_", "file_" + "g" * 38, "batch_" + "0" * 38, "file_" + "0" * 39, "\0", ""):
        with pytest.raises(NotFound):
            stores.files.get("ann", file_id)
        with pytest.raises(NotFound):
            stores.batches.get("ann", file_id)


def test_lines_that_are_not_requests_have_their_own_errors():
    deep = b'{"custom_id": "a", "method": "POST", "url": "/v1/videos", "body": ' + b"[" * 100_000
    lines, faults = read_lines(b"\n".join([deep, b"\xff\xfe", b'{"custom_id": 5}', batch_lines(body())]))
    assert [line.custom_id for line in lines] == ["line-0"]
    assert [(fault.line, fault.code) for fault in faults] == [
        (1, "invalid_json_line"),
        (2, "invalid_json_line"),
        (3, "missing_required_parameter"),
    ]
