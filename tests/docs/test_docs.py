"""README and docs/ are true: their tables and pages are the code's, their commands exist, their Python compiles."""

from __future__ import annotations

import ast
import re
import shlex
import tomllib
from dataclasses import fields
from pathlib import Path

import nbformat
import pytest
import yaml

import pia_ray
import pia_ray.testing
from pia_ray import errors
from pia_ray.cli.parser import make_parser
from pia_ray.ledger import RESULTS_SCHEMA
from pia_ray.result_row import ResultRow
from tests.cli.test_commands import Pia, pia
from tests.docs.api_page import GROUPS
from tests.docs.generated import GUIDES, PAGES, README, ROOT, TABLES, below, index_page, meaning_of, table
from tests.docs.site import page, pages
from tests.models import home_of_quick_demo

__all__ = ["pia"]  # fixture

DOCUMENTS = sorted(
    path
    for path in ROOT.rglob("*.md")
    if not any(name in ("build", "out") or name.startswith(".") for name in path.relative_to(ROOT).parts[:-1])
)


def blocks(kinds: str) -> list[str]:
    return [
        block
        for path in GUIDES
        for block in re.findall(rf"```(?:{kinds})\n(.*?)```", path.read_text("utf-8"), re.DOTALL)
    ]


@pytest.mark.parametrize("name", TABLES)
def test_a_table_equals_the_code(name: str) -> None:
    assert table(name)[1] == TABLES[name](), "run `python -m tests.docs.generated`"


@pytest.mark.parametrize("name", PAGES)
def test_a_page_equals_the_code(name: str) -> None:
    assert (ROOT / "docs" / name).read_text("utf-8") == PAGES[name](), "run `python -m tests.docs.generated`"


def test_the_interface_page_holds_every_public_name_and_nothing_else() -> None:
    grouped = " ".join(GROUPS.values()).split()
    kinds = {kind.__name__ for kind in below(errors.PiaRayError)}
    assert len(grouped) == len(set(grouped))
    assert {*grouped, *kinds} == set(pia_ray.__all__)


@pytest.mark.parametrize("kind", list(below(errors.PiaRayError))[1:], ids=lambda kind: kind.__name__)
def test_every_error_says_what_to_do(kind: type[errors.PiaRayError]) -> None:
    meaning, advice = meaning_of(kind)
    assert len(meaning) > 10
    assert advice.endswith((".", "")) and (advice or kind in (errors.RowError, errors.Busy))


def commands() -> list[str]:
    lines = "\n".join(blocks("console|sh")).replace("\\\n", " ").splitlines()
    found = (re.fullmatch(r"\$ ((?:\S+/)?pia-ray .*?)(?: #.*)?", line) for line in lines)
    return [match[1].strip() for match in found if match]


def test_every_command_is_one_that_the_parser_takes() -> None:
    assert len(commands()) >= 20
    for command in commands():
        make_parser().parse_args(shlex.split(command)[1:])


def first_commands() -> list[list[str]]:
    """Those of the section for newcomers that start in a clone, but for `make`, which CI runs as it stands."""
    section = README.read_text("utf-8").split("## Five minutes")[1].split("\n## ")[0]
    found = [shlex.split(line, comments=True) for line in re.findall(r"^\$ (.*)$", section, re.MULTILINE)]
    return [words[1:] for words in found if words[0].startswith(".venv/bin/")]


@pytest.mark.heavy
def test_a_newcomers_commands_run_one_after_the_other(
    pia: Pia, tmp_path: Path, ray_address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(home_of_quick_demo(tmp_path / "home")))
    (tmp_path / "out").mkdir()  # `make demo` makes it
    assert len(first_commands()) == 3
    for words in first_commands():
        arguments = [word.replace("pia_ray/demo", str(ROOT / "pia_ray" / "demo")) for word in words]
        cluster = ["--address", ray_address] if words[0] == "animate" else []
        ended = pia(*arguments, *cluster)
        assert ended.code == 0, ended
    assert (tmp_path / "out" / "cat.mp4").stat().st_size > 1000
    assert len(list((tmp_path / "out" / "mine" / "videos").rglob("*.mp4"))) == 3


