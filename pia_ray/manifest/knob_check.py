"""Knob columns whose values are mostly impossible: most likely they are another thing than the knob of their name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from pia_ray.config.catalog import CatalogConfig
from pia_ray.config.knobs import REFERENCE_KNOBS, AnimationParams
from pia_ray.config.resolving import lora_strengths, parse_defaults
from pia_ray.errors import BadParameter, ManifestError
from pia_ray.manifest import references
from pia_ray.manifest.columns import is_decided
from pia_ray.manifest.tables import Chunk, Columns

_FEWEST: Final = 2
"""Impossible values that may still be slips of one row."""

_EARLY: Final = 10_000
"""Values after which a column is judged before the manifest ends."""


class KnobCheck:
    """Counts the values of knob columns, and those that the knob cannot have, row by row."""

    def __init__(self, config: CatalogConfig) -> None:
        self._config = config
        self._values: dict[tuple[str, str], int] = {}
        self._impossible: dict[tuple[str, str], int] = {}
        self._first: dict[tuple[str, str], str] = {}
        self._known: dict[tuple[str, Any], str] = {}

    def add(self, columns: Columns, chunk: Chunk, rejected: Sequence[int]) -> None:
        """Counts the rows of a chunk; `rejected` are the positions of those that a cell spoiled.

        Raises:
            ManifestError: as `end`, already now where there are many values.
        """
        for knob, name in columns.knobs.items():
            if is_decided(name, self._config):
                continue
            cells = chunk.cells[name]
            key = (knob, name)
            self._values[key] = self._values.get(key, 0) + len(cells) - sum(cell is None for cell in cells)
            for index in rejected:
                if cells[index] is not None and (text := self._wrong(knob, cells[index])):
                    self._impossible[key] = self._impossible.get(key, 0) + 1
                    self._first.setdefault(key, text)
        self._judge(_EARLY)

    def end(self) -> None:
        """Refuses the manifest where most values of a knob column are impossible.

        Raises:
            ManifestError: names the columns, their first wrong value, and the flag that lets them pass through.
        """
        self._judge(0)

    def _judge(self, fewest_values: int) -> None:
        guilty = [
            key
            for key, count in self._impossible.items()
            if count >= _FEWEST and 2 * count > self._values[key] >= fewest_values
        ]
        if not guilty:
            return
        found = [
            f'column "{name}": {self._impossible[knob, name]} of {self._values[knob, name]} values cannot be the knob '
            f"{knob}: {self._first[knob, name]}"
            for knob, name in guilty
        ]
        flag = ",".join(name for _, name in guilty)
        raise ManifestError(
            f"{', '.join(self._config.manifests)}: "
            + "\n  ".join(found)
            + f"\nWhere they mean something else, --not-knobs {flag} "
            f"lets them pass through; otherwise correct the values, or let such rows fail with --knobs {flag}"
        )

    def _wrong(self, knob: str, cell: Any) -> str:
        """The reason why no row of this run can have the value; empty where one can."""
        if knob in REFERENCE_KNOBS and not isinstance(cell, str):
            return ""
        try:
            if (knob, cell) in self._known:
                return self._known[knob, cell]
        except TypeError:  # a list, for example
            return self._reason(knob, cell)
        if len(self._known) >= _EARLY:
            self._known.clear()
        self._known[knob, cell] = self._reason(knob, cell)
        return self._known[knob, cell]

    def _reason(self, knob: str, cell: Any) -> str:
        try:
            if knob in REFERENCE_KNOBS:
                uri, _ = references.locate(cell, "/", what=knob)
                references.require_fetched(uri, allow_http=self._config.allow_http, what=knob)
                return ""
            value = parse_defaults({knob: cell})[knob]
            if knob == "style":
                self._config.model_for(value)
            if knob == "lora":
                models = (self._config.model, *self._config.styles.values())
                loras = {name: 1.0 for model in models for name in model.lora_weights}
                lora_strengths(AnimationParams(prompt="-", lora=value), loras)
        except BadParameter as error:
            return error.message
        return ""
