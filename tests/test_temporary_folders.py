"""Temporary folders: gone with their block or their process, and nobody else's is touched."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pia_ray.temporary_folders import PREFIX, temporary_folder

HOLD = """
import sys
from pathlib import Path
from pia_ray.temporary_folders import temporary_folder
with temporary_folder(Path(sys.argv[1])) as folder:
    (folder / "copy").write_bytes(b"x" * 1000)
    print(folder, flush=True)
    sys.stdin.read()
"""


@contextmanager
def holder(parent: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """Another process with a temporary folder."""
    command = [sys.executable, "-c", HOLD, str(parent)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        yield process, Path(process.stdout.readline().strip())
        process.kill()


def test_a_folder_goes_with_its_block(tmp_path: Path) -> None:
    with temporary_folder(tmp_path) as folder:
        (folder / "deep" / "er").mkdir(parents=True)
        (folder / "link").symlink_to(folder / "deep")
    assert list(tmp_path.iterdir()) == []


def test_the_folder_of_a_killed_process_goes_with_the_next_one_and_that_of_a_living_one_stays(tmp_path: Path) -> None:
    with holder(tmp_path) as (process, left), holder(tmp_path) as (_, used):
        process.kill()
        process.wait()
        assert (left / "copy").exists()
        with temporary_folder(tmp_path) as own:
            assert set(tmp_path.iterdir()) == {used, own}
            assert (used / "copy").exists()


def test_a_folder_of_somebody_else_stays_whatever_its_name(tmp_path: Path) -> None:
    theirs = tmp_path / f"{PREFIX}results" / "videos"
    theirs.mkdir(parents=True)
    with temporary_folder(tmp_path):
        pass
    assert theirs.exists()


def test_a_folder_that_is_kept_on_an_error_stays_until_the_next_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError), temporary_folder(tmp_path, kept_on_error=True):
        raise ValueError("before anything was written")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError), temporary_folder(tmp_path, kept_on_error=True) as folder:
        (folder / "log").touch()
        raise ValueError("afterwards")
    assert (folder / "log").exists()
    with temporary_folder(tmp_path) as own:
        assert list(tmp_path.iterdir()) == [own]
