"""Checks of every row of a manifest as a run makes them, without a model: knobs, references, ids, images if asked."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final

from pia_ray import manifest
from pia_ray.catalog import steps
from pia_ray.config.catalog import CatalogConfig
from pia_ray.config.prompt_syntax import literal_part, looks_weighted
from pia_ray.errors import RowError
from pia_ray.media import video

FETCHES: Final = 8
"""Images opened at once."""


@dataclass(frozen=True)
class Finding:
    """The check of one work item."""

    id: str
    num_items: int
    """Work items checked so far."""
    code: str | None
    """Error code as a run would record it; None where nothing is wrong."""
    message: str | None
    """Names row and field where the manifest is wrong."""
    note: str | None = None
    """A doubt about a row that is animated as it is."""
    prompt: str | None = None
    """As it is animated; None in a bad row."""


def validate(config: CatalogConfig, *, fetch: bool, opened: manifest.Manifest | None = None) -> Iterator[Finding]:
    """One finding per work item, in order; `fetch` also reads and decodes each image.

    `opened` is the manifest of `config` where the caller has opened it.

    Raises:
        ManifestError: the manifest as a whole cannot be used.
    """
    opened = manifest.open_manifest(config) if opened is None else opened
    num_items = 0
    with ThreadPoolExecutor(FETCHES, thread_name_prefix="fetch") as pool:

        def check(item: dict[str, Any]) -> tuple[str | None, str | None]:
            return _check(item, config, fetch=fetch)

        style_versions = {style: model.name for style, model in config.styles.items()}
        items = manifest.plan(opened, config, model_version=config.model.name, style_versions=style_versions)
        for table in items:
            names = manifest.ITEMS_SCHEMA.names
            for batch in table.select(names).to_batches(max_chunksize=256):
                rows = batch.to_pylist()
                found = pool.map(check, rows) if fetch else map(check, rows)
                for item, (code, message) in zip(rows, found, strict=True):
                    num_items += 1
                    if code is not None:
                        yield Finding(item["id"], num_items, code, message)
                    else:
                        yield Finding(item["id"], num_items, None, None, note=_note(item), prompt=item["prompt"])


def _note(item: dict[str, Any]) -> str | None:
    """A sentence where a prompt is written in a syntax that it is not read in."""
    params = manifest.row_from_item(item).params
    for knob in ("prompt", "negative_prompt"):
        text = getattr(params, knob)
        if params.prompt_syntax == "plain" and looks_weighted(text):
            return (
                f"{knob} looks weighted and is read as plain text: prompt_syntax a1111 reads weights, BREAK and LoRAs"
            )
        if (literal := literal_part(text)) is not None:
            return f"{knob} holds {literal}"
    return None


def _check(item: dict[str, Any], config: CatalogConfig, *, fetch: bool) -> tuple[str | None, str | None]:
    """Error code and message of one planned item, or None for both."""
    if item["error_code"] is not None:
        return item["error_code"], item["error_message"]
    row = manifest.row_from_item(item)
    try:
        if fetch:
            steps.fetch(row, config)
        else:
            params = row.params
            video.require_encodable(config.format, width=params.width or 8, height=params.height or 8, fps=params.fps)
    except RowError as error:
        return error.code, error.message
    return None, None
