"""The words for values that pydantic refuses, in files, flags, requests and rows alike."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

_TEXTS: Final = {
    "missing": "is missing",
    "int_parsing": "must be a whole number",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_parsing": "must be a number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "bool_parsing": "must be true or false",
    "bool_type": "must be true or false",
    "string_type": "must be text",
    "tuple_type": "must be a list",
    "dict_type": "must be a mapping",
    "model_type": "must be a mapping of settings to values",
    "model_attributes_type": "must be a mapping of settings to values",
}
"""Faults by pydantic's name for them, where its own words are Python's."""


def fault_text(error: Mapping[str, Any]) -> str:
    """One of the faults of pydantic's `errors()` in words.

    Words that begin with "must" or "is" go on from the name of the value.
    """
    own = str(error["msg"]).removeprefix("Value error, ")
    return _TEXTS.get(error["type"]) or re.sub("^(?:Input|String) should", "must", own)
