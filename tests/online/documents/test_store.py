"""Documents on a disk and on an S3 server, and the tree that version 0.1.0 of the endpoint left behind."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from pia_ray import storage
from pia_ray.config.knobs import AnimationParams
from pia_ray.errors import Conflict, NotFound, StorageError
from pia_ray.online.batches.runner import BatchRunner
from pia_ray.online.batches.store import BatchStore
from pia_ray.online.documents.document import Document, Index, Kind
from pia_ray.online.documents.store import DocumentStore
from pia_ray.online.files import FileStore
from pia_ray.online.rendering.renderer import RenderRequest
from pia_ray.online.routes.videos import video_object
from pia_ray.online.video_jobs import JobStore
from pia_ray.online.video_jobs.creation import LineRequest
from pia_ray.online.video_jobs.documents import JobDocuments
from tests.online.video_jobs.test_store import rendered
from tests.s3_server import s3, s3_server

__all__ = ["s3", "s3_server"]  # fixtures

EARLIER = Path(__file__).parents[2] / "data" / "endpoint-0.1.0"
"""Written by the stores of version 0.1.0 (commit 231700f) for the owners ann and bob. Never to be made anew."""


class Note(Document):
    text: str = ""
    open: bool = True
    expires_at: float | None = None


OPEN = Index[Note]("open", lambda note: 0 if note.open else None)
URGENT = Index[Note]("urgent", lambda note: len(note.text), digits=3)


@pytest.fixture(params=["local", "s3"])
def prefix(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "notes") if request.param == "local" else f"{request.getfixturevalue('s3')}/notes"


def store_of(prefix: str) -> DocumentStore[Note]:
    kind = Kind(name="note", model=Note, folder="notes", expires_at=lambda note: note.expires_at)

    def remove_content(_: str, note_id: str) -> None:
        storage.delete(f"{prefix}/content/{note_id}")

    return DocumentStore(prefix, kind, indexes=(OPEN, URGENT), remove_content=remove_content)


def create(notes: DocumentStore[Note], text: str = "", *, owner: str = "ann", **more: Any) -> Note:
    note = Note(id=notes.new_id(), owner=owner, created_at=notes.now(), text=text, **more)
    assert notes.create(note)
    return note


def left_below(prefix: str) -> list[str]:
    return [found.uri.removeprefix(prefix) for found in storage.list_objects(prefix)]


def test_a_document_is_in_its_indexes_and_leaves_them_with_a_change(prefix: str) -> None:
    notes = store_of(prefix)
    long, short = create(notes, "a long text"), create(notes, "short", owner="bob")
    assert [entry.id for entry in notes.entries(OPEN)] == [long.id, short.id]
    assert [(entry.rank, entry.id) for entry in notes.entries(URGENT)] == [(5, short.id), (11, long.id)]
    assert [entry.id for entry in notes.entries(URGENT, 1)] == [short.id]
    changed = notes.change("ann", long.id, lambda _: {"open": False, "text": "a"})
    assert notes.read("ann", long.id).document == changed
    assert changed.revision == 1
    assert [entry.id for entry in notes.entries(OPEN)] == [short.id]
    assert [entry.rank for entry in notes.entries(URGENT)] == [1, 5]
    assert notes.read_entry(notes.entries(OPEN)[0]).document == short
    notes.delete(changed)
    notes.delete(short)
    assert left_below(prefix) == []


def test_a_document_that_is_there_is_not_created_again(prefix: str) -> None:
    notes = store_of(prefix)
    note = create(notes, "first")
    assert not notes.create(note.model_copy(update={"text": "second"}))
    assert notes.read("ann", note.id).document.text == "first"


def test_of_two_changes_that_meet_one_is_refused_and_an_edit_is_made_again(prefix: str) -> None:
    notes = store_of(prefix)
    note = create(notes)
    at = notes.read("ann", note.id)
    second = notes.replace(at, {"text": "by the quick"})
    with pytest.raises(Conflict):
        notes.replace(at, {"text": "by the slow"})
    assert notes.replace(second, {"text": "again"}).document.revision == 2
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda _: notes.change("ann", note.id, lambda now: {"text": now.text + "+"}), range(8)))
    assert notes.read("ann", note.id).document.text == "again" + "+" * 8


def test_a_page_is_full_whatever_is_left_out_of_it_and_says_whether_more_follow(prefix: str) -> None:
    notes = store_of(prefix)
    made = [create(notes, text) for text in "abababab"]
    create(notes, "a", owner="bob")
    wanted = [note.id for note in made if note.text == "a"]
    page = notes.list("ann", limit=3, order="asc", where=lambda note: note.text == "a")
    assert [note.id for note in page.documents] == wanted[:3]
    assert page.has_more
    page = notes.list("ann", after=wanted[0], limit=3, order="asc", where=lambda note: note.text == "a")
    assert [note.id for note in page.documents] == wanted[1:]
    assert not page.has_more
    assert [note.id for note in notes.list("ann", limit=2).documents] == [made[7].id, made[6].id]


def test_what_has_expired_is_deleted_with_its_content_and_the_rest_stays(prefix: str) -> None:
    notes = store_of(prefix)
    old, later, always = (create(notes, expires_at=at) for at in (1.0, time.time() + 3600, None))
    storage.write_bytes(f"{prefix}/content/{old.id}", b"x")
    # As left by a process that died between its entry and its change, and by one that came too late.
    storage.write_bytes(f"{prefix}/expiring/{2:012d}-{later.id}-{notes.owner_folder('ann')}", b"")
    storage.write_bytes(f"{prefix}/expiring/{2:012d}-{always.id}-{notes.owner_folder('ann')}", b"")
    heard = []
    assert notes.sweep(before_delete=heard.append) == 1
    assert heard == [old]
    assert not [uri for uri in left_below(prefix) if old.id in uri]
    assert {note.id for note in notes.list("ann", limit=9).documents} == {later.id, always.id}
    notes.change("ann", later.id, lambda _: {"expires_at": 5.0})
    notes.change("ann", always.id, lambda _: {"expires_at": 5.0})
    assert (notes.sweep(), notes.sweep()) == (2, 0)
    assert left_below(prefix) == []


def test_what_is_written_late_of_a_deleted_document_is_removed_by_the_sweep(tmp_path: Path) -> None:
    notes = store_of(str(tmp_path))
    note = create(notes)
    notes.delete(note, late_s=0.5)
    storage.write_bytes(f"{tmp_path}/content/{note.id}", b"late")
    time.sleep(1.6)
    assert notes.sweep() == 0
    assert left_below(str(tmp_path)) == []


def test_the_entry_of_a_request_that_broke_off_is_removed_after_an_hour(tmp_path: Path) -> None:
    notes = store_of(str(tmp_path))
    note = create(notes)
    storage.write_bytes(f"{tmp_path}/content/{note.id}", b"x")
    for place in left_below(f"{tmp_path}/notes"):
        storage.delete(f"{tmp_path}/notes{place}")
    for age_s, num_left in ((0, 1), (7200, 0)):
        for entry in notes.entries(OPEN):
            os.utime(entry.uri, (time.time() - age_s,) * 2)
            with pytest.raises(NotFound):
                notes.read_entry(notes.entries(OPEN)[0])
        assert len(notes.entries(OPEN)) == num_left
    assert not [uri for uri in left_below(str(tmp_path)) if uri.startswith("/content")]


def test_a_damaged_document_is_named_and_holds_nothing_else_up(tmp_path: Path) -> None:
    notes = store_of(str(tmp_path))
    damaged, fine = create(notes, expires_at=1.0), create(notes, expires_at=2.0)
    (place,) = [uri for uri in left_below(f"{tmp_path}/notes") if damaged.id in uri]
    storage.write_bytes(f"{tmp_path}/notes{place}", b"{")
    with pytest.raises(StorageError, match=f"{damaged.id}.json is damaged"):
        notes.read("ann", damaged.id)
    assert notes.sweep() == 1
    with pytest.raises(NotFound):
        notes.read("ann", fine.id)


@pytest.mark.parametrize("bad", ["", "note_1", "../../x", "note_" + "g" * 38, "file_" + "0" * 38, "note_" + "0" * 39])
def test_what_is_not_an_id_names_no_document(tmp_path: Path, bad: str) -> None:
    with pytest.raises(NotFound):
        store_of(str(tmp_path)).read("ann", bad)


@pytest.fixture
def ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Ids of the tree of 0.1.0, of which a copy is in the working directory."""
    folder = tmp_path / "elsewhere"
    shutil.copytree(EARLIER, folder)
    monkeypatch.chdir(folder)
    found: dict[str, str] = json.loads(Path("ids.json").read_text())
    return found


