"""Manifests -> work items: columns, ids, validation and work keys.

Reading files is `tables`' part, naming pictures `references`'. A manifest is planned in one streaming pass with bounded
memory; rows that cannot be animated become rejected items, and only what spoils the manifest as a whole raises.
"""

from __future__ import annotations

import pyarrow as pa

ITEMS_SCHEMA = pa.schema(
    [
        pa.field("work_key", pa.string(), nullable=False),
        pa.field("id", pa.string(), nullable=False),
        pa.field("video_index", pa.int32(), nullable=False),
        pa.field("image", pa.string(), nullable=False),
        pa.field("image_identity", pa.string(), nullable=False),
        pa.field("prompt", pa.string()),
        pa.field("seed", pa.uint64(), nullable=False),
        pa.field("params", pa.string(), nullable=False),
        pa.field("error_code", pa.string()),
        pa.field("error_message", pa.string()),
    ]
)
"""One planned work item, in manifest order; a manifest's pass-through columns follow, with their own types. An
`error_message` marks a rejected row: it becomes a failed row without reaching a worker."""
