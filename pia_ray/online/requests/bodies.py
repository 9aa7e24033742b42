"""The fields of bodies: of JSON objects, and of forms, whose names are unfolded to nested values."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from pia_ray.errors import BadParameter
from pia_ray.online.public_errors import shortened

Fields = Mapping[str, object]
"""A request's fields: JSON values, and bytes for files."""


def media_type(headers: Mapping[str, str]) -> str:
    """The media type of a body by its headers: in lower case, without parameters; an empty string if none is given."""
    return headers.get("content-type", "").partition(";")[0].strip().lower()


def parse_json(content: bytes) -> dict[str, object]:
    """The object of a JSON text.

    Raises:
        BadParameter: it is not an object, has NaN or a name twice, or is nested too deeply.
    """
    try:
        value = json.loads(content, parse_constant=_no_constant, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:  # decoding errors are ValueErrors
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise BadParameter(f"the body is not JSON: {shortened(reason)}") from None
    if not isinstance(value, dict):
        raise BadParameter("the body must be a JSON object of fields")
    return value


def unfold(pairs: list[tuple[str, str | bytes]]) -> dict[str, object]:
    """The fields of a form as JSON has them: `a[b]` becomes part of an object, `a[]` of a list.

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
            raise BadParameter(f"{shortened(name)} occurs twice", shortened(top))
    return fields


def _no_constant(name: str) -> object:
    raise ValueError(f"{name} is not a JSON number")


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("an object has the same name twice")
    return found
