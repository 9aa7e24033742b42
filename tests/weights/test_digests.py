"""Digests of files, and those that are kept for the next process."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from pia_ray.weights.digests import FileDigests


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def later_process(folder: Path, *, kept_bytes: int = 3, settled_s: float = -60.0) -> FileDigests:
    return FileDigests(folder, kept_bytes=kept_bytes, settled_s=settled_s)


def test_the_digest_of_a_large_file_is_kept_for_the_next_process(tmp_path: Path) -> None:
    path, folder = tmp_path / "weights", tmp_path / "digests"
    path.write_bytes(b"weights")
    assert later_process(folder).of(path) == sha256(b"weights")
    (kept,) = folder.iterdir()
    kept.write_text(sha256(b"as another process wrote"))
    assert later_process(folder).of(path) == sha256(b"as another process wrote")
    kept.write_text("damaged")
    assert later_process(folder).of(path) == sha256(b"weights")


def test_a_file_that_is_replaced_or_written_has_its_own_digest_also_at_the_same_time_and_size(tmp_path: Path) -> None:
    path, folder = tmp_path / "weights", tmp_path / "digests"
    path.write_bytes(b"weights")
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    later_process(folder).of(path)
    path.write_bytes(b"changed")
    os.utime(path, ns=times)
    assert later_process(folder).of(path) == sha256(b"changed")
    other = tmp_path / "other"
    other.write_bytes(b"another")
    os.utime(other, ns=times)
    other.replace(path)
    assert later_process(folder).of(path) == sha256(b"another")


def test_small_files_and_those_that_have_just_changed_are_not_kept(tmp_path: Path) -> None:
    path, folder = tmp_path / "weights", tmp_path / "digests"
    path.write_bytes(b"weights")
    assert later_process(folder, settled_s=60).of(path) == sha256(b"weights")
    assert later_process(folder, kept_bytes=100).of(path) == sha256(b"weights")
    assert not folder.exists()


def test_a_folder_that_cannot_be_written_costs_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    path = tmp_path / "weights"
    path.write_bytes(b"weights")
    assert later_process(tmp_path / "file" / "below").of(path) == sha256(b"weights")


def test_digests_that_are_computed_side_by_side_are_those_of_the_contents(tmp_path: Path) -> None:
    digests = later_process(tmp_path / "digests")
    paths = [tmp_path / name for name in ("a", "b", "c")]
    for path in paths[:2]:
        path.write_bytes(path.name.encode() * 9)
    digests.start(paths)
    assert [digests.of(path) for path in paths[:2]] == [sha256(b"a" * 9), sha256(b"b" * 9)]
    with pytest.raises(FileNotFoundError):
        digests.of(paths[2])
    paths[2].write_bytes(b"c" * 9)
    assert digests.of(paths[2]) == sha256(b"c" * 9)


def test_a_large_file_of_the_hubs_cache_has_its_digest_in_its_name(tmp_path: Path) -> None:
    blobs = tmp_path / "models--owner--name" / "blobs"
    blobs.mkdir(parents=True)
    stated, link = sha256(b"what the hub states"), tmp_path / "model.safetensors"
    (blobs / stated).write_bytes(b"weights")
    link.symlink_to(blobs / stated)
    assert later_process(tmp_path / "digests").of(link) == stated
    assert later_process(tmp_path / "digests", kept_bytes=100).of(link) == sha256(b"weights"), "a small file is read"
    other = tmp_path / "blobs" / stated
    other.parent.mkdir()
    other.write_bytes(b"weights")
    assert later_process(tmp_path / "digests").of(other) == sha256(b"weights"), "it is not in a hub's cache"
