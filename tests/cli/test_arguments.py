from __future__ import annotations

import os
import shlex
import stat
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from pia_ray.cli.file_viewer import open_file
from pia_ray.cli.main import main
from pia_ray.cli.parser import make_parser
from pia_ray.cli.setting_flags import KNOB_GROUPS
from pia_ray.config.knobs import KNOBS

# Help.


def test_every_knob_is_in_one_group_of_the_help() -> None:
    counts = Counter(name for names in KNOB_GROUPS.values() for name in names)
    assert counts == Counter(list(KNOBS))


@pytest.mark.parametrize("command", ["animate", "image", "validate", "estimate"])
def test_help_begins_with_two_examples_that_the_parser_takes_and_five_flags(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    text = capsys.readouterr().out
    sections = [part.split("\n") for part in text.split("\n\n")]
    assert sections[2][0] == "examples:"
    assert len(sections[2]) == 3
    assert sections[3][0] == "most used:"
    assert sum(line.startswith("  -") for line in sections[3]) == 5
    assert "--context-stride" not in text
    assert "--help-knobs" in text


def test_the_examples_of_the_help_are_commands_that_the_parser_takes() -> None:
    parser = make_parser()
    commands = next(action.choices for action in parser._actions if isinstance(action.choices, dict))
    examples = [example for name in ("animate", "image", "validate", "estimate") for example in commands[name].examples]
    assert len(examples) == 8
    for example in examples:
        parser.parse_args(shlex.split(example)[1:])


# Variables.


@pytest.fixture
def catalogue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("m.csv").write_text("id,image,prompt\na,a.png,sea\nb,b.png,lake\n")
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = main(list(words))
    ended = capsys.readouterr()
    return code, ended.out, ended.err


def test_a_setting_comes_from_a_flag_then_a_variable_then_the_file(
    catalogue: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("run.yaml").write_text("{manifest: m.csv, limit: 9, model: demo}")
    monkeypatch.setenv("PIA_RAY_CONFIG", "run.yaml")
    assert "2 work items" in run(capsys, "validate")[1]
    monkeypatch.setenv("PIA_RAY_LIMIT", "1")
    assert "1 work item" in run(capsys, "validate")[1]
    assert "2 work items" in run(capsys, "validate", "--limit", "2")[1]
    monkeypatch.setenv("PIA_RAY_LIMIT", "")
    assert "2 work items" in run(capsys, "validate")[1]


@pytest.mark.parametrize(
    ("variable", "value", "told"),
    [
        ("PIA_RAY_LIMIT", "ten", "PIA_RAY_LIMIT must be a number (got 'ten')"),
        ("PIA_RAY_DEADLINE", "soon", "PIA_RAY_DEADLINE: 'soon' is not a time"),
        ("PIA_RAY_DETECT_CHANGES", "maybe", "PIA_RAY_DETECT_CHANGES must be true or false"),
        ("PIA_RAY_ACTORS", "some", "settings from the environment: PIA_RAY_ACTORS"),
        ("PIA_RAY_MODEL", "dmo", 'Did you mean "demo"?'),
        ("PIA_RAY_NUM_FRAMES", "8", "num_frames is a knob of a row, which no variable sets: give --num-frames, or"),
        ("PIA_RAY_OUTPTU", "out", "there is no variable PIA_RAY_OUTPTU. Did you mean PIA_RAY_OUTPUT?"),
    ],
)
def test_a_wrong_variable_is_named(
    catalogue: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    variable: str,
    value: str,
    told: str,
) -> None:
    monkeypatch.setenv(variable, value)
    code, _, err = run(capsys, "validate", "m.csv")
    assert code == 2
    assert told in err


def test_what_kubernetes_sets_for_a_service_named_pia_ray_is_no_setting(
    catalogue: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for variable in (
        "PORT",
        "SERVICE_HOST",
        "SERVICE_PORT",
        "SERVICE_PORT_HTTP",
        "PORT_8000_TCP",
        "PORT_8000_TCP_ADDR",
    ):
        monkeypatch.setenv(f"PIA_RAY_{variable}", "tcp://10.0.0.7:8000")
    assert run(capsys, "validate", "m.csv", "--model", "demo")[0] == 0


# Completion.


def completions(line: str, tmp_path: Path) -> set[str]:
    """What a shell is given for that line, by argcomplete's protocol."""
    found = tmp_path / "found"
    environ = {
        **os.environ,
        "_ARGCOMPLETE": "1",
        "_ARGCOMPLETE_SHELL": "bash",
        "_ARGCOMPLETE_STDOUT_FILENAME": str(found),
        "_ARGCOMPLETE_IFS": "\n",
        "COMP_LINE": line,
        "COMP_POINT": str(len(line)),
    }
    subprocess.run([sys.executable, "-m", "pia_ray.cli"], env=environ, timeout=60, check=False)
    return {word.strip() for word in found.read_text().split("\n")}


def test_a_shell_completes_commands_flags_and_the_values_of_knobs(tmp_path: Path) -> None:
    assert completions("pia-ray an", tmp_path) == {"animate"}
    assert "--num-frames" in completions("pia-ray image --num-", tmp_path)
    assert {"dpm++2m", "dpm++2s"} <= completions("pia-ray animate --scheduler dpm", tmp_path)
    assert completions("pia-ray image --motion-scale loop-l", tmp_path) == {"loop-large"}
    assert "realistic-vision" in completions("pia-ray animate --model real", tmp_path)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_script_for_each_shell(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    assert "pia-ray" in capsys.readouterr().out


# Files that are shown.


@pytest.mark.skipif(sys.platform != "linux", reason="another program there")
def test_open_starts_the_system_s_program_on_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    viewer, seen = tmp_path / "xdg-open", tmp_path / "seen"
    viewer.write_text(f'#!/bin/sh\necho "$1" > {seen}.part && mv {seen}.part {seen}\n')
    viewer.chmod(viewer.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    assert open_file("video.mp4")
    deadline = time.monotonic() + 10
    while not seen.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert seen.read_text().strip() == str(tmp_path / "video.mp4")
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    assert not open_file("video.mp4")
