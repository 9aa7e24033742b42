"""Export names: a template with columns of the results -> the path of each video without its ending.

Only a `/` of the template makes a folder. What is in a cell never leaves the target, and is a valid name on every
usual file system.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any, Final

from pia_ray.errors import ConfigError, ManifestError
from pia_ray.manifest import templates

DEFAULT_NAME: Final = "{id}-{video_index}"

MOST_BYTES: Final = 200
"""UTF-8 bytes of one part of a path: file systems take 255, and endings follow."""

_FORBIDDEN: Final = frozenset('<>:"/\\|?*')
"""Characters that Windows, or a path, does not take in a name."""

_RESERVED: Final = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", re.IGNORECASE)
"""Names that Windows keeps for devices, with any ending."""


def check_name(template: str, *, names: Sequence[str], where: str) -> None:
    """Checks a template of names against the columns of the results.

    Raises:
        ConfigError: a column is missing, a brace has no partner, or the path leaves the target.
    """
    try:
        templates.check(template, "name", names=names, where=where)
    except ManifestError as error:
        raise ConfigError(error.message) from None
    rest = re.sub(r"\{\{|\}\}|\{[^{}]+\}", "x", template)
    if "{" in rest or "}" in rest:
        raise ConfigError(f'--name "{template}": a brace has no partner. Write {{{{ and }}}} for braces that are text')
    parts = rest.split("/")
    if any(part.strip(" .") == "" for part in parts) or "\\" in rest:
        raise ConfigError(
            f'--name "{template}" is not a path below the target: each part between slashes has a name, which is not '
            ". or .."
        )


def export_name(template: str, cells: Mapping[str, Any]) -> str:
    """The path of one row's video, without its ending.

    Raises:
        BadParameter: a cell that the template needs is empty.
    """
    safe = {name: _safe_cell(cells.get(name)) for name in templates.fields_of(template)}
    return "/".join(_safe_part(part) for part in templates.fill(template, safe, field="name").split("/"))


def folded(path: str) -> str:
    """The path as a file system without regard to case compares it."""
    return unicodedata.normalize("NFC", path.casefold())


def _safe_cell(cell: Any) -> str | None:
    """The cell as text without characters that a name cannot have, or that cannot be seen."""
    if cell is None:
        return None
    return _cleaned(unicodedata.normalize("NFC", str(cell)).strip())


def _safe_part(part: str) -> str:
    """One part of a path: not hidden, not a device of Windows, and short enough."""
    part = _cleaned(part).encode("utf-8", "replace")[:MOST_BYTES].decode("utf-8", "ignore").strip().rstrip(". ")
    if not part or part.startswith(".") or _RESERVED.fullmatch(part):
        return f"_{part.lstrip('.')}"
    return part


def _cleaned(text: str) -> str:
    return "".join("-" if char in _FORBIDDEN or unicodedata.category(char)[0] == "C" else char for char in text)
