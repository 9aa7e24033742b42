"""Checks of every row of a manifest as a run makes them, without a model: knobs, references, ids, images if asked."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final

import pyarrow as pa

from pia_ray import manifest, storage
from pia_ray.catalog import steps
from pia_ray.catalog.retaking import RetakePlan
from pia_ray.catalog.rows.outage import Outage, Sources
from pia_ray.catalog.rows.tries import SOURCE_AWAY, Tries
from pia_ray.config.catalog import CatalogConfig
from pia_ray.config.knobs import AnimationParams
from pia_ray.config.prompt_syntax import literal_part, looks_weighted
from pia_ray.errors import RowError
from pia_ray.media.finish import require_finishable
from pia_ray.media.marking import check_signing
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
        ConfigError: certificate and key cannot sign videos of the run.
    """
    check_signing(config, format=config.format)
    opened = manifest.open_manifest(config) if opened is None else opened
    style_versions = {style: model.name for style, model in config.styles.items()}
    items = manifest.plan(opened, config, model_version=config.model.name, style_versions=style_versions)
    yield from _fetched(items, config) if fetch else _checked(items, config)


def _fetched(items: Iterator[pa.Table], config: CatalogConfig) -> Iterator[Finding]:
    """The findings on items whose pictures are read and decoded."""
    num_items = 0
    with ThreadPoolExecutor(FETCHES, thread_name_prefix="fetch") as pool:
        check, plan = _Check(config), RetakePlan(config)
        for table in items:
            faults = iter(plan.faults(table))
            for batch in table.select(manifest.ITEMS_SCHEMA.names).to_batches(max_chunksize=256):
                rows = batch.to_pylist()
                for item, error in zip(rows, pool.map(check, rows), strict=True):
                    num_items += 1
                    yield _finding(item, num_items, next(faults) or error)


def _finding(item: dict[str, Any], num_items: int, error: RowError | None) -> Finding:
    if item["error_code"] is not None:
        return Finding(item["id"], num_items, item["error_code"], item["error_message"])
    if error is None:
        note = _note(item["prompt"], item["params"])
        return Finding(item["id"], num_items, None, None, note=note, prompt=item["prompt"])
    return Finding(item["id"], num_items, error.code, error.message, is_unreachable=isinstance(error, SOURCE_AWAY))


def _checked(items: Iterator[pa.Table], config: CatalogConfig) -> Iterator[Finding]:
    """The findings on items by their cells alone. Knobs that many rows share are checked once."""
    verdicts: dict[str, tuple[str | None, str | None]] = {}
    num_items, plan = 0, RetakePlan(config)
    for table in items:
        faults = iter(plan.faults(table))
        for batch in table.select(_CELLS).to_batches(max_chunksize=10_000):
            for row_id, params, prompt, code, message in zip(*map(manifest.values_of, batch.columns), strict=True):
                num_items += 1
                fault = next(faults)
                if code is None and fault is not None:
                    code, message = fault.code, fault.message
                elif code is None:
                    shared = manifest.shared_params(params)
                    if shared not in verdicts:
                        if len(verdicts) >= _MEMO_SIZE:
                            verdicts.clear()
                        verdicts[shared] = _encodable(params, config)
                    code, message = verdicts[shared]
                if code is not None:
                    yield Finding(row_id, num_items, code, message)
                else:
                    yield Finding(row_id, num_items, None, None, _note(prompt, params), prompt)


_CELLS: Final = ["id", "params", "prompt", "error_code", "error_message"]
_MEMO_SIZE: Final = 10_000


def _note(prompt: str, params: str) -> str | None:
    """A sentence where a prompt is written in a syntax that it is not read in."""
    # The default may be left out.
    plain = '"prompt_syntax":"' not in params or '"prompt_syntax":"plain"' in params
    for knob, text in (("prompt", prompt), ("negative_prompt", manifest.negative_prompt_of(params))):
        if plain and looks_weighted(text):
            return (
                f"{knob} looks weighted and is read as plain text: prompt_syntax a1111 reads weights, BREAK and LoRAs"
            )
        if (literal := literal_part(text)) is not None:
            return f"{knob} holds {literal}"
    return None


def _encodable(params: str, config: CatalogConfig) -> tuple[str | None, str | None]:
    """Error code and message of knobs that the run's format cannot hold, or None for both."""
    knobs = AnimationParams.model_construct(**json.loads(params))
    try:
        require_finishable(config.format, knobs)
    except RowError as error:
        return error.code, error.message
    return None, None


class _Check:
    """The fetch of single items, which waits for hosts and stores as a run's rows do. Threads share it."""

    def __init__(self, config: CatalogConfig) -> None:
        self._config = config
        self._web = steps.web_of(config)
        self._sources = Sources(Outage(), patience_s=config.patience_s)

    def __call__(self, item: dict[str, Any]) -> RowError | None:
        """The error of a planned item; None where nothing is wrong, or the plan has said it."""
        if item["error_code"] is not None:
            return None
        try:
            self._fetch_files(manifest.row_from_item(item))
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
