"""Prompts and ids with names of columns in them -> those of each row.

`{title}` is a row's cell, `{title|lower|words:5}` the cell through filters. A clause in square brackets that holds a
column is left out where a cell of it is empty. `{{` and `}}` are braces as text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from pia_ray.config.catalog import CatalogConfig
from pia_ray.config.knobs import suggest
from pia_ray.errors import BadParameter, ManifestError
from pia_ray.manifest.tables import Chunk, Columns, PictureOfRow

ID: Final = "id"
"""The name under which `templates_of` has the run's template of ids."""

TEMPLATE_KNOBS: Final = ("prompt", "negative_prompt")
"""Knobs whose value for the run may name columns."""

_FIELD: Final = re.compile(r"\{\{|\}\}|\{([^{}|]+)((?:\|[^{}|]*)*)\}")
_CLAUSE: Final = re.compile(r"\[([^\[\]]*\{[^{}]+\}[^\[\]]*)\]")


def templates_of(config: CatalogConfig) -> dict[str, str]:
    """The run's prompts that name columns, by knob, and under `id` the template of ids where --id-col is one."""
    texts = {**{knob: config.defaults.get(knob) for knob in TEMPLATE_KNOBS}, ID: config.id_col}
    return {name: text for name, text in texts.items() if text and fields_of(text)}


def fields_of(template: str) -> list[str]:
    """The columns that a template names, in order."""
    return [found[1].strip() for found in _FIELD.finditer(template) if found[1]]


def check(template: str, knob: str, *, names: Sequence[str], where: str) -> None:
    """Checks a template against the columns of a file.

    Raises:
        ManifestError: a column is missing, or a filter is not known.
    """
    flag = "--id-col" if knob == ID else f"--{knob.replace('_', '-')}"
    for found in _FIELD.finditer(template):
        if not found[1]:
            continue
        name = found[1].strip()
        if name not in names:
            raise ManifestError(
                f'{where} has no column "{name}", which {flag} names: write {{{{ and }}}} for '
                f"braces that are text.{suggest(name, names)} Columns there: {', '.join(names)}"
            )
        for text in found[2].split("|")[1:]:
            try:
                _filtered("", text)
            except ValueError:
                raise ManifestError(
                    f'{flag}: "{text.strip()}" is not a filter of {{{name}}}: choose from strip, lower and words:N'
                ) from None


def fill(template: str, cells: Mapping[str, Any], *, field: str = "prompt") -> str:
    """The text of one row; `field` is what it is for.

    Raises:
        BadParameter: a cell outside of clauses is empty.
    """

    def clause(found: re.Match[str]) -> str:
        try:
            return _filled(found[1], cells, field)
        except BadParameter:
            return ""

    return _filled(
        _CLAUSE.sub(lambda found: clause(found).replace("{", "{{").replace("}", "}}"), template), cells, field
    )


def with_prompts(templates: Mapping[str, str], columns: Columns, chunk: Chunk) -> tuple[Columns, Chunk]:
    """The chunk with a prompt in each row that has none of its own, with ids, and its columns.

    The cell of a row whose template cannot be filled is the error.
    """
    cells = dict(chunk.cells)
    for knob, template in templates.items():
        column = (columns.prompt or "prompt") if knob == "prompt" else columns.knobs.get(knob, knob)
        if knob == ID:
            column = template  # no column of the file has this name
        values = {name: _column(chunk, columns, name) for name in fields_of(template)}
        own = cells.get(column, [None] * chunk.num_rows)
        cells[column] = [
            cell
            if cell is not None or chunk.is_blank(index)
            else _text(template, {name: value[index] for name, value in values.items()}, ID if knob == ID else "prompt")
            for index, cell in enumerate(own)
        ]
        if knob == ID:
            cells[column] = [_of_picture(cell, chunk.picture(index)) for index, cell in enumerate(cells[column])]
        if knob == "prompt":
            columns = replace(columns, prompt=column)
        elif knob == ID:
            columns = replace(columns, id=column)
        elif knob not in columns.knobs:
            columns = replace(columns, knobs={**columns.knobs, knob: column})
    return columns, replace(chunk, cells=cells)


def _column(chunk: Chunk, columns: Columns, name: str) -> Sequence[Any]:
    if name in chunk.cells:
        return chunk.cells[name]
    values: list[Any] = chunk.passed[columns.passed[name]].to_pylist()
    return values


def _text(template: str, cells: Mapping[str, Any], field: str) -> str | BadParameter:
    try:
        return fill(template, cells, field=field)
    except BadParameter as error:
        return error


def _of_picture(row_id: Any, picture: PictureOfRow | None) -> Any:
    return row_id if picture is None or not isinstance(row_id, str) else picture.id_in(row_id)


def _filled(text: str, cells: Mapping[str, Any], field: str) -> str:
    def value(found: re.Match[str]) -> str:
        if not found[1]:
            return found[0][0]
        name = found[1].strip()
        cell = cells.get(name)
        result = "" if cell is None else str(cell)
        for each in found[2].split("|")[1:]:
            result = _filtered(result, each)
        if not result.strip():
            raise BadParameter(
                f"{field}: the cell of {name} is empty, and the run's {field} needs it: put its clause in [...], or "
                f"give the row {'an id' if field == ID else 'a prompt'}",
                field,
            )
        return result

    return _FIELD.sub(value, text)


def _filtered(value: str, text: str) -> str:
    """The value through one filter, such as `lower` or `words:5`; ValueError for another."""
    name, _, argument = text.strip().partition(":")
    if name == "words" and argument.isdecimal() and int(argument):
        return " ".join(value.split()[: int(argument)])
    if argument or name not in ("strip", "lower"):
        raise ValueError(text)
    return value.strip() if name == "strip" else value.lower()
