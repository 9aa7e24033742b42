"""Errors of the machine are one line that says what to do, with exit code 2; others may be bugs and are not hidden."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from pia_ray.cli.machine_errors import machine_error
from pia_ray.errors import OutputError
from pia_ray.ledger import Ledger, new_run


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "/tmp/x"),
            "/tmp/x: No space left on device. Free",
        ),
        (
            PermissionError(errno.EACCES, "Permission denied", "card.json"),
            "card.json: Permission denied. Check",
        ),
        (OSError(errno.EMFILE, "Too many open files"), "ulimit -n"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "--actors"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "x.mp4"), "x.mp4: File name too long. Choose a shorter"),
        (OSError(errno.ELOOP, "Too many levels of symbolic links", "x"), "leads to itself"),
        (MemoryError(), "not enough memory"),
        (RuntimeError("can't start new thread"), "ulimit -u"),
        (FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']"), "Set TMPDIR"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory"), "working directory"),
        (
            ModuleNotFoundError("No module named 'torch'", name="torch"),
            "No module named 'torch'. It comes with pip install \"pia-ray[run]\".",
        ),
    ],
)
def test_an_error_of_the_machine_says_in_one_line_what_to_do(error: Exception, said: str) -> None:
    text = machine_error(error)
    assert text is not None
    assert said in text
    assert "\n" not in text


@pytest.mark.parametrize(
    "error",
    [
        KeyError("a"),
        RuntimeError("a"),
        FileNotFoundError(errno.ENOENT, "No such file", "/nowhere/a"),
        ModuleNotFoundError("No module named 'nowhere'", name="nowhere"),
    ],
)
def test_an_error_that_may_be_a_bug_is_not_taken_for_the_machines(error: Exception) -> None:
    assert machine_error(error) is None


def test_a_command_in_a_folder_that_is_gone_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    script = (
        "import os, sys; os.mkdir('gone'); os.chdir('gone'); os.rmdir('../gone'); "
        "from pia_ray.cli.main import main; sys.exit(main(['report', 'out']))"
    )
    ended = subprocess.run(
        [sys.executable, "-P", "-c", script],  # as the installed command, which imports nothing of its folder
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 2
    assert "Traceback" not in ended.stderr
    assert ended.stderr.startswith("pia-ray: ")


def test_results_that_cannot_be_sorted_for_want_of_a_temporary_folder_are_an_error_of_the_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Ledger.open(str(tmp_path / "out")) as opened:
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
        with pytest.raises(OutputError, match="TMPDIR"):
            opened.plan([], run=new_run(manifest="m", model="demo"))
        with pytest.raises(OutputError, match="TMPDIR"):
            opened.write_results()
