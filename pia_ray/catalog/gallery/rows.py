"""The rows of a gallery: those that it shows, and their cells as the JSON that its script reads."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from datetime import datetime
from typing import Any, Final, Literal
from urllib.parse import quote, urlsplit, urlunsplit

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pia_ray.config.knob_types import MOTION_NAMES
from pia_ray.errors import row_errors
from pia_ray.ledger import path_in_output
from pia_ray.result_row import FAILED, JUDGED, ResultRow

Row = Mapping[str, Any]

_SHOWN: Final = (
    *("id", "video_index", "status", "error_code", "error_message", "retryable", "attempts", "prompt", "seed"),
    *("width", "height", "num_frames", "fps", "duration_s", "size_bytes", "original_width", "original_height"),
    *("work_key", "model", "run_id", "worker", "fetch_s", "animate_s", "publish_s", "gpu_s", "flags"),
    *JUDGED,
    *("accepted", "take", "review", "review_note", "review_take"),
)
"""Result columns that reach the page as they are."""

_WORKED_ON: Final = (
    *("video_uri", "thumbnail_uri", "input_thumbnail_uri", "poster_uri", "image_uri", "params", "finished_at"),
)
"""Result columns that are worked on first."""

_KNOWN: Final = frozenset(field.name for field in fields(ResultRow))
_ELSEWHERE: Final = frozenset({"prompt", "seed", "width", "height", "num_frames", "fps", "motion_scale"})
"""Knobs that the page shows apart from the others."""

_BAD_WHERE_HIGH: Final = frozenset({"flicker", "colour_shift", "stillness"})
"""Numbers that are worst where they are high; the others where they are low."""

MOST_ROWS: Final = 20_000
"""Rows of one page, some 9 MB; of a larger catalogue it shows the first ones and says so."""

_LONGEST: Final = 2000
"""Characters of a cell that the page shows; results.parquet has all of it."""


def shown_rows(file: pq.ParquetFile) -> Iterator[Row]:
    """The rows to show: only their row groups are read in full, one at a time, and only the columns that are shown."""
    statuses: list[str] = []
    reviews: list[Review | None] = []
    wanted = [name for name in ("status", "review", "take", "review_take") if name in file.schema_arrow.names]
    for batch in file.iter_batches(columns=wanted):
        cells = pa.Table.from_batches([batch])
        statuses += cells["status"].to_pylist()
        reviews += _reviews(cells) if "review" in wanted else [None] * len(cells)
    chosen = np.array(chosen_rows(statuses, reviews), np.int64)
    columns = [name for name in file.schema_arrow.names if name not in _KNOWN or name in {*_SHOWN, *_WORKED_ON}]
    begin = 0
    for group in range(file.num_row_groups):
        end = begin + file.metadata.row_group(group).num_rows
        here = chosen[np.searchsorted(chosen, begin) : np.searchsorted(chosen, end)] - begin
        begin = end
        if len(here):
            yield from file.read_row_group(group, columns=columns).take(pa.array(here)).to_pylist()


Review = Literal["retaken", "done"]
"""The review of a row: taken again after a rejection, or with a verdict on its video."""


def chosen_rows(statuses: Sequence[str], reviews: Sequence[Review | None]) -> list[int]:
    """Indices of the rows to show: of too many at most a quarter failed ones, then others, in order.

    Of these, those that replace a rejected video come first, and those that have a verdict last.
    """
    if len(statuses) <= MOST_ROWS:
        return list(range(len(statuses)))
    failed = [index for index, status in enumerate(statuses) if status == FAILED][: MOST_ROWS // 4]
    others = [index for index, status in enumerate(statuses) if status != FAILED]
    others.sort(key=lambda index: ("retaken", None, "done").index(reviews[index]))
    return sorted([*failed, *others[: MOST_ROWS - len(failed)]])


def _reviews(cells: pa.Table) -> list[Review | None]:
    """The reviews of rows with the columns `review`, `take` and `review_take`."""
    columns = (cells[name].to_pylist() for name in ("review", "take", "review_take"))
    return [
        None if review is None else "done" if (take or 0) == about else "retaken"
        for review, take, about in zip(*columns, strict=True)
    ]


def rows_json(rows: Sequence[Row], *, output_id: str) -> str:
    """The rows as the page's script reads them, without characters that could end its element."""
    columns = {name: [_plain(known(row.get(name))) for row in rows] for name in _SHOWN}
    columns["seed"] = [None if row.get("seed") is None else str(row["seed"]) for row in rows]
    columns["video"] = [_link(row.get("video_uri")) for row in rows]
    columns["poster"] = [_link(row.get("input_thumbnail_uri")) for row in rows]
    columns["still"] = [_link(row.get("poster_uri")) for row in rows]
    columns["thumbnail"] = [_link(row.get("thumbnail_uri")) for row in rows]
    columns["image"] = [_reference(row.get("image_uri")) for row in rows]
    columns["finished_at"] = [round(at.timestamp()) if (at := time_of(row)) else None for row in rows]
    params = [_params(row) for row in rows]
    columns["motion_scale"] = [_plain(knobs.get("motion_scale")) for knobs in params]
    columns["motion_name"] = [_motion_name(knobs.get("motion_scale")) for knobs in params]
    names = dict.fromkeys(name for knobs in params for name in knobs if name not in _ELSEWHERE)
    extra = dict.fromkeys(name for row in rows[:1] for name in row if name not in _KNOWN)
    page = {
        "count": len(rows),
        "output": output_id,
        "judged": {name: "high" if name in _BAD_WHERE_HIGH else "low" for name in JUDGED},
        "columns": {name: _packed(values) for name, values in columns.items()},
        "knobs": {name: _packed([_plain(knobs.get(name)) for knobs in params]) for name in names},
        "extra": {name: _packed([_plain(row.get(name)) for row in rows]) for name in extra},
        "hints": hints({str(row.get("error_code")) for row in rows if row.get("error_code")}),
    }
    text = json.dumps(page, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    # No "<" can end the script element or open a comment in it; a lone surrogate becomes its JSON escape.
    return text.replace("<", "\\u003c").encode("utf-8", "backslashreplace").decode("utf-8")


def _packed(values: list[Any]) -> dict[str, Any]:
    """A column as a list, or where values repeat as its distinct values and an index into them."""
    distinct: dict[tuple[type, Any], int] = {}
    index = [distinct.setdefault((type(value), value), len(distinct)) for value in values]
    if len(distinct) * 2 > len(values):
        return {"v": values}
    return {"d": [value for _, value in distinct], "i": index}


def _plain(value: Any) -> str | int | float | bool | None:
    """A cell as JSON holds it without loss that matters to a reader."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return value if abs(value) < 2**53 else str(value)
    if isinstance(value, float):
        return round(value, 5) if math.isfinite(value) else str(value)
    if isinstance(value, bytes):
        return f"{len(value):,} bytes"
    if isinstance(value, dict | list):
        value = json.dumps(value, ensure_ascii=False, default=str)
    text = value.isoformat(" ") if isinstance(value, datetime) else str(value)
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


def known(value: Any) -> Any:
    """The value, or None where it is NaN or infinite."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _link(uri: str | None) -> str | None:
    """The relative link to a file of the output."""
    path = path_in_output(uri or "")
    return quote(path) if path.startswith(("videos/", "thumbnails/")) else None


def _reference(uri: str | None) -> str | None:
    """The reference of the picture, without signatures and passwords of URLs."""
    if not uri:
        return None
    if uri.startswith(("http://", "https://")):
        try:
            url = urlsplit(uri)
            uri = urlunsplit((url.scheme, url.netloc.rpartition("@")[2], url.path, "", ""))
        except ValueError:
            uri = uri.partition("?")[0]
    if uri.startswith("data:"):
        return f"{uri.partition(',')[0][:80]}, {len(uri):,} characters"
    return str(_plain(uri))


def _params(row: Row) -> dict[str, Any]:
    try:
        value = json.loads(row.get("params") or "{}")
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _motion_name(scale: object) -> str | None:
    return MOTION_NAMES[scale] if isinstance(scale, int) and 0 <= scale < len(MOTION_NAMES) else None


def hints(codes: Iterable[str]) -> dict[str, str]:
    """The meaning of each error code: the first sentence of its class."""
    kinds = row_errors()
    meanings = {code: kinds[code].__doc__ or "" for code in sorted(codes) if code in kinds}
    return {code: text.split(". ")[0].removesuffix(".") + "." for code, text in meanings.items()}


def time_of(row: Row) -> datetime | None:
    """The time when the row was finished."""
    at = row.get("finished_at")
    return at if isinstance(at, datetime) else None
