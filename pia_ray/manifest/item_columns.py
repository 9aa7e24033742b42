"""The columns of planned items as they grow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from pia_ray.manifest.items import ITEMS_SCHEMA, Item


class ItemColumns:
    """Lists of strings and numbers, which the garbage collector skips, in place of objects."""

    def __init__(self) -> None:
        self.columns: dict[str, list[Any]] = {name: [] for name in ITEMS_SCHEMA.names}
        self.sources: list[int] = []
        """Position in the chunk of each item's row."""
        self.ids: list[str] = []
        """One per row."""

    def add(self, source: int, items: Sequence[Item]) -> None:
        """Appends the items of one row."""
        self.ids.append(items[0].id)
        for item in items:
            self.sources.append(source)
            for column, value in zip(self.columns.values(), item, strict=True):
                column.append(value)

    def table(self, passed: pa.Table, schema: pa.Schema) -> pa.Table:
        """The items with the columns that pass through."""
        arrays = [pa.array(self.columns[column.name], column.type) for column in ITEMS_SCHEMA]
        if passed.num_columns and not len(self.sources) == len(self.ids) == passed.num_rows:
            passed = passed.take(pa.array(self.sources, pa.int64()))
        return pa.Table.from_arrays([*arrays, *passed.columns], schema=schema)
