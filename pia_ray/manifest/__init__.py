"""Manifests -> work items: formats, columns, ids, validation and work keys.

The names below are what other modules use. A manifest is planned in one streaming pass with bounded memory; rows that
cannot be animated become rejected items, and only what spoils the manifest as a whole raises.
"""

from pia_ray.manifest.cells import read_image_cell
from pia_ray.manifest.columns import ColumnUse
from pia_ray.manifest.items import (
    ITEMS_SCHEMA,
    Item,
    negative_prompt_of,
    row_from_item,
    shared_params,
    with_absolute_references,
    work_key,
)
from pia_ray.manifest.opening import Manifest, open_manifest
from pia_ray.manifest.planning import plan
from pia_ray.manifest.references import decode_data_url, redacted
from pia_ray.manifest.rows import plan_row
from pia_ray.manifest.tables import Columns, values_of

__all__ = [
    "ITEMS_SCHEMA",
    "ColumnUse",
    "Columns",
    "Item",
    "Manifest",
    "decode_data_url",
    "negative_prompt_of",
    "open_manifest",
    "plan",
    "plan_row",
    "read_image_cell",
    "redacted",
    "row_from_item",
    "shared_params",
    "values_of",
    "with_absolute_references",
    "work_key",
]
