"""The meaning of a manifest's columns: id, picture, prompt, knobs, and those that pass through to the results.

Names decide, and the run's settings where they say otherwise. A file that names its columns as this package does keeps
that meaning; case and aliases count only in a file that could not be used without them.
"""

from __future__ import annotations

import difflib
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from logging import getLogger
from typing import Final

from pia_ray.config.catalog import CatalogConfig
from pia_ray.config.knobs import KNOBS, RESERVED_KNOBS, folded_name, knob_named, suggest
from pia_ray.errors import ManifestError
from pia_ray.manifest.column_types import check_types
from pia_ray.manifest.items import ITEMS_SCHEMA
from pia_ray.manifest.tables import Columns, TableFile
from pia_ray.manifest.templates import templates_of
from pia_ray.result_row import ResultRow

IMAGE_COLUMNS: Final = ("image", "url", "image_url", "image_path", "file_name")
_EXPORTED_IMAGE_COLUMNS: Final = ("image_link", "image_src", "image_uri", "images", "image_urls")
"""Names of the image column in shop feeds, shop exports, results and lists; they count after the others."""

PROMPT_COLUMNS: Final = ("prompt", "caption", "text")
"""Names of the image and prompt columns; the first that is there counts."""

_RESULT_COLUMNS: Final = frozenset({field.name for field in fields(ResultRow)} | set(ITEMS_SCHEMA.names))
_OWN_RESULTS: Final = frozenset({"work_key", "status", "image_uri", "video_uri", "params", "run_id"})
"""Columns by which an earlier run's results are known."""

_SHOWN: Final = 20
_log = getLogger(__name__)


@dataclass(frozen=True)
class ColumnUse:
    """The use of a manifest's columns over all its files, for people."""

    image: tuple[str, ...]
    prompt: tuple[str, ...]
    id: tuple[str, ...]
    knobs: tuple[str, ...]
    passed: tuple[str, ...]
    """As the results name them."""
    hint: str

    @property
    def text(self) -> str:
        """One line: the knobs, and what passes through; empty where there is neither."""
        parts = []
        if self.knobs:
            parts.append(f"knobs: {_listed(self.knobs)}{self.hint}")
        if self.passed:
            parts.append(f"passed through: {_listed(self.passed)}")
        return f"columns    {'; '.join(parts)}" if parts else ""


def use_of(columns: Sequence[Columns], config: CatalogConfig) -> ColumnUse:
    """The use of the columns of several files."""
    knobs = {knob: name for found in columns for knob, name in found.knobs.items()}
    bare = [name for knob, name in knobs.items() if knob in ("width", "height") and not is_decided(name, config)]
    hint = ""
    if bare:
        is_or_are = "are the sizes" if len(bare) > 1 else "is the size"
        hint = f" ({' and '.join(bare)} {is_or_are} of the video; --not-knobs {','.join(bare)} if of the picture)"
    passed = {name: None for found in columns for name in found.passed.values()}
    return ColumnUse(
        image=tuple(dict.fromkeys(found.image for found in columns)),
        prompt=tuple(dict.fromkeys(found.prompt for found in columns if found.prompt is not None)),
        id=tuple(dict.fromkeys(found.id for found in columns if found.id is not None)),
        knobs=tuple(knobs.values()),
        passed=tuple(passed),
        hint=hint,
    )


def meaning(file: TableFile, config: CatalogConfig) -> Columns:
    """The meaning of the columns of a file.

    Raises:
        ManifestError: there is no image or prompt, a named column is not there, or a type cannot work.
    """
    names = file.schema.names
    there = f"Columns there: {', '.join(names) or 'none'}."
    if file.kind == "pictures":
        return columns_of(names, config.model_copy(update={"id_col": None, "image_col": None, "prompt_col": None}))
    id_col = None if "id" in templates_of(config) else config.id_col
    named = (("--id-col", id_col), ("--image-col", config.image_col), ("--prompt-col", config.prompt_col))
    for flag, name in named:
        if name is not None and name not in names:
            raise ManifestError(f'{file.name} has no column "{name}" ({flag}).{suggest(name, names)} {there}')
    found = columns_of(names, config, partitions=file.partitions)
    if found.image not in names:
        raise ManifestError(
            f"{file.name} has no image column. {there} Name one of them "
            f"{', '.join(IMAGE_COLUMNS[:-1])} or {IMAGE_COLUMNS[-1]}, or say which it is with --image-col"
        )
    if found.prompt is None and "prompt" not in config.defaults:
        raise ManifestError(
            f"{file.name} has no prompt column. {there} Name one of them {', '.join(PROMPT_COLUMNS[:-1])} or "
            f"{PROMPT_COLUMNS[-1]}, say which it is with --prompt-col, or give a --prompt for all rows"
        )
    _check_names(file, found, config)
    check_types(file, found)
    return found


def columns_of(names: Sequence[str], config: CatalogConfig, *, partitions: Iterable[str] = ()) -> Columns:
    """The meaning of columns of these names. The image's column may be missing; `partitions` pass through."""
    found = _meant(names, config)
    if not (more := [name for name in partitions if name not in names]):
        return found
    return replace(found, passed=_passed([*names, *more], set(names).difference(found.passed)))


def _meant(names: Sequence[str], config: CatalogConfig) -> Columns:
    found = _matched(names, {name: name for name in names}, config)
    if found.image in names and (found.prompt is not None or "prompt" in config.defaults):
        return found
    by_case = _matched(names, {folded_name(name): name for name in reversed(names)}, config)
    return by_case if by_case.image in names else found


