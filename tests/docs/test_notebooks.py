"""The notebooks hold no logic, use public names, are committed without outputs, and run from top to bottom.

They run for a user whose demo model is quick, so that the tests take less time.
"""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from jupyter_client.manager import KernelManager
from nbclient import NotebookClient

import pia_ray
from tests.models import home_of_quick_demo

FOLDER = Path(__file__).parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
STANDARD = {"importlib", "logging", "os", "pathlib", "shutil", "subprocess", "sys", "warnings"}
TOOLS = {"IPython", "PIL", "duckdb", "matplotlib", "numpy", "openai", "pandas"}
PATIENCE_S = 900
"""For one cell, which takes seconds on an idle machine."""

each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_of(path: Path) -> list[ast.Module]:
    cells = nbformat.read(path, as_version=4).cells
    return [ast.parse(cell.source) for cell in cells if cell.cell_type == "code"]


def run(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, *, kernel: KernelManager | None = None
) -> nbformat.NotebookNode:
    """The notebook as it is after all its cells, run in an empty folder. A cell that raises fails the test.

    `kernel` is one that runs already, and forgets the names of the notebook before; left out: one of its own.
    """
    monkeypatch.setenv("HOME", str(home_of_quick_demo(folder / "home")))
    monkeypatch.setenv("IPYTHONDIR", str(folder / "ipython"))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(folder / "jupyter"))
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    book = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    where = folder / "work"
    where.mkdir()
    if kernel is not None:
        anew = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(f"%cd -q {where}\n%reset -f")])
        execute(NotebookClient(anew, km=kernel, timeout=PATIENCE_S))
    client = NotebookClient(
        book,
        km=kernel,
        kernel_name="python3",
        timeout=PATIENCE_S,
        startup_timeout=PATIENCE_S,
        resources={"metadata": {"path": str(where)}},
    )
    execute(client)
    errors = errors_of(book)
    assert errors == [], "".join(errors)
    return book


def execute(client: NotebookClient) -> None:
    """Runs the client's notebook, and closes its connection to a kernel that goes on."""
    client.execute()
    if client.kc is not None:
        client.kc.stop_channels()


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KernelManager]:
    """A kernel for notebooks that make videos in it: each would import torch for seconds otherwise."""
    folder = tmp_path_factory.mktemp("kernel")
    manager = KernelManager(kernel_name="python3", connection_file=str(folder / "kernel.json"))
    cached = {"XDG_CACHE_HOME": str(Path.home() / ".cache"), **os.environ}  # matplotlib's list of fonts
    manager.start_kernel(env={**cached, "HOME": str(home_of_quick_demo(folder)), "IPYTHONDIR": str(folder)})
    yield manager
    manager.shutdown_kernel()


def errors_of(book: nbformat.NotebookNode) -> list[str]:
    """What the cells write to stderr, which notebooks show in red."""
    outputs = [output for cell in book.cells for output in cell.get("outputs", ())]
    return [output.text for output in outputs if output.output_type == "stream" and output.name == "stderr"]


def join(address: str, folder: Path) -> None:
    """Lets the notebook's kernel join a cluster before its first cell: its runs start none of their own.

    What is logged of a cluster that was there before is not shown, because there is none where a user runs it.
    """
    startup = folder / "ipython" / "profile_default" / "startup"
    startup.mkdir(parents=True)
    (startup / "join.py").write_text(
        "import logging\n\nimport ray.data\n\n"
        f"ray.init({address!r}, log_to_driver=False, logging_level='ERROR')\n"
        "for handler in logging.getLogger('ray.data').handlers:\n    handler.setLevel('ERROR')\n"
        "logging.getLogger('pia_ray.catalog.actors').setLevel('ERROR')\n"
    )


def shown(book: nbformat.NotebookNode, kind: str) -> list[str]:
    """What the cells show of one MIME type; "text" is what they print."""
    outputs = [output for cell in book.cells for output in cell.get("outputs", ())]
    if kind == "text":
        return [output.text for output in outputs if output.output_type == "stream" and output.name == "stdout"]
    return [output.data[kind] for output in outputs if kind in output.get("data", ())]


def num_videos(book: nbformat.NotebookNode) -> int:
    return "".join(shown(book, "text/html")).count('src="data:video/mp4;base64,')


def test_the_five_notebooks_are_there():
    assert [path.stem[:2] for path in NOTEBOOKS] == ["01", "02", "03", "04", "05"]


@each
def test_a_notebook_is_committed_without_outputs(path: Path):
    book = nbformat.read(path, as_version=4)
    nbformat.validate(book)
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    assert [cell for cell in code if cell.outputs or cell.execution_count is not None] == []


@each
def test_a_notebook_defines_nothing_and_uses_public_names_only(path: Path):
    for cell in code_of(path):
        for node in ast.walk(cell):
            assert not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.While)
            if isinstance(node, ast.Attribute):
                assert not node.attr.startswith("_"), node.attr
            if isinstance(node, ast.Import):
                assert {name.name.split(".")[0] for name in node.names} <= STANDARD | TOOLS
            if isinstance(node, ast.ImportFrom):
                module, names = str(node.module), {name.name for name in node.names}
                assert module.split(".")[0] in STANDARD | TOOLS | {"pia_ray"}
                assert not any(name.startswith("_") for name in names)
                assert module != "pia_ray" or names <= set(pia_ray.__all__)


@each
def test_links_of_a_notebook_lead_somewhere(path: Path):
    text = "\n".join(cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "markdown")
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (FOLDER / target).exists(), target


@pytest.mark.heavy
def test_one_picture_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernel: KernelManager):
    book = run("01-one-picture", tmp_path, monkeypatch, kernel=kernel)
    assert num_videos(book) == 3
    assert {path.name for path in (tmp_path / "work" / "out").iterdir()} == {"sailboat.mp4", "sailboat.webp"}


@pytest.mark.heavy
def test_a_catalogue_runs_fails_is_corrected_and_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ray_address: str
):
    join(ray_address, tmp_path)
    book = run("02-a-catalogue", tmp_path, monkeypatch)
    printed = "".join(shown(book, "text"))
    assert "3 succeeded, failed: {'bad_parameter': 1, 'image_not_found': 1}, exit code 1" in printed
    assert "3 were done before, 2 succeeded now" in printed
    assert "5 were done before, 0 to do" in printed
    assert num_videos(book) == 3
    assert len(list((tmp_path / "work/out/catalogue/output/videos").rglob("*.mp4"))) == 5


@pytest.mark.heavy
def test_choosing_motion_runs_and_plots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernel: KernelManager):
    book = run("03-choosing-motion", tmp_path, monkeypatch, kernel=kernel)
    assert num_videos(book) == 18
    assert len(shown(book, "image/png")) == 2


@pytest.mark.heavy
def test_the_endpoint_answers_the_notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    book = run("04-the-endpoint", tmp_path, monkeypatch)
    printed = "".join(shown(book, "text"))
    assert re.search(r"video_\w+ completed 32x32 100", printed)
    assert "400 bad_parameter - motion_scale must be" in printed
    assert num_videos(book) == 1
    assert shown(book, "text/plain")[-1] == "0"  # the server's exit status


@pytest.mark.heavy
def test_inside_pia_runs_and_plots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernel: KernelManager):
    assert len(shown(run("05-inside-pia", tmp_path, monkeypatch, kernel=kernel), "image/png")) == 7
