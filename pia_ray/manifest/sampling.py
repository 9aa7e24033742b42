"""A sample of a plan: the same work items each time, drawn by their keys from all of the manifest."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


def sampled(tables: Iterable[pa.Table], size: int, schema: pa.Schema) -> pa.Table:
    """The valid items with the least work keys, at most `size`, in manifest order.

    Keys are sha256, so that such items are spread evenly; a larger sample holds a smaller one.
    """
    ordered = schema.append(pa.field("\0position", pa.int64()))
    kept = ordered.empty_table()
    seen = 0
    for table in tables:
        positions = pa.array(np.arange(seen, seen + len(table)))
        seen += len(table)
        table = pa.Table.from_arrays([*table.columns, positions], schema=ordered)
        table = pa.concat_tables([kept, table.filter(pc.is_null(table["error_code"]))])
        kept = table.take(pc.select_k_unstable(table, k=min(size, len(table)), sort_keys=[("work_key", "ascending")]))
        kept = kept.combine_chunks()
    return kept.sort_by("\0position").drop_columns(["\0position"])
