"""Checks every row of a manifest as a run would, without a model: knobs, references, ids, and the images if asked."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final

from pia_ray import manifest, steps
from pia_ray.config import CatalogConfig
from pia_ray.errors import BadParameter, PiaRayError, RowError

FETCHES: Final = 8
"""Images opened at once."""


@dataclass(frozen=True)
class Finding:
    """What was found about one work item."""

    id: str
    num_items: int
    """Work items looked at so far."""
    error: PiaRayError | None


def validate(config: CatalogConfig, *, fetch: bool) -> Iterator[Finding]:
    """One finding per work item, in order; `fetch` also reads and decodes each image.

    Raises:
        ManifestError: the manifest as a whole cannot be used.
    """
    opened = manifest.open_manifest(
        config.manifest,
        id_col=config.id_col,
        image_col=config.image_col,
        prompt_col=config.prompt_col,
        has_default_prompt="prompt" in config.defaults,
    )
    num_items = 0
    with ThreadPoolExecutor(FETCHES, thread_name_prefix="fetch") as pool:
        for table in manifest.plan(opened, config, model_version=config.model.name):
            names = manifest.ITEMS_SCHEMA.names
            for batch in table.select(names).to_batches(max_chunksize=256):
                items = batch.to_pylist()
                for item, error in zip(items, pool.map(lambda item: _check(item, config, fetch), items), strict=True):
                    num_items += 1
                    yield Finding(item["id"], num_items, error)


def _check(item: dict[str, Any], config: CatalogConfig, fetch: bool) -> RowError | None:
    if item["error_code"] is not None:
        return BadParameter(item["error_message"])
    if fetch:
        try:
            steps.fetch(manifest.row_from_item(item), config)
        except RowError as error:
            return error
    return None