def image_names(config: CatalogConfig) -> frozenset[str]:
    """The names that an image column may have, without regard to case."""
    named = () if config.image_col is None else (config.image_col,)
    return frozenset(map(folded_name, (*IMAGE_COLUMNS, *_EXPORTED_IMAGE_COLUMNS, *named)))


def is_decided(name: str, config: CatalogConfig) -> bool:
    """Whether a column is a knob because its owner says so, by its prefix or --knobs."""
    return folded_name(name).startswith("pia.") or (config.knobs is not None and _is_in(name, config.knobs))


def check_decisions(files: Iterable[TableFile], columns: Sequence[Columns], config: CatalogConfig) -> None:
    """Refuses --knobs and --not-knobs that name no column of any file, and logs the names that clash with results.

    Raises:
        ManifestError: names the flag and the column.
    """
    names = list(dict.fromkeys(name for file in files for name in file.schema.names))
    for flag, given in (("--knobs", config.knobs or ()), ("--not-knobs", config.not_knobs)):
        for name in given:
            if not _is_in(name, names):
                raise ManifestError(f'no file of the manifest has a column "{name}" ({flag}).{suggest(name, names)}')
    for name in config.knobs or ():
        if knob_named(name) is None:
            raise ManifestError(f'there is no knob "{name}" (--knobs).{suggest(name, KNOBS)}')
    own = all(set(names) >= _OWN_RESULTS for names in (file.schema.names for file in files))
    clashes = {name: new for found in columns for name, new in found.passed.items() if new != name}
    if clashes and not own:
        _log.warning(
            "columns that are named as those of the results pass through under another name: %s",
            _listed([f"{name} as {new}" for name, new in clashes.items()]),
        )


def _matched(names: Sequence[str], known: Mapping[str, str], config: CatalogConfig) -> Columns:
    """The meaning of columns, where `known` gives the column of a name."""
    own = set(names) >= _OWN_RESULTS
    aliases = ("image_uri",) if own else (*IMAGE_COLUMNS, *_EXPORTED_IMAGE_COLUMNS)
    image = config.image_col or next((known[name] for name in aliases if name in known), IMAGE_COLUMNS[0])
    prompts = (*PROMPT_COLUMNS, "pia.prompt")
    prompt = config.prompt_col or next((known[name] for name in prompts if name in known), None)
    row_id = None if "id" in templates_of(config) else config.id_col or known.get("id")
    taken = {image, prompt, row_id}
    decided = {"seed"} if own and config.knobs is None else config.knobs
    knobs = {
        knob: name
        for name in reversed(names)
        if (knob := knob_named(name)) is not None
        and knob != "prompt"
        and name not in taken
        and _is_knob(name, known, decided, config.not_knobs)
    }
    knobs |= {knob: name for name in names if name not in taken and (knob := _prefixed(name)) not in (None, "prompt")}
    knobs = {knob: knobs[knob] for knob in KNOBS if knob in knobs}
    taken |= set(knobs.values())
    index = "video_index" if own and row_id == "id" else None
    return Columns(row_id, image, prompt, knobs, _passed(names, taken), index)


def _is_knob(name: str, known: Mapping[str, str], decided: Iterable[str] | None, refused: Iterable[str]) -> bool:
    if _is_in(name, refused):
        return False
    return known.get(knob_named(name) or "") == name if decided is None else _is_in(name, decided)


def _prefixed(name: str) -> str | None:
    """The knob of a column with the prefix of knobs."""
    return knob_named(name) if folded_name(name).startswith("pia.") else None


def _is_in(name: str, names: Iterable[str]) -> bool:
    names = list(names)
    return name in names or folded_name(name) in map(folded_name, names)


def _passed(names: Sequence[str], taken: Container[str | None]) -> dict[str, str]:
    """The columns that pass through, each with its name in the results."""
    passed: dict[str, str] = {}
    for name in names:
        if name in taken:
            continue
        new = name
        while new in _RESULT_COLUMNS or (new != name and new in names):
            new = f"manifest_{new}"
        passed[name] = new
    return passed


def _check_names(file: TableFile, columns: Columns, config: CatalogConfig) -> None:
    """Refuses knobs that are not supported; hints at columns that may be misspelt knobs."""
    for name in columns.passed:
        if config.knobs is not None or _is_in(name, config.not_knobs):
            continue
        if name in RESERVED_KNOBS:
            raise ManifestError(
                f'column "{name}" of {file.name}: this knob is not supported by this version; drop or rename the column'
            )
        if folded_name(name).startswith("pia."):
            wrong = name[4:]
            raise ManifestError(f'column "{name}" of {file.name}: there is no knob "{wrong}".{suggest(wrong, KNOBS)}')
        if name in KNOBS or set(file.schema.names) >= _OWN_RESULTS:
            continue
        if (near := _knob_like(folded_name(name))) is not None:
            _log.warning('%s: column "%s" passes through; did you mean the knob "%s"?', file.name, name, near)


@lru_cache(maxsize=4096)
def _knob_like(name: str) -> str | None:
    """The knob that a column's name is nearly; found once, because many files have the same columns."""
    return next(iter(difflib.get_close_matches(name, KNOBS, n=1, cutoff=0.85)), None)


def _listed(names: Sequence[str]) -> str:
    rest = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