def test_every_make_target_exists() -> None:
    makefile = README.with_name("Makefile").read_text("utf-8")
    text = "\n".join(path.read_text("utf-8") for path in DOCUMENTS)
    targets = set(re.findall(r"(?:`|^\$ )make (?:[A-Z]+=\S+ )*([a-z-]+)\b", text, re.MULTILINE))
    assert {"demo", "check", "test", "bench"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_python_examples_compile() -> None:
    assert len(blocks("python")) >= 10
    for block in blocks("python"):
        compile(block, "example", "exec")


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_inside_the_repository_lead_somewhere(path: Path) -> None:
    text = re.sub(r"```.*?```", "", path.read_text("utf-8"), flags=re.DOTALL)
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)", text):
        there = path if not target else path.parent / target
        assert there.exists(), target
        assert there.resolve().is_relative_to(ROOT.resolve()), target
        if anchor:
            assert anchor in anchors(there), f"{target}#{anchor}"


def anchors(path: Path) -> set[str]:
    """Of the headings, as the usual renderers make them."""
    headings = re.findall(r"^#+ (.+)$", path.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_guide_is_reached_from_the_readme_and_the_index() -> None:
    for path in (ROOT / "docs").glob("*.md"):
        assert path.name == "pypi.md" or f"](docs/{path.name}" in README.read_text("utf-8"), path.name
        assert path.name == "README.md" or f"]({path.name}" in (ROOT / "docs/README.md").read_text("utf-8"), path.name


def test_the_site_has_every_guide_and_links_to_the_repository_for_what_is_not_a_page() -> None:
    names = set(pages())
    guides = {path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md") if path.name != "pypi.md"}
    assert guides <= names
    for name in guides | {"README.md"}:
        text = re.sub(r"```.*?```", "", page(name, names), flags=re.DOTALL)
        for target in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", text):
            there = (ROOT / name).parent.joinpath(target).resolve().relative_to(ROOT.resolve())
            assert there.as_posix() in names, f"{name}: {target}"


def test_the_readme_stays_short_enough_to_read() -> None:
    assert len(README.read_text("utf-8").splitlines()) <= 230, "move what a newcomer does not read into docs/"


def test_the_first_page_shows_each_step_of_a_catalogue_on_one_screen() -> None:
    section = README.read_text("utf-8").split("\n## Your own catalogue\n")[1].split("\n## ")[0]
    steps = dict(re.findall(r"^### (.+)\n((?:(?!### ).*\n)*)", section, re.MULTILINE))
    assert list(steps) == ["The manifest", "The run", "The results", "Retry"]
    for name, text in steps.items():
        assert "```" in text, f"{name} has no example"
        assert len(text.splitlines()) <= 30, f"{name} is longer than a screen"


def test_an_index_page_has_no_relative_link_and_metadata_that_an_index_takes() -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", index_page())
    assert len(links) > 30
    assert [link for link in links if not re.match(r"https?://|#", link)] == []
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert {"Source", "Documentation", "Changelog", "Issues"} <= set(project["urls"])
    assert (ROOT / project["readme"]).read_text("utf-8") == index_page()


def test_the_citation_names_the_paper_and_this_version() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert cited["version"] == pia_ray.__version__
    assert cited["preferred-citation"]["url"].endswith("2312.13964")


def test_the_changelog_is_grouped() -> None:
    text = (ROOT / "CHANGELOG.md").read_text("utf-8")
    versions = re.split(r"^## ", text, flags=re.MULTILINE)[1:]
    assert versions[0].startswith("Unreleased\n")
    assert f"{pia_ray.__version__}\n" in {version.splitlines(keepends=True)[0] for version in versions}
    for version in versions:
        assert re.findall(r"^### (.+)$", version, re.MULTILINE) == ["Added", "Changed", "Fixed", "Security"]


def test_the_drawn_tree_is_that_of_the_package() -> None:
    drawn = contributing("The tree").split("```")[1].splitlines()[2:]
    folders: list[str] = []
    named = set()
    for line in drawn:
        indent, names = re.match(r"^( *)((?:[\w.]+/?\s)+?) ", line).groups()  # type: ignore[union-attr]
        depth = len(indent) // 2 - 1
        for name in names.split():
            folders[depth:] = [name.removesuffix("/")]
            named.add("/".join(folders))
    package = ROOT / "pia_ray"
    there = {path.parent.relative_to(package).as_posix() for path in package.rglob("__init__.py")} - {"."}
    there |= {path.name for path in package.glob("*.py")} - {"__init__.py"}
    assert named == there | {"demo"}


def test_the_drawing_names_folders_of_the_package_and_has_a_dark_variant() -> None:
    drawing = (ROOT / "docs/architecture.svg").read_text("utf-8")
    named = set(
        re.findall(r"\b(\w+)/(?=[\s:,<])", re.sub(r"<(?:style|desc).*?</(?:style|desc)>", "", drawing, flags=re.DOTALL))
    )
    assert {"catalog", "online", "pia", "storage", "manifest", "ledger"} <= named
    assert named <= {path.parent.name for path in (ROOT / "pia_ray").rglob("__init__.py")}
    assert "prefers-color-scheme:dark" in drawing


def contributing(heading: str) -> str:
    return (ROOT / "CONTRIBUTING.md").read_text("utf-8").split(f"## {heading}\n")[1].split("\n## ")[0]


def test_the_glossary_has_its_fifteen_words() -> None:
    words = re.findall(r"^\| \*\*(.+?)\*\* \|", contributing("Words"), re.MULTILINE)
    assert len(words) == len(set(words)) == 15
    assert {"row", "item", "video", "part", "claim", "lease", "attempt", "style", "engine", "renderer"} < set(words)
    assert {"row program", "evaluation", "branch", "batch", "forward"} < set(words)


def test_the_reading_order_names_what_is_there() -> None:
    paths = re.findall(r"`([\w/]+(?:\.py|/))`", contributing("Reading order"))
    assert len(paths) > 10
    for path in paths:
        assert (ROOT / "pia_ray" / path).exists() or path == "pia_ray/", path


def test_results_columns_are_those_of_the_value_type() -> None:
    assert RESULTS_SCHEMA.names == [field.name for field in fields(ResultRow)]


def imported(source: str) -> list[tuple[str, str]]:
    """Module and name of each import from this package; the name is empty where a module is imported whole."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [(node.module or "", alias.name) for alias in node.names]
    return [(module, name) for module, name in found if module.split(".")[0] == "pia_ray"]


def python_for_users() -> dict[str, str]:
    """Every program that this repository shows to users, by the file that it stands in."""
    programs = {}
    for path in DOCUMENTS:
        found = re.findall(r"```python\n(.*?)```", path.read_text("utf-8"), re.DOTALL)
        programs |= {f"{path.relative_to(ROOT)} {number}": text for number, text in enumerate(found)}
    programs |= {str(path.relative_to(ROOT)): path.read_text("utf-8") for path in (ROOT / "jobs").glob("*.py")}
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
        programs |= {f"{path.relative_to(ROOT)} {number}": cell.source for number, cell in enumerate(cells)}
    return {name: text for name, text in programs.items() if not name.startswith("docs/api.md")}


def test_every_program_for_users_imports_public_names_only() -> None:
    public = {"pia_ray": set(pia_ray.__all__), "pia_ray.testing": set(pia_ray.testing.__all__)}
    programs = python_for_users()
    assert len(programs) > 40
    used = {(place, *each) for place, text in programs.items() for each in imported(text)}
    assert len(used) > 20
    assert [each for each in sorted(used) if each[2] not in public.get(each[1], set())] == []