def render(jobs: JobStore, job_id: str) -> None:
    entry = next(entry for entry in jobs.queue.entries() if entry.id == job_id)
    held = jobs.queue.claim(jobs.queue.read(entry), worker="new")
    jobs.queue.complete(held, jobs.queue.store(held, rendered(held.document)))


def test_jobs_of_an_earlier_version_are_found_listed_changed_and_expire(ids: dict[str, str]) -> None:
    jobs = JobStore("serve")
    done = jobs.get("ann", ids["completed"])
    assert (done.status, done.seconds, done.size) == ("completed", "1.5", "64x48")
    assert done.result is not None
    assert (done.result.gpu_s, done.result.model_version) == (1.5, "demo 1")
    assert storage.read_bytes(done.result.video_uri) == b"video"
    failed = jobs.get("ann", ids["failed"])
    assert failed.error is not None
    assert (failed.status, failed.error.code) == ("failed", "out_of_memory")
    names = ("line waits", "line made", "queued", "at work", "expired", "cancelled", "failed", "completed")
    assert [job.id for job in jobs.list("ann").documents] == [ids[name] for name in names]
    assert [job.id for job in jobs.list("bob").documents] == [ids["bob"]]
    page = jobs.list("ann", after=ids["queued"], limit=2)
    assert [job.id for job in page.documents] == [ids["at work"], ids["expired"]]

    names = ("at work", "queued", "bob", "line waits")
    assert [entry.id for entry in jobs.queue.entries()] == [ids[name] for name in names]
    assert (jobs.num_open("ann"), jobs.num_open("bob")) == (2, 1)
    assert [jobs.outbox.read(entry).document.id for entry in jobs.outbox.entries()] == [ids["failed"]]
    request = RenderRequest(
        id="",
        params=AnimationParams(prompt="completed", seed=7),
        image=b"picture",
        inputs={"end_image": b"second"},
        priority=1,
    )
    asked = {"owner": "ann", "model": "demo", "seconds": "2", "size": "64x48"}
    assert jobs.create(request, idempotency_key="k", **asked).id == ids["completed"]

    assert jobs.sweep() == 1
    with pytest.raises(NotFound):
        jobs.get("ann", ids["expired"])
    render(jobs, ids["at work"])  # its dispatcher died long ago
    jobs.cancel("ann", ids["queued"])
    jobs.delete("ann", ids["completed"])
    assert [entry.id for entry in jobs.queue.entries()] == [ids["bob"], ids["line waits"]]
    gone = (ids["expired"], ids["completed"])
    assert not [uri for uri in left_below("serve") if uri.rpartition("/")[2].startswith(gone) or "key-8254" in uri]


