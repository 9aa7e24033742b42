"""Storage by URI: the same claims on a local disk and on a real S3 server over HTTP, and under faults."""

from __future__ import annotations

import base64
import errno
import hashlib
import http.client
import json
import os
import pickle
import stat
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pia_ray import storage
from pia_ray.errors import (
    OutputError,
    PiaRayError,
    StorageDamaged,
    StorageDenied,
    StorageError,
    StorageNotFound,
    StorageTooLarge,
    StorageUnavailable,
)
from pia_ray.storage.errors import local_error
from tests.chaos_proxy import CUT_BODY, LOSE_ANSWER, RESET, ChaosProxy, chaos
from tests.s3_server import PAGE_KEYS, S3Server, point_at, s3, s3_server

__all__ = ["chaos", "s3", "s3_server"]  # fixtures


@pytest.fixture(params=["local", "file", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty place of each kind."""
    if request.param == "s3":
        return f"{request.getfixturevalue('s3')}/some prefix"
    folder = tmp_path / "some folder"
    return str(folder) if request.param == "local" else folder.as_uri()


# Names


@pytest.mark.parametrize(
    ("uri", "parts", "expected"),
    [
        ("out", ["a", "b.mp4"], "out/a/b.mp4"),
        ("/out/", ["/a/", "b"], "/out/a/b"),
        ("s3://bucket", ["a b", "ü"], "s3://bucket/a b/ü"),
        ("s3://bucket/p/", ["", "a"], "s3://bucket/p/a"),
        ("file:///out", ["a b"], "file:///out/a%20b"),
        ("out", [], "out"),
    ],
)
def test_uris_are_joined_by_one_slash(uri: str, parts: list[str], expected: str) -> None:
    assert storage.join(uri, *parts) == expected


def test_a_uri_without_its_slashes_or_bucket_is_no_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for uri in ("s3:", "s3:/bucket/x", "S3:bucket/x", "file:/tmp/x"):
        with pytest.raises(StorageError, match=f'"{uri}" is not a path, and a URI of'):
            storage.local_path(uri)
    with pytest.raises(StorageError, match="names no bucket: write s3://bucket/prefix"):
        storage.join("s3://", "videos")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert storage.local_path("~/x") == tmp_path / "x"
    assert storage.local_path("~no-such-user/x") == Path("~no-such-user/x")
    with pytest.raises(OutputError, match="File name too long"):
        storage.check_writable(f"{tmp_path}/{'x' * 300}")


@pytest.mark.parametrize("uri", ["gs://bucket/x", "https://example.org/x", "ftp://x/y", "", "a\0b", "file://host/x"])
def test_uris_of_other_kinds_are_refused(uri: str) -> None:
    with pytest.raises(StorageError):
        storage.read_bytes(uri)


@pytest.mark.parametrize("uri", ["s3://", "s3:///key", "s3://bucket", "s3://bucket/"])
def test_an_s3_uri_without_bucket_or_key_is_refused(uri: str) -> None:
    with pytest.raises(StorageError):
        storage.read_bytes(uri)


# The same on every kind of store


def test_what_is_written_is_read_back(root: str) -> None:
    uri = storage.join(root, "a", "b c.bin")
    storage.write_bytes(uri, b"one")
    assert storage.read_bytes(uri) == b"one"
    storage.write_bytes(uri, b"")
    assert storage.read_bytes(uri) == b""


def test_what_is_not_there_is_not_found(root: str) -> None:
    uri = storage.join(root, "nothing")
    assert storage.head(uri) is None
    assert not storage.exists(uri)
    storage.delete(uri)
    with pytest.raises(StorageNotFound, match="nothing"):
        storage.read_bytes(uri)


def test_reading_stops_at_the_cap(root: str) -> None:
    uri = storage.join(root, "a")
    storage.write_bytes(uri, b"12345")
    assert storage.read_bytes(uri, max_bytes=5) == b"12345"
    with pytest.raises(StorageTooLarge, match="5 bytes; at most 4"):
        storage.read_bytes(uri, max_bytes=4)


def test_create_leaves_alone_what_is_there(root: str) -> None:
    uri = storage.join(root, "a")
    assert storage.create_bytes(uri, b"first")
    assert not storage.create_bytes(uri, b"second")
    assert storage.read_bytes(uri) == b"first"


def test_of_many_creators_exactly_one_wins(root: str) -> None:
    uri = storage.join(root, "a")
    won: list[int] = []
    gate = threading.Barrier(8)

    def create(number: int) -> None:
        gate.wait()
        if storage.create_bytes(uri, bytes([number])):
            won.append(number)

    threads = [threading.Thread(target=create, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert storage.read_bytes(uri) == bytes(won)


def test_replace_needs_the_etag_of_what_is_there(root: str) -> None:
    uri = storage.join(root, "lease.json")
    assert storage.replace_bytes(uri, b"{}", etag="none") is None
    storage.write_bytes(uri, b"one")
    first = storage.head(uri)
    assert first is not None
    second = storage.replace_bytes(uri, b"two", etag=first.etag)
    assert second is not None
    assert storage.replace_bytes(uri, b"three", etag=first.etag) is None
    now = storage.head(uri)
    assert now is not None
    assert now.etag == second
    assert storage.read_bytes(uri) == b"two"


def test_what_is_read_with_its_etag_can_be_replaced_until_it_changes(root: str) -> None:
    uri = storage.join(root, "document.json")
    storage.write_bytes(uri, b"one")
    content, etag = storage.read_object(uri)
    assert (content, storage.replace_bytes(uri, b"two", etag=etag) is None) == (b"one", False)
    assert storage.replace_bytes(uri, b"three", etag=etag) is None
    content, etag = storage.read_object(uri, max_bytes=3)
    assert (content, storage.replace_bytes(uri, b"four", etag=etag) is None) == (b"two", False)
    with pytest.raises(StorageTooLarge):
        storage.read_object(uri, max_bytes=3)


def test_of_many_replacers_exactly_one_wins(tmp_path: Path) -> None:
    uri = str(tmp_path / "lease.json")
    storage.write_bytes(uri, b"old")
    found = storage.head(uri)
    assert found is not None
    gate = threading.Barrier(8)
    won: list[str] = []

    def replace(number: int) -> None:
        gate.wait()
        if (etag := storage.replace_bytes(uri, bytes([number]), etag=found.etag)) is not None:
            won.append(etag)

    threads = [threading.Thread(target=replace, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1


def test_head_tells_size_and_time(root: str) -> None:
    uri = storage.join(root, "a")
    storage.write_bytes(uri, b"12345")
    found, now = storage.head(uri), storage.clock(root)
    assert found is not None
    assert found.size_bytes == 5
    assert abs((now - found.last_modified).total_seconds()) < 60


def test_listing_finds_everything_below_in_order(root: str) -> None:
    for name in ("b/2", "b/1.json", "a", "c d/e/f.json"):
        storage.write_bytes(storage.join(root, *name.split("/")), b"x")
    storage.write_bytes(f"{root}-sibling/x", b"x")
    found = list(storage.list_objects(root))
    assert [storage.read_bytes(each.uri) for each in found] == [b"x"] * 4
    assert [each.uri for each in found] == [
        storage.join(root, *name.split("/")) for name in ("a", "b/1.json", "b/2", "c d/e/f.json")
    ]
    assert [each.uri for each in storage.list_objects(root, suffix=".json")] == [found[1].uri, found[3].uri]
    assert {each.size_bytes for each in found} == {1}
    assert list(storage.list_objects(storage.join(root, "nothing"))) == []


def test_a_list_begins_behind_a_name_and_ends_before_another_or_after_so_many(root: str) -> None:
    names = ("a", "b/1", "b/2", "c/d/e", "f")
    for name in names:
        storage.write_bytes(storage.join(root, *name.split("/")), b"x")

    def listed(**asked: Any) -> list[str]:
        found = (each.uri.removeprefix(root).lstrip("/") for each in storage.list_objects(root, **asked))
        return list(found)

    for place, name in enumerate(names):
        assert listed(after=name) == list(names[place + 1 :])
        assert listed(limit=place) == list(names[:place])
    assert listed(after="b/1", limit=2) == ["b/2", "c/d/e"]
    assert listed(after="b/10") == ["b/2", "c/d/e", "f"]
    assert listed(before="c") == ["a", "b/1", "b/2"]
    assert listed(after="a", before="f", limit=2) == ["b/1", "b/2"]
    folders, objects = storage.list_folder(root)
    assert folders == ["b", "c"]
    assert [each.uri for each in objects] == [storage.join(root, "a"), storage.join(root, "f")]
    assert storage.list_folder(storage.join(root, "nothing")) == ([], [])


def test_an_object_that_was_created_is_replaced_by_its_etag(root: str) -> None:
    uri = storage.join(root, "a")
    etag = storage.create_object(uri, b"1")
    assert etag is not None
    assert storage.create_object(uri, b"2") is None
    assert storage.replace_bytes(uri, b"3", etag=etag) is not None
    assert storage.replace_bytes(uri, b"4", etag=etag) is None
    assert storage.read_bytes(uri) == b"3"


def test_a_folder_is_removed_while_nothing_is_in_it_and_made_again_by_the_next_file(root: str) -> None:
    folder, uri = storage.join(root, "b"), storage.join(root, "b", "1")
    storage.write_bytes(uri, b"x")
    storage.remove_empty_folder(folder)
    assert storage.exists(uri)
    storage.delete(uri)
    storage.remove_empty_folder(folder)
    assert storage.list_folder(root) == ([], [])
    assert storage.create_bytes(uri, b"x")


def test_an_id_with_odd_characters_is_only_a_name(root: str) -> None:
    uri = storage.join(root, "ä #?%20+&'")
    storage.write_bytes(uri, b"x")
    assert storage.read_bytes(uri) == b"x"
    assert [each.uri for each in storage.list_objects(root)] == [uri]


def test_files_are_copied_in_and_out(root: str, tmp_path: Path) -> None:
    source, target, uri = tmp_path / "source", tmp_path / "new" / "target", storage.join(root, "x", "y")
    source.write_bytes(os.urandom(100_000))
    storage.upload_file(source, uri)
    storage.copy_to_file(uri, target)
    assert target.read_bytes() == source.read_bytes()
    assert [path.name for path in target.parent.iterdir()] == ["target"]
    with pytest.raises(StorageNotFound):
        storage.copy_to_file(storage.join(root, "nothing"), target)
    with pytest.raises(StorageNotFound):
        storage.upload_file(tmp_path / "nothing", uri)
    assert target.exists()


def test_arrow_reads_what_was_written(root: str, tmp_path: Path) -> None:
    table = pa.table({"a": [1, 2, 3]})
    pq.write_table(table, tmp_path / "t.parquet")
    uri = storage.join(root, "t.parquet")
    storage.upload_file(tmp_path / "t.parquet", uri)
    filesystem, path = storage.arrow_filesystem(uri)
    assert pq.read_table(path, filesystem=filesystem).equals(table)


def test_a_probe_leaves_nothing_behind(root: str) -> None:
    storage.probe(root)
    assert storage.conditional_writes(root)
    assert list(storage.list_objects(root)) == []


def test_a_link_opens_for_anybody(root: str) -> None:
    uri = storage.join(root, "a b")
    storage.write_bytes(uri, b"shown", content_type="text/plain")
    link = storage.presign(uri, expires_s=60)
    with urllib.request.urlopen(link, timeout=10) as answer:
        assert answer.read() == b"shown"
    if storage.is_s3(uri):
        assert "X-Amz-Signature" in link
        assert "X-Amz-Expires=60" in link


# Local files


def test_a_reader_never_sees_half_a_file(tmp_path: Path) -> None:
    uri = str(tmp_path / "a")
    storage.write_bytes(uri, b"0" * 300_000)
    script = f"""
from pia_ray import storage
for number in range(200):
    storage.write_bytes({uri!r}, b"%d" % (number % 10) * 300_000)
"""
    torn = 0
    with subprocess.Popen([sys.executable, "-c", script]) as writer:
        while writer.poll() is None:
            content = storage.read_bytes(uri)
            torn += len(content) != 300_000 or len(set(content)) != 1
    assert (writer.returncode, torn) == (0, 0)


def test_a_killed_writer_leaves_the_old_file_and_a_temporary_that_is_swept(tmp_path: Path) -> None:
    storage.write_bytes(str(tmp_path / "a"), b"old")
    orphan = tmp_path / ".tmp-of a killed writer"
    orphan.write_bytes(b"ne")
    recent = tmp_path / ".tmp-of a living writer"
    recent.write_bytes(b"ne")
    os.utime(orphan, (time.time() - 2 * 86400,) * 2)
    assert [found.uri for found in storage.list_objects(str(tmp_path))] == [str(tmp_path / "a")]
    assert storage.sweep(str(tmp_path)) == 1
    assert (orphan.exists(), recent.exists()) == (False, True)
    assert storage.sweep(str(tmp_path / "nothing")) == 0


def test_a_failed_write_leaves_no_temporary(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(StorageError):
        storage.write_bytes(str(tmp_path / "a"), b"x")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_full_disk_is_a_typed_error_and_keeps_the_old_file(tmp_path: Path) -> None:
    script = f"""
import resource, signal, sys
from pia_ray import storage
from pia_ray.errors import StorageError
storage.write_bytes({str(tmp_path / "a")!r}, b"old")
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    storage.write_bytes({str(tmp_path / "a")!r}, b"x" * 5000)
except StorageError as error:
    print(type(error).__name__, error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("StorageUnavailable cannot write")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_bytes() == b"old"


def test_what_the_system_refuses_to_read_has_its_kind(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    refused: dict[str, type[StorageError]] = {
        str(tmp_path): StorageNotFound,  # a folder is no object
        str(tmp_path / "file" / "below"): StorageNotFound,
        str(tmp_path / "loop"): StorageError,
        str(tmp_path / ("x" * 300)): StorageError,
        "/proc/self/mem": StorageUnavailable,  # its first page answers as a broken disk does: EIO
    }
    for uri, kind in refused.items():
        with pytest.raises(StorageError) as caught:
            storage.read_bytes(uri)
        assert (uri, type(caught.value)) == (uri, kind)
        assert caught.value.message.startswith(f"cannot read {uri}: ")


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (errno.ENOSPC, StorageUnavailable),
        (errno.EDQUOT, StorageUnavailable),
        (errno.EACCES, StorageDenied),
        (errno.EROFS, StorageDenied),
        (errno.ENXIO, StorageError),
    ],
)
def test_refusals_that_need_a_machine_of_their_own_have_their_kind(code: int, kind: type[StorageError]) -> None:
    error = local_error(OSError(code, os.strerror(code)), "write", "a")
    assert type(error) is kind
    assert os.strerror(code) in error.message
    assert pickle.loads(pickle.dumps(error)).message == error.message


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_rights_is_denied(tmp_path: Path) -> None:
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    with pytest.raises(StorageDenied):
        storage.write_bytes(str(tmp_path / "a"), b"x")


@pytest.mark.parametrize("name", ["x" * 300, "a file/below"])
def test_an_output_that_cannot_be_a_folder_is_an_output_error(tmp_path: Path, name: str) -> None:
    (tmp_path / "a file").write_bytes(b"")
    with pytest.raises(OutputError):
        storage.probe(str(tmp_path / name))


# S3


def test_metadata_and_type_are_kept(s3: str, s3_server: S3Server) -> None:
    storage.create_bytes(f"{s3}/a", b"x", content_type="video/mp4", metadata={"sha256": "00", "work-key": "11"})
    found = storage.head(f"{s3}/a")
    assert found is not None
    assert (found.metadata["sha256"], found.metadata["work-key"]) == ("00", "11")
    assert s3_server.client().head_object(Bucket=s3[5:], Key="a")["ContentType"] == "video/mp4"


def test_the_store_keeps_a_sha256_and_reads_compare_it(s3: str, s3_server: S3Server) -> None:
    uri = f"{s3}/a"
    storage.write_bytes(uri, b"whole")
    facts = storage.head(uri)
    assert facts is not None
    assert facts.sha256 == storage.sha256_of(uri) == hashlib.sha256(b"whole").hexdigest()
    rotten = base64.b64encode(hashlib.sha256(b"whole").digest()).decode()
    s3_server.client().put_object(
        Bucket=s3[5:], Key="b", Body=b"while", ChecksumAlgorithm="SHA256", ChecksumSHA256=rotten
    )
    with pytest.raises(StorageDamaged, match="/b is damaged"):
        storage.read_bytes(f"{s3}/b")
    assert storage.sha256_of(f"{s3}/b") == hashlib.sha256(b"while").hexdigest()


def test_the_pieces_of_an_object_are_its_content_and_a_missing_one_is_named_before_the_first(root: str) -> None:
    content = bytes(range(256)) * 5000
    storage.write_bytes(f"{root}/a", content)
    size_bytes, pieces = storage.pieces_of(f"{root}/a")
    found = list(pieces)
    assert (size_bytes, b"".join(found)) == (len(content), content)
    assert max(map(len, found)) <= 2**20
    with pytest.raises(StorageNotFound):
        storage.pieces_of(f"{root}/b")


def test_a_file_that_is_moved_lies_at_its_new_place_alone(root: str) -> None:
    storage.write_bytes(f"{root}/a", b"1")
    storage.move(f"{root}/a", f"{root}/below/b")
    assert [found.uri for found in storage.list_objects(root)] == [f"{root}/below/b"]
    assert storage.sha256_of(f"{root}/below/b") == hashlib.sha256(b"1").hexdigest()


def test_a_large_file_is_uploaded_in_parts_and_comes_back_whole(s3: str, tmp_path: Path) -> None:
    (tmp_path / "big").write_bytes(os.urandom(20_000_000))
    storage.upload_file(tmp_path / "big", f"{s3}/big")
    storage.copy_to_file(f"{s3}/big", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == (tmp_path / "big").read_bytes()
    found = storage.head(f"{s3}/big")
    assert found is not None
    assert "-" in found.etag


def test_a_listing_goes_on_after_a_page(s3: str, s3_server: S3Server) -> None:
    client = s3_server.client()
    for number in range(2 * PAGE_KEYS + 5):
        client.put_object(Bucket=s3[5:], Key=f"p/{number:05d}", Body=b"")
    assert len(list(storage.list_objects(f"{s3}/p"))) == 2 * PAGE_KEYS + 5


def test_unfinished_uploads_of_yesterday_are_swept(s3: str, s3_server: S3Server) -> None:
    client = s3_server.client()
    client.create_multipart_upload(Bucket=s3[5:], Key="out/big")
    client.create_multipart_upload(Bucket=s3[5:], Key="other/big")
    assert storage.sweep(f"{s3}/out") == 1  # this server dates all uploads to 2010
    assert storage.sweep(f"{s3}/out") == 0
    assert [upload["Key"] for upload in client.list_multipart_uploads(Bucket=s3[5:])["Uploads"]] == ["other/big"]


def test_a_missing_bucket_is_named(s3: str) -> None:
    with pytest.raises(StorageNotFound, match="no bucket no-such-bucket"):
        storage.write_bytes("s3://no-such-bucket/a", b"x")
    with pytest.raises(StorageNotFound, match="no bucket no-such-bucket"):
        list(storage.list_objects("s3://no-such-bucket/a"))
    with pytest.raises(OutputError, match=r"no bucket no-such-bucket.*Create it"):
        storage.probe("s3://no-such-bucket/out")


def test_a_user_without_rights_is_told_which_are_needed(
    s3: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    storage.write_bytes(f"{s3}/a", b"x")
    policy = {"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "s3:GetObject", "Resource": "*"}]}
    user = s3_server.new_user(json.dumps(policy))
    point_at(monkeypatch, {**s3_server.environment, **user}, tmp_path)
    s3_server.enforce_rights(yes=True)
    try:
        assert storage.read_bytes(f"{s3}/a") == b"x"
        with pytest.raises(StorageDenied, match="s3:PutObject"):
            storage.write_bytes(f"{s3}/a", b"y")
        with pytest.raises(OutputError, match="access denied") as caught:
            storage.probe(f"{s3}/out")
    finally:
        s3_server.enforce_rights(yes=False)
    assert user["AWS_SECRET_ACCESS_KEY"] not in str(caught.value)
    assert user["AWS_ACCESS_KEY_ID"] not in str(caught.value)


def test_no_credentials_is_denied_with_what_to_do(
    s3: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    point_at(monkeypatch, {"AWS_ENDPOINT_URL": s3_server.url, "AWS_DEFAULT_REGION": "us-east-1"}, tmp_path)
    with pytest.raises(StorageDenied, match="AWS_ACCESS_KEY_ID"):
        storage.read_bytes(f"{s3}/a")


def test_a_profile_that_does_not_exist_is_denied(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    storage.forget_clients()
    with pytest.raises(StorageDenied, match="profile"):
        storage.read_bytes(f"{s3}/a")


def test_an_endpoint_and_keys_from_a_profile_count(
    s3: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = tmp_path / "config"
    config.write_text(
        f"[profile mine]\nendpoint_url = {s3_server.url}\nregion = us-east-1\n"
        "aws_access_key_id = a\naws_secret_access_key = b\n"
    )
    point_at(monkeypatch, {"AWS_CONFIG_FILE": str(config), "AWS_PROFILE": "mine"}, tmp_path)
    pq.write_table(pa.table({"a": [1]}), tmp_path / "t")
    storage.upload_file(tmp_path / "t", f"{s3}/t")
    filesystem, path = storage.arrow_filesystem(f"{s3}/t")
    assert pq.read_table(path, filesystem=filesystem).num_rows == 1


def test_a_forked_process_makes_connections_of_its_own(s3: str) -> None:
    storage.write_bytes(f"{s3}/a", b"x")
    script = """
import os, sys
from pia_ray import storage
storage.read_bytes(sys.argv[1])
pids = []
for _ in range(4):
    if not (pid := os.fork()):
        ok = all(storage.read_bytes(sys.argv[1]) == b"x" for _ in range(20))
        os._exit(0 if ok else 1)
    pids.append(pid)
assert all(storage.read_bytes(sys.argv[1]) == b"x" for _ in range(20))
assert [os.waitpid(pid, 0)[1] for pid in pids] == [0] * 4
"""
    subprocess.run([sys.executable, "-c", script, f"{s3}/a"], check=True)


# Several at once


def test_calls_side_by_side_wait_together_and_give_their_values_in_order() -> None:
    together = threading.Barrier(3, timeout=10)

    def call(number: int) -> int:
        together.wait()
        return number

    assert storage.side_by_side(*(partial(call, number) for number in range(3))) == [0, 1, 2]


def test_of_calls_side_by_side_all_end_before_the_first_error_is_raised() -> None:
    ended: list[int] = []

    def fail(number: int) -> None:
        time.sleep(0.01 * number)
        ended.append(number)
        raise ValueError(number)

    with pytest.raises(ValueError, match="1"):
        storage.side_by_side(partial(fail, 1), partial(fail, 2), partial(fail, 0))
    assert sorted(ended) == [0, 1, 2]


@pytest.mark.parametrize("number", [1, 3])
def test_several_objects_are_deleted_and_those_that_are_not_there_are_no_error(
    tmp_path: Path, s3: str, number: int
) -> None:
    for folder in (str(tmp_path), s3):
        uris = [storage.join(folder, f"deep/{name} ü.json") for name in range(number)]
        for uri in uris:
            storage.write_bytes(uri, b"x")
        storage.write_bytes(storage.join(folder, "kept"), b"x")
        before = Counter(storage.usage().requests)
        storage.delete_all([*uris, storage.join(folder, "gone")][-number:])
        storage.delete_all(uris)
        assert [found.uri for found in storage.list_objects(folder)] == [storage.join(folder, "kept")]
        made = Counter(storage.usage().requests) - before
        assert made["DeleteObject"] + made["DeleteObjects"] == (2 if folder == s3 else 0)


def test_a_store_that_does_not_delete_several_at_once_is_asked_one_by_one(chaos: ChaosProxy) -> None:
    uris = [f"{chaos.bucket}/{name}" for name in "abc"]
    for uri in uris:
        storage.write_bytes(uri, b"x")
    chaos.matches = lambda method, path: method == "POST"
    chaos.faults.append(501)
    storage.delete_all(uris)
    assert not list(storage.list_objects(chaos.bucket))
    storage.delete_all(uris)
    assert [method for method, _, _ in chaos.requests].count("POST") == 1


# S3 under faults


@pytest.mark.parametrize("faults", [1, 4])  # of boto3's own retries, and of those around them
def test_requests_retries_and_bytes_are_counted_by_operation(chaos: ChaosProxy, faults: int) -> None:
    before = storage.usage()
    storage.write_bytes(f"{chaos.bucket}/a", b"four")
    chaos.faults.extend([503] * faults)
    assert storage.read_bytes(f"{chaos.bucket}/a") == b"four"
    now = storage.usage()
    assert now.requests["PutObject"] - before.requests.get("PutObject", 0) == 1
    assert now.requests["GetObject"] - before.requests.get("GetObject", 0) == 1 + faults
    assert now.retries["GetObject"] - before.retries.get("GetObject", 0) == faults
    assert now.retries["PutObject"] == before.retries.get("PutObject", 0)
    assert (now.read_bytes - before.read_bytes, now.written_bytes - before.written_bytes) == (4, 4)


@pytest.mark.parametrize("code", [errno.ENOENT, errno.ESTALE])
def test_a_folder_that_goes_while_it_is_listed_has_no_objects(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    for name in ("a/1", "b/2", "c/3"):
        storage.write_bytes(str(tmp_path / name), b"x")
    scan = os.scandir

    def scan_or_fail(path: Path) -> Iterator[os.DirEntry[str]]:
        if path.name == "b":
            raise OSError(code, os.strerror(code))
        return scan(path)

    monkeypatch.setattr(os, "scandir", scan_or_fail)
    assert [found.uri for found in storage.list_objects(str(tmp_path))] == [f"{tmp_path}/a/1", f"{tmp_path}/c/3"]


def test_a_body_that_is_cut_off_is_read_again(chaos: ChaosProxy) -> None:
    content = os.urandom(500_000)
    storage.write_bytes(f"{chaos.bucket}/a", content)
    chaos.matches = lambda method, path: method == "GET"
    chaos.faults.extend([CUT_BODY] * 3)
    assert storage.read_bytes(f"{chaos.bucket}/a") == content
    assert not chaos.faults


def test_a_create_whose_answer_is_lost_knows_its_own_object(chaos: ChaosProxy) -> None:
    chaos.matches = lambda method, path: method == "PUT"
    chaos.faults.append(LOSE_ANSWER)
    assert storage.create_bytes(f"{chaos.bucket}/a", b"mine", metadata={"sha256": "00"})
    assert len([method for method, _, _ in chaos.requests if method == "PUT"]) == 2
    chaos.faults.append(LOSE_ANSWER)
    assert not storage.create_bytes(f"{chaos.bucket}/a", b"other")
    assert storage.read_bytes(f"{chaos.bucket}/a") == b"mine"


def test_a_replace_whose_answer_is_lost_knows_its_own_object(chaos: ChaosProxy) -> None:
    uri = f"{chaos.bucket}/lease.json"
    storage.write_bytes(uri, b"old")
    found = storage.head(uri)
    assert found is not None
    chaos.matches = lambda method, path: method == "PUT"
    chaos.faults.append(LOSE_ANSWER)
    etag = storage.replace_bytes(uri, b"new", etag=found.etag)
    now = storage.head(uri)
    assert now is not None
    assert etag == now.etag
    assert storage.read_bytes(uri) == b"new"


@pytest.mark.parametrize("fault", [503, 500, RESET, LOSE_ANSWER, 409])
def test_passing_faults_are_outlived(chaos: ChaosProxy, fault: str | int) -> None:
    chaos.faults.extend([fault] * 4)
    assert storage.create_bytes(f"{chaos.bucket}/a", b"x")
    chaos.faults.extend([fault] * 4)
    assert storage.read_bytes(f"{chaos.bucket}/a") == b"x"
    chaos.faults.extend([fault] * 4)
    assert len(list(storage.list_objects(chaos.bucket))) == 1
    assert not chaos.faults


@pytest.mark.heavy
def test_no_put_is_lost_where_half_of_all_answers_are_slow_down(chaos: ChaosProxy) -> None:
    chaos.faults.extend([503, ""] * 100)
    for number in range(30):
        assert storage.create_bytes(f"{chaos.bucket}/{number}", b"x")
    assert len(list(storage.list_objects(chaos.bucket))) == 30


def test_expired_credentials_stop_at_once(chaos: ChaosProxy) -> None:
    chaos.faults.extend([403] * 50)
    with pytest.raises(StorageDenied, match="expired"):
        storage.write_bytes(f"{chaos.bucket}/a", b"x")
    assert len(chaos.requests) == 1


def test_expired_credentials_are_named_where_the_answer_to_a_head_has_no_body(chaos: ChaosProxy) -> None:
    chaos.faults.extend([403] * 2)
    with pytest.raises(StorageDenied, match=r"credentials have expired \(ExpiredToken\)"):
        storage.head(f"{chaos.bucket}/a")


def test_aws_max_attempts_counts_inside_each_try(chaos: ChaosProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    chaos.faults.extend([500] * 50)
    with storage.hurry(), pytest.raises(StorageUnavailable):
        storage.write_bytes(f"{chaos.bucket}/a", b"x")
    assert len(chaos.requests) == 2


def test_patience_gives_notice_of_an_outage_and_not_of_a_pause(
    chaos: ChaosProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    storage.write_bytes(f"{chaos.bucket}/a", b"x")
    notices: list[PiaRayError | None] = []
    with storage.patience(3, notice=notices.append):
        chaos.faults.extend([500] * 3)
        assert storage.read_bytes(f"{chaos.bucket}/a") == b"x"
        assert not any(notices)
        chaos.faults.extend([500] * 7)
        assert storage.read_bytes(f"{chaos.bucket}/a") == b"x"
    assert any(isinstance(notice, StorageUnavailable) for notice in notices)
    assert notices[-1] is None


def test_a_store_without_conditional_writes_is_found_out_and_used(chaos: ChaosProxy) -> None:
    chaos.matches = lambda method, path: method == "PUT"
    chaos.faults.append(501)
    assert storage.create_bytes(f"{chaos.bucket}/a", b"x")
    assert not storage.conditional_writes(chaos.bucket)
    assert not storage.create_bytes(f"{chaos.bucket}/a", b"y")
    assert storage.read_bytes(f"{chaos.bucket}/a") == b"x"
    found = storage.head(f"{chaos.bucket}/a")
    assert found is not None
    assert storage.replace_bytes(f"{chaos.bucket}/a", b"z", etag=found.etag) is not None


def test_a_probe_finds_a_store_without_conditional_writes(chaos: ChaosProxy, caplog: pytest.LogCaptureFixture) -> None:
    chaos.matches = lambda method, path: method == "PUT"
    chaos.faults.append(501)
    storage.probe(f"{chaos.bucket}/out")
    assert not storage.conditional_writes(chaos.bucket)
    assert "conditional" in caplog.text


def test_an_endpoint_that_does_not_answer_is_named_soon(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, s3_server: S3Server
) -> None:
    with ChaosProxy("http://127.0.0.1:1") as closed:
        pass
    point_at(monkeypatch, {**s3_server.environment, "AWS_ENDPOINT_URL": closed.url}, tmp_path)
    port = urlsplit(closed.url).port
    with pytest.raises(OutputError, match=rf"cannot reach s3://bucket: .* http://127\.0\.0\.1:{port}"):
        storage.probe("s3://bucket/out")
    storage.forget_clients()


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("AWS_ENDPOINT_URL", "localhost:9000", "AWS_ENDPOINT_URL"),
        ("AWS_ENDPOINT_URL", "http://[::1", "AWS_ENDPOINT_URL"),
        ("AWS_DEFAULT_REGION", "not a region!", "AWS_DEFAULT_REGION"),
    ],
)
def test_a_wrong_setting_of_the_store_is_named(
    s3: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, value: str, told: str
) -> None:
    point_at(monkeypatch, {**s3_server.environment, name: value}, tmp_path)
    with pytest.raises(StorageError, match=told):
        storage.read_bytes(f"{s3}/a")
    with pytest.raises(OutputError, match=told):
        storage.probe(f"{s3}/out")


def test_the_proxy_passes_plain_requests_on(chaos: ChaosProxy) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", int(chaos.url.rpartition(":")[2]))
    connection.request("GET", "/moto-api/")
    assert connection.getresponse().status == 200
    connection.close()
