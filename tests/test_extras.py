"""An installation without extras, made of links to the packages that it would have."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from pia_ray.catalog.local import run_local
from pia_ray.config.catalog import CatalogConfig
from pia_ray.config.model import ModelConfig, build
from pia_ray.extras import EXTRAS, advice, require
from pia_ray.testing import FakeAnimator, make_catalog

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what `pip install pia-ray` brings, and what that needs in turn."""
    folder = tmp_path_factory.mktemp("base")
    waiting, seen = [Requirement(line) for line in PROJECT["dependencies"]], set()
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if name in seen or (requirement.marker is not None and not requirement.marker.evaluate({"extra": ""})):
            continue
        seen.add(name)
        distribution = metadata.distribution(name)
        waiting += map(Requirement, distribution.requires or ())
        for top in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
            (folder / top).symlink_to(Path(str(distribution.locate_file(top))))
    (folder / "pia_ray").symlink_to(ROOT / "pia_ray")
    return folder


def ran(base: Path, folder: Path, *commands: tuple[object, ...]) -> subprocess.CompletedProcess[str]:
    """Commands, one after the other until one fails, in an interpreter that sees those packages alone."""
    words = [[str(word) for word in command] for command in commands]
    code = f"import sys; from pia_ray.cli.main import main; sys.exit(next(filter(None, map(main, {words!r})), 0))"
    environ = {**os.environ, "PYTHONPATH": str(base), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-S", "-c", code]
    return subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, timeout=120, check=False)


def test_the_base_validates_estimates_reports_and_keeps_a_ledger(base: Path, tmp_path: Path) -> None:
    manifest = make_catalog(tmp_path / "catalog", rows=4)
    out = tmp_path / "out"
    config = build(CatalogConfig, {"manifest": str(manifest), "output": str(out), "model": "demo"})
    with FakeAnimator(ModelConfig.named("demo")) as animator:
        assert run_local(config, animator=animator).exit_code == 0
    done = ran(
        base,
        tmp_path,
        ("validate", manifest, "--fetch", "--model", "demo"),
        ("estimate", manifest, "--model", "demo", "--calibrate", out),
        ("gallery", out),
        ("ledger", "verify", out),
        ("models",),
        ("report", out, "--json"),
    )
    assert done.returncode == 0, done.stderr
    assert "4 work items, 0 bad" in done.stdout
    assert "4 in the manifest" in done.stdout
    assert json.loads(done.stdout.splitlines()[-1])["num_succeeded"] == 4


@pytest.mark.parametrize(
    ("words", "extra"),
    [
        (("demo",), "run"),
        (("serve",), "serve"),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_a_command_without_its_extra_says_in_one_line_what_to_install(
    base: Path, tmp_path: Path, words: tuple[str, ...], extra: str
) -> None:
    done = ran(base, tmp_path, words)
    assert done.returncode == 2
    assert done.stderr.startswith(f"pia-ray: `pia-ray {words[0]}` needs packages that are not installed here (torch, ")
    assert done.stderr.endswith(f': pip install "pia-ray[{extra}]"\n')
    assert not list(tmp_path.iterdir())


def test_a_name_of_python_without_its_extra_says_what_to_install(base: Path, tmp_path: Path) -> None:
    code = "import pia_ray\ntry: pia_ray.Animator\nexcept ModuleNotFoundError as error: print(error.name, error)"
    environ = {**os.environ, "PYTHONPATH": str(base), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-S", "-c", code], env=environ, capture_output=True, text=True, check=True)
    assert done.stdout == "torch No module named 'torch'. It comes with pip install \"pia-ray[run]\".\n"


def test_a_module_that_no_extra_brings_has_no_advice() -> None:
    assert advice(ModuleNotFoundError("no", name="nowhere.at.all")) == ""
    assert advice(ModuleNotFoundError("no")) == ""
    require("serve", purpose="this")  # is installed where the tests run


def test_the_extras_are_those_of_the_package() -> None:
    names = {"python-multipart": "multipart", "c2pa-python": "c2pa"}
    declared = {
        extra: {names.get(name, name.replace("-", "_")) for name in (Requirement(line).name for line in lines)}
        for extra, lines in PROJECT["optional-dependencies"].items()
    }
    assert declared["run"] == set(EXTRAS["run"])
    assert declared["c2pa"] == set(EXTRAS["c2pa"])
    assert declared["serve"] - {"pia_ray"} | declared["run"] == set(EXTRAS["serve"])
    assert declared["upscale"] == set(EXTRAS["upscale"])
    assert PROJECT["optional-dependencies"]["all"] == ["pia-ray[serve,xlsx,c2pa]"]
