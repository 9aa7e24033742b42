"""Ray's start-up without a Ray: `ray.init` is replaced by what Ray does on a bad day."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from pia_ray.cli.main import main
from pia_ray.errors import ConfigError, JobError
from pia_ray.ray_runtime import connected, own_cluster

TIMED_OUT = "The current node timed out during startup. This could happen because the GCS has become overloaded."

Calls = list[dict[str, Any]]
Init = Callable[..., Calls]


@pytest.fixture
def parent(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder in which clusters make theirs; shorter than pytest's, which are too deep for Ray's sockets."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        monkeypatch.setenv("RAY_TMPDIR", folder)
        yield Path(folder)


@pytest.fixture
def init(monkeypatch: pytest.MonkeyPatch, parent: Path) -> Init:
    """Replaces `ray.init` by these answers in order, each an exception or None; gives the calls that come."""

    def replace(*answers: BaseException | None) -> Calls:
        calls: Calls = []

        def answer(**options: Any) -> None:
            calls.append(options)
            if (error := answers[len(calls) - 1]) is not None:
                raise error

        monkeypatch.setattr(ray, "init", answer)
        return calls

    return replace


def write_logs(call: dict[str, Any]) -> Path:
    """What Ray leaves in the folder that it is given."""
    folder = Path(call["_temp_dir"])
    (folder / "session_latest" / "logs").mkdir(parents=True)
    return folder


@pytest.mark.parametrize(
    "error", [Exception(TIMED_OUT), RuntimeError("Failed to start\nthe GCS"), OSError("no sockets")]
)
@pytest.mark.parametrize("command", ["demo", "animate", "serve"])
def test_a_ray_that_does_not_start_ends_a_command_with_2_and_one_line_after_two_tries(
    command: str, error: Exception, init: Init, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    calls = init(error, error)
    output = str(tmp_path / "out")
    (tmp_path / "m.csv").write_text("image,prompt\na.png,a cat\n")
    words = {
        "demo": ["--output", output],
        "animate": [str(tmp_path / "m.csv"), "--model", "demo", "--output", output],
        "serve": ["--model", "demo", "--port", "0", "--storage", output],
    }
    assert main([command, *words[command]]) == 2
    said = capsys.readouterr().err
    assert len(calls) == 2
    assert "Traceback" not in said
    assert [line for line in said.splitlines() if line.startswith("pia-ray: ")] == [
        f"pia-ray: Ray does not start on this machine: {' '.join(str(error).split())}"
    ]


@pytest.mark.parametrize(
    ("command", "doing"),
    [("demo", "the workers cannot be set up"), ("serve", "the endpoint could not be started")],
)
def test_a_ray_that_fails_after_its_start_ends_a_command_with_2_and_what_was_being_done(
    command: str,
    doing: str,
    init: Init,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    def fail(**options: Any) -> None:
        raise Exception("the GCS\nis away")

    init(None)
    monkeypatch.setattr(ray, "cluster_resources", fail)
    output = str(tmp_path / "out")
    words = {"demo": ["--output", output], "serve": ["--model", "demo", "--port", "0", "--storage", output]}
    assert main([command, *words[command]]) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert [line for line in said.splitlines() if line.startswith("pia-ray: ")] == [
        f"pia-ray: {doing}: Exception: the GCS is away"
    ]


def test_a_cluster_that_starts_at_the_second_try_is_used(init: Init, caplog: pytest.LogCaptureFixture):
    calls = init(Exception(TIMED_OUT), None)
    with connected(None, worker_cpus=1) as is_own:
        assert is_own
    assert [call["address"] for call in calls] == ["local", "local"]
    assert "trying once more: The current node timed out" in caplog.text


@pytest.mark.parametrize(
    "error", [ConnectionError("no cluster\nfound"), Exception("GCS is away"), ValueError("malformed")]
)
def test_a_cluster_that_cannot_be_joined_is_an_error_of_the_config_at_once(error: Exception, init: Init):
    calls = init(error)
    with pytest.raises(ConfigError, match="cannot use Ray at auto: ") as raised, connected("auto", worker_cpus=1):
        pass
    assert len(calls) == 1
    assert "\n" not in raised.value.message


def test_a_sigterm_while_ray_starts_is_an_interrupt_and_leaves_the_handler(init: Init):
    before = signal.getsignal(signal.SIGTERM)
    init(SystemExit(1))
    with pytest.raises(KeyboardInterrupt), own_cluster(1):
        pass
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_files_of_a_cluster_go_with_it(init: Init, parent: Path):
    calls = init(None)
    with own_cluster(1):
        assert write_logs(calls[0]).parent == parent
    assert list(parent.iterdir()) == []


def test_the_files_of_a_cluster_whose_run_failed_stay_until_the_next_one_starts(init: Init, parent: Path):
    calls = init(None, None)
    with pytest.raises(JobError), own_cluster(1):
        folder = write_logs(calls[0])
        raise JobError("the workers could not go on")
    assert folder.exists()
    with own_cluster(1):
        assert [found.name for found in parent.iterdir()] == [Path(calls[1]["_temp_dir"]).name]


def test_the_files_of_a_cluster_that_runs_are_left_alone_by_the_next_one(init: Init, parent: Path):
    calls = init(None, None)
    with own_cluster(1):
        folder = write_logs(calls[0])
        os.utime(folder, (0, 0))
        with own_cluster(1):
            assert folder.exists()


def test_a_folder_too_deep_for_rays_sockets_is_not_used(init: Init, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    calls = init(None)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / ("deep" * 10)))
    with own_cluster(1):
        assert len(calls[0]["_temp_dir"]) < 40


def test_a_folder_that_cannot_be_made_ends_a_run_with_one_line(
    init: Init, parent: Path, monkeypatch: pytest.MonkeyPatch
):
    init()
    (parent / "file").touch()
    monkeypatch.setenv("RAY_TMPDIR", str(parent / "file" / "x"))
    with pytest.raises(JobError, match="cannot make a folder for Ray's files in"), own_cluster(1):
        pass


def test_an_error_of_the_second_start_names_rays_logs(monkeypatch: pytest.MonkeyPatch, parent: Path):
    def fail(**options: Any) -> None:
        if not (Path(options["_temp_dir"]) / "session_latest").exists():
            write_logs(options)
        raise Exception(TIMED_OUT)

    monkeypatch.setattr(ray, "init", fail)
    with pytest.raises(JobError, match=rf"its logs are in {parent}/[^)]*/session_latest/logs\)"), own_cluster(1):
        pass
