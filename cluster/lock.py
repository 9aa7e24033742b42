"""Writes the image's requirements with hashes from pyproject.toml and constraints.txt; needs `uv` on the PATH.

    python cluster/lock.py

The three files: what both variants share, torch with CUDA, and what builds the wheel. `requirements-cpu.txt` is three
lines kept by hand, since the index of CPU builds is not PyPI; its head says how.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

CLUSTER = Path(__file__).parent
ROOT = CLUSTER.parent

ONLY_CUDA = re.compile(r"(torch|triton|cuda-[\w-]+|nvidia-[\w-]+)==")
"""The packages that torch of PyPI brings for CUDA."""

HEAD = "# Made by `python cluster/lock.py` from pyproject.toml and constraints.txt; for Python 3.11 on Linux, x86-64.\n"


def compiled(*words: str) -> list[str]:
    """One text per package that `uv pip compile WORDS` pins: its line and its hashes."""
    uv = ["uv", "pip", "compile", "--quiet", "--generate-hashes", "--no-header", "--no-annotate"]
    target = ["--python-version", "3.11", "--python-platform", "x86_64-manylinux_2_28"]
    command = [*uv, *target, "--constraints", "constraints.txt", *words]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return re.findall(r"^\S.*(?:\n {4}.*)*\n", done.stdout, re.MULTILINE)


def main() -> None:
    """Writes the files into the folder of this one."""
    packages = compiled("pyproject.toml", "--extra", "serve")
    cuda = [text for text in packages if ONLY_CUDA.match(text)]
    both = [text for text in packages if not ONLY_CUDA.match(text)]
    building = CLUSTER / "requirements-build.in"
    for name, texts in (("", both), ("-cuda", cuda), ("-build", compiled(str(building)))):
        (CLUSTER / f"requirements{name}.txt").write_text(HEAD + "".join(texts), "utf-8")


if __name__ == "__main__":
    main()
