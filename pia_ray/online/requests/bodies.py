"""Bodies of requests as fields: JSON objects, and forms whose names are unfolded to what JSON would have."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from pia_ray.errors import BadParameter

Fields = Mapping[str, object]
"""A request's fields: JSON values, and bytes for files."""


def parse_json(content: bytes) -> dict[str, object]:
    """The object in a JSON text.

    Raises:
        BadParameter: none, or one with NaN, a name twice, or nested beyond reason.
    """
    try:
        value = json.loads(content, parse_constant=_no_constant, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:  # decoding faults are ValueErrors
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise BadParameter(f"the body is not JSON: {shown(reason)}") from None
    if not isinstance(value, dict):
        raise BadParameter("the body must be a JSON object of fields")
    return value


def unfold(pairs: list[tuple[str, str | bytes]]) -> dict[str, object]:
    """Fields as a form lists them -> as JSON has them: `a[b]` is in an object, `a[]` in a list.

    Raises:
        BadParameter: a field occurs twice, or in two ways.
    """
    fields: dict[str, Any] = {}
    for name, value in pairs:
        match = re.fullmatch(r"([^\[\]]+)\[([^\[\]]*)\]", name)
        top, inner = (match[1], match[2]) if match else (name, None)
        if inner is None:
            taken = top in fields
            fields.setdefault(top, value)
        elif inner == "":
            found = fields.setdefault(top, [])
            taken = not isinstance(found, list)
            if not taken:
                found.append(value)
        else:
            found = fields.setdefault(top, {})
            taken = not isinstance(found, dict) or inner in found
            if not taken:
                found[inner] = value
        if taken:
            raise BadParameter(f"{shown(name)} occurs twice", shown(top))
    return fields


def shown(text: str) -> str:
    """Text of a caller as it may stand in a message: short."""
    return text if len(text) <= 80 else f"{text[:77]}..."


def _no_constant(name: str) -> object:
    raise ValueError(f"{name} is no JSON number")


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("an object has the same name twice")
    return found
