"""The pages of the site that `make docs` builds: the documents of the repository as they are, at the same paths.

`python -m tests.docs.site` copies them to build/pages. A link to a file that is not a page leads to the repository.
"""

from __future__ import annotations

import re
import shutil
import tomllib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).parents[2]
TARGET = ROOT / "build" / "pages"
ASSETS = (".svg", ".webp", ".jpg", ".png", ".css")


def pages() -> dict[str, Path]:
    """The documents, their pictures and style, by path in the site; pypi.md, a copy of the README, is left out."""
    config = tomllib.loads((ROOT / "zensical.toml").read_text("utf-8"))["project"]
    named = [path for section in config["nav"] for path in _leaves(section)]
    assets = [path for path in (ROOT / "docs").iterdir() if path.suffix in ASSETS]
    return {name: ROOT / name for name in (*named, *(path.relative_to(ROOT).as_posix() for path in assets))}


def _leaves(section: object) -> Iterator[str]:
    if isinstance(section, dict):
        for inner in section.values():
            yield from _leaves(inner)
    elif isinstance(section, list):
        for inner in section:
            yield from _leaves(inner)
    else:
        yield str(section)


def page(name: str, names: set[str]) -> str:
    """The text of a page whose links to other than `names` lead to the repository."""
    source = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["urls"]["Source"]

    def moved(match: re.Match[str]) -> str:
        path, anchor = match[2], match[3] or ""
        there = (ROOT / name).parent.joinpath(path).resolve()
        target = there.relative_to(ROOT.resolve()).as_posix()
        for known in (target, str(PurePosixPath(target, "README.md"))):
            if known in names:
                return f"{match[1]}{path}{'' if known == target else '/README.md'}{anchor})"
        kind = "tree" if there.is_dir() else "blob"
        return f"{match[1]}{source}/{kind}/main/{target}{anchor})"

    parts = re.split(r"(```.*?```)", (ROOT / name).read_text("utf-8"), flags=re.DOTALL)
    link = re.compile(r"(\]\()(?!https?:|#|mailto:)([^)#\s]+)(#[^)\s]+)?\)")
    return "".join(part if part.startswith("```") else link.sub(moved, part) for part in parts)


def write() -> None:
    """Writes all pages anew."""
    shutil.rmtree(TARGET, ignore_errors=True)
    found = pages()
    for name, path in found.items():
        target = TARGET / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".md":
            target.write_text(page(name, set(found)), "utf-8")
        else:
            shutil.copyfile(path, target)


if __name__ == "__main__":
    write()