def test_files_of_an_earlier_version_are_found_listed_and_expire(ids: dict[str, str]) -> None:
    files = FileStore("serve", ttl_s=3600)
    assert files.read("ann", ids["file"]) == b"picture"
    with pytest.raises(NotFound):
        files.get("ann", ids["expired file"])
    with pytest.raises(NotFound):
        files.get("bob", ids["file"])
    page = files.list("ann", after=None, limit=10, order="desc", purpose="vision")
    assert [file.id for file in page.documents] == [ids["file"]]
    assert files.sweep() == 1
    assert not [uri for uri in left_below("serve/files") if ids["expired file"] in uri]
    files.delete("ann", ids["file"])
    assert not [uri for uri in left_below("serve/files") if ids["file"] in uri]


def test_a_deleted_document_of_an_earlier_version_takes_no_memory(ids: dict[str, str]) -> None:
    documents = JobDocuments("serve", job_ttl_s=60.0, lease_s=20.0).store
    done = documents.read("ann", ids["completed"]).document
    assert documents.is_earlier(done.id)
    documents.delete(done)
    assert not documents.is_earlier(done.id)


def test_batches_of_an_earlier_version_are_listed_go_on_and_expire(ids: dict[str, str]) -> None:
    batches, files, jobs = BatchStore("serve", ttl_s=3600), FileStore("serve", ttl_s=3600), JobStore("serve")
    assert [batch.id for batch in batches.list("ann", after=None, limit=5).documents] == [
        ids["open batch"],
        ids["ended batch"],
    ]
    assert [batch.id for batch in batches.open_batches()] == [ids["open batch"]]
    assert (batches.num_open("ann"), batches.num_open("bob")) == (1, 0)

    async def submit(line: LineRequest) -> Any:
        raise AssertionError("both lines are jobs already")

    def show(job: Any) -> dict[str, Any]:
        return video_object(job).model_dump(mode="json")

    render(jobs, ids["line waits"])
    runner = BatchRunner(batches, files, jobs=jobs, submit=submit, video_object=show)
    asyncio.run(runner.tick())
    done = batches.get("ann", ids["open batch"])
    assert (done.status, done.num_completed, done.metadata) == ("completed", 2, {"set": "one"})
    assert done.output_file_id is not None
    lines = [json.loads(line) for line in files.read("ann", done.output_file_id).splitlines()]
    assert [line["custom_id"] for line in lines] == ["made", "waits"]
    asyncio.run(runner.tick())
    assert not left_below("serve/batches/open")

    assert BatchStore("serve", ttl_s=0).sweep() == 1
    with pytest.raises(NotFound):
        batches.get("ann", ids["ended batch"])
    assert not [uri for uri in left_below("serve/batches") if ids["ended batch"] in uri]
    assert batches.get("ann", ids["open batch"]).status == "completed"
