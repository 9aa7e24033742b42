"""Checks of every row of a manifest as a run makes them, without a model: knobs, references, ids, images if asked."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final

from pia_ray import manifest, storage
from pia_ray.catalog import steps
from pia_ray.catalog.outage import Outage, Sources
from pia_ray.catalog.tries import SOURCE_AWAY, Tries
from pia_ray.config.catalog import CatalogConfig
from pia_ray.config.prompt_syntax import looks_weighted
from pia_ray.errors import RowError
from pia_ray.media import video
from pia_ray.types import ManifestRow

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
    is_unreachable: bool = False
    """Whether its files could not be read now, as often as it was tried; they may be another time."""


def validate(config: CatalogConfig, *, fetch: bool, opened: manifest.Manifest | None = None) -> Iterator[Finding]:
    """One finding per work item, in order; `fetch` also reads and decodes each image.

    `opened` is the manifest of `config` where the caller has opened it.

    Raises:
        ManifestError: the manifest as a whole cannot be used.
    """
    opened = manifest.open_manifest(config) if opened is None else opened
    num_items = 0
    with ThreadPoolExecutor(FETCHES, thread_name_prefix="fetch") as pool:
        check = _Check(config, fetch=fetch)
        style_versions = {style: model.name for style, model in config.styles.items()}
        items = manifest.plan(opened, config, model_version=config.model.name, style_versions=style_versions)
        for table in items:
            names = manifest.ITEMS_SCHEMA.names
            for batch in table.select(names).to_batches(max_chunksize=256):
                rows = batch.to_pylist()
                for item, error in zip(rows, pool.map(check, rows) if fetch else map(check, rows), strict=True):
                    num_items += 1
                    yield _finding(item, num_items, error)


def _finding(item: dict[str, Any], num_items: int, error: RowError | None) -> Finding:
    if item["error_code"] is not None:
        return Finding(item["id"], num_items, item["error_code"], item["error_message"])
    if error is None:
        return Finding(item["id"], num_items, None, None, note=_note(item), prompt=item["prompt"])
    return Finding(item["id"], num_items, error.code, error.message, is_unreachable=isinstance(error, SOURCE_AWAY))


def _note(item: dict[str, Any]) -> str | None:
    """A sentence where a prompt is written in a syntax that it is not read in."""
    params = manifest.row_from_item(item).params
    for knob in ("prompt", "negative_prompt") if params.prompt_syntax == "plain" else ():
        if looks_weighted(getattr(params, knob)):
            return (
                f"{knob} looks weighted and is read as plain text: prompt_syntax a1111 reads weights, BREAK and LoRAs"
            )
    return None


class _Check:
    """The check of single items, which wait for hosts and stores as a run's rows do. Threads share it."""

    def __init__(self, config: CatalogConfig, *, fetch: bool) -> None:
        self._config = config
        self._fetch = fetch
        self._web = steps.web_of(config)
        self._sources = Sources(Outage(), patience_s=config.patience_s)

    def __call__(self, item: dict[str, Any]) -> RowError | None:
        """The error of a planned item; None where nothing is wrong, or the plan has said it."""
        if item["error_code"] is not None:
            return None
        row, config = manifest.row_from_item(item), self._config
        try:
            if self._fetch:
                self._fetch_files(row)
            else:
                params = row.params
                video.require_encodable(
                    config.format, width=params.width or 8, height=params.height or 8, fps=params.fps
                )
        except RowError as error:
            return error
        return None

    def _fetch_files(self, row: ManifestRow) -> None:
        tries = Tries(row, self._config, self._sources)
        while True:
            tries.used += 1
            try:
                with storage.patience(self._config.patience_s):
                    steps.fetch(row, self._config, web=self._web)
            except RowError as error:
                if not tries.has_another(error):
                    raise
                time.sleep(tries.pause_s)
            else:
                self._sources.answered(row)
                return
