"""The tables of an object, whose growth is a leak where callers choose their keys."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Set


def num_entries(holder: object) -> int:
    """Entries of all tables that an object holds itself."""
    return sum(len(each) for each in vars(holder).values() if isinstance(each, (Mapping, Set, list, deque)))
