"""The results of an output as one page: original and video side by side, prompt, settings, failures with reasons.

The page is a single file with relative links: it works from a folder, moved or not, and from S3, and asks for nothing
else. Its markup and style are `gallery.html`, its script `gallery.js`. Makes no thumbnails and opens no video.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from datetime import datetime
from importlib.resources import files
from itertools import islice
from typing import Any, Final
from urllib.parse import quote, unquote, urlsplit, urlunsplit

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pia_ray import ledger, storage
from pia_ray.config.knob_types import MOTION_NAMES
from pia_ray.errors import row_errors
from pia_ray.formatting import duration, size
from pia_ray.result_row import FAILED, JUDGED, SUCCEEDED, ResultRow

_Row = Mapping[str, Any]

_SHOWN: Final = (
    *("id", "video_index", "status", "error_code", "error_message", "retryable", "attempts", "prompt", "seed"),
    *("width", "height", "num_frames", "fps", "duration_s", "size_bytes", "original_width", "original_height"),
    *("work_key", "model", "run_id", "worker", "fetch_s", "animate_s", "publish_s", "gpu_s", "flags"),
    *JUDGED,
)
"""Result columns that reach the page as they are."""

_WORKED_ON: Final = ("video_uri", "thumbnail_uri", "input_thumbnail_uri", "image_uri", "params", "finished_at")
"""Result columns that are worked on first."""

_KNOWN: Final = frozenset(field.name for field in fields(ResultRow))
_ELSEWHERE: Final = frozenset({"prompt", "seed", "width", "height", "num_frames", "fps", "motion_scale"})
"""Knobs that the page shows apart from the others."""

NAME: Final = "index.html"

MOST_ROWS: Final = 20_000
"""Rows of one page, some 4 MB; of a larger catalogue it shows the first ones and says so."""

_LONGEST: Final = 2000
"""Characters of a cell that the page shows; results.parquet has all of it."""


def write_gallery(output: str, *, title: str | None = None) -> str:
    """Writes `index.html` next to the results and gives its URI.

    Raises:
        OutputError: there are no results yet.
        StorageError: the page could not be written.
    """
    with ledger.open_results(output) as file:
        rows = list(_shown_rows(file))
        num_left_out = file.metadata.num_rows - len(rows)
    uri = storage.join(output, NAME)
    page = gallery_html(rows, title=title or _title(output), num_left_out=num_left_out)
    storage.write_bytes(uri, page.encode("utf-8", "replace"), content_type="text/html; charset=utf-8")
    return uri


def gallery_html(rows: Sequence[_Row], *, title: str, num_left_out: int = 0) -> str:
    """The page for rows of the results table, in their order. All text in them is shown as text, never as markup.

    `num_left_out` rows are not among them; the page says so.
    """
    folder = files("pia_ray.catalog")
    script = folder.joinpath("gallery.js").read_text("utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    parts = {
        "TITLE": html.escape(title),
        "SCRIPT_HASH": f"sha256-{digest}",
        "SUMMARY": _left_out(len(rows), num_left_out) + _summary(rows),
        "FOOTER": _footer(rows),
        "ROWS": _rows_json(rows),
        "SCRIPT": script,
    }
    # One pass, so that marks inside of what is filled in are left alone.
    return re.sub(r"@@([A-Z_]+)@@", lambda match: parts[match[1]], folder.joinpath("gallery.html").read_text("utf-8"))


def _shown_rows(file: pq.ParquetFile) -> Iterator[_Row]:
    """The rows to show: only their row groups are read in full, one at a time, and only the columns that are shown."""
    failed: list[bool] = []
    for batch in file.iter_batches(columns=["status"]):
        failed += pc.equal(batch.column(0), FAILED).to_pylist()
    chosen = np.array(_chosen([FAILED if is_failed else SUCCEEDED for is_failed in failed]), np.int64)
    columns = [name for name in file.schema_arrow.names if name not in _KNOWN or name in {*_SHOWN, *_WORKED_ON}]
    begin = 0
    for group in range(file.num_row_groups):
        end = begin + file.metadata.row_group(group).num_rows
        here = chosen[np.searchsorted(chosen, begin) : np.searchsorted(chosen, end)] - begin
        begin = end
        if len(here):
            yield from file.read_row_group(group, columns=columns).take(pa.array(here)).to_pylist()


def _chosen(statuses: Sequence[str]) -> list[int]:
    """Indices of the rows to show: of too many at most a quarter failed ones, then the first that succeeded."""
    if len(statuses) <= MOST_ROWS:
        return list(range(len(statuses)))
    failed = [index for index, status in enumerate(statuses) if status == FAILED][: MOST_ROWS // 4]
    others = (index for index, status in enumerate(statuses) if status != FAILED)
    return sorted([*failed, *islice(others, MOST_ROWS - len(failed))])


def _left_out(num_rows: int, num_left_out: int) -> str:
    if not num_left_out:
        return ""
    return (
        f"<p>This page shows {num_rows:,} of {num_rows + num_left_out:,} rows, and its numbers are of these: "
        "results.parquet has all.</p>"
    )


def _title(output: str) -> str:
    if storage.is_s3(output):
        return output.rstrip("/").rsplit("/", 1)[-1]
    return storage.local_path(output).resolve().name or "Animations"


def _rows_json(rows: Sequence[_Row]) -> str:
    columns = {name: [_plain(_known(row.get(name))) for row in rows] for name in _SHOWN}
    columns["seed"] = [None if row.get("seed") is None else str(row["seed"]) for row in rows]
    columns["video"] = [_link(row.get("video_uri")) for row in rows]
    columns["poster"] = [_link(row.get("input_thumbnail_uri")) for row in rows]
    columns["thumbnail"] = [_link(row.get("thumbnail_uri")) for row in rows]
    columns["image"] = [_reference(row.get("image_uri")) for row in rows]
    columns["finished_at"] = [round(at.timestamp()) if (at := _time(row)) else None for row in rows]
    params = [_params(row) for row in rows]
    columns["motion_scale"] = [_plain(knobs.get("motion_scale")) for knobs in params]
    columns["motion_name"] = [_motion_name(knobs.get("motion_scale")) for knobs in params]
    names = dict.fromkeys(name for knobs in params for name in knobs if name not in _ELSEWHERE)
    extra = dict.fromkeys(name for row in rows[:1] for name in row if name not in _KNOWN)
    page = {
        "count": len(rows),
        "columns": {name: _packed(values) for name, values in columns.items()},
        "knobs": {name: _packed([_plain(knobs.get(name)) for knobs in params]) for name in names},
        "extra": {name: _packed([_plain(row.get(name)) for row in rows]) for name in extra},
        "hints": _hints({str(row.get("error_code")) for row in rows if row.get("error_code")}),
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


def _known(value: Any) -> Any:
    """The value, or None where it is NaN or infinite."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _link(uri: str | None) -> str | None:
    """The relative link to a file of the output: its last three names, which every output has alike.

    So the page also fits an output that was moved, or that is named differently now than when it was written.
    """
    if not uri:
        return None
    path = unquote(uri[7:]) if uri.startswith("file://") else uri
    parts = path.replace("\\", "/").split("/")[-3:]
    return quote("/".join(parts)) if parts[0] in ("videos", "thumbnails") else None


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


def _params(row: _Row) -> dict[str, Any]:
    try:
        value = json.loads(row.get("params") or "{}")
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _motion_name(scale: object) -> str | None:
    return MOTION_NAMES[scale] if isinstance(scale, int) and 0 <= scale < len(MOTION_NAMES) else None


def _hints(codes: Iterable[str]) -> dict[str, str]:
    """The meaning of each error code: the first sentence of its class."""
    kinds = row_errors()
    meanings = {code: kinds[code].__doc__ or "" for code in sorted(codes) if code in kinds}
    return {code: text.split(". ")[0].removesuffix(".") + "." for code, text in meanings.items()}


def _time(row: _Row) -> datetime | None:
    at = row.get("finished_at")
    return at if isinstance(at, datetime) else None


def _sum(rows: Iterable[_Row], name: str) -> float:
    return math.fsum(_known(row.get(name)) or 0.0 for row in rows)


def _busy_s(rows: Sequence[_Row]) -> float:
    """Seconds in which runs were at work, pauses between runs left out: each from its first row's start to its last."""
    spans: dict[str, tuple[float, float]] = {}
    for row in rows:
        if at := _time(row):
            end = at.timestamp()
            start = end - _sum([row], "fetch_s") - _sum([row], "animate_s") - _sum([row], "publish_s")
            run = str(row.get("run_id"))
            first, last = spans.get(run, (start, end))
            spans[run] = (min(first, start), max(last, end))
    return math.fsum(last - first for first, last in spans.values())


def _with_small_units(text: str) -> str:
    return re.sub(r"[A-Za-z]+", r"<small>\g<0></small>", text)


def _summary(rows: Sequence[_Row]) -> str:
    done = [row for row in rows if row.get("status") == SUCCEEDED]
    failed = [row for row in rows if row.get("status") != SUCCEEDED]
    tiles = [("Succeeded", f"{len(done):,} <small>of {len(rows):,}</small>")]
    if failed:
        tiles.append(("Failed", f"{len(failed):,}"))
    if done:
        tiles.append(("Video", _with_small_units(duration(_sum(done, "duration_s")))))
        if size_bytes := _sum(done, "size_bytes"):
            tiles.append(("On disk", _with_small_units(size(size_bytes))))
        tiles.append(("Engine time", _with_small_units(duration(_sum(rows, "gpu_s")))))
        if (busy_s := _busy_s(rows)) > 0:
            tiles.append(("Videos/min", f"{60 * len(done) / busy_s:,.1f}"))
    stats = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in tiles)
    share = "".join(
        f'<i style="flex:{len(part)} 0 {4 if part is failed else 0}px"></i>' for part in (done, failed) if part
    )
    if not done:
        share = share.replace("<i ", "<i></i><i ", 1)
    bar = f'<div class="share" aria-hidden="true">{share}</div>' if rows else ""
    return f'<p class="sub">{_subtitle(rows)}</p>\n<dl class="stats num">{stats}</dl>\n{bar}{_failures(failed)}'


def _subtitle(rows: Sequence[_Row]) -> str:
    models = dict.fromkeys(str(row["model"]) for row in rows if row.get("model"))
    times = [at for row in rows if (at := _time(row))]
    made = f"Made with {html.escape(', '.join(models))}" if models else "Nothing here yet"
    return f"{made}, {max(times):%-d %B %Y}" if times else made


def _failures(failed: Sequence[_Row]) -> str:
    if not failed:
        return ""
    counts = Counter(str(row.get("error_code") or "failed") for row in failed)
    again = {str(row.get("error_code") or "failed") for row in failed if row.get("retryable")}
    hints = _hints(counts)
    lines = "".join(
        f"<tr><td><code>{html.escape(code)}</code></td><td>{number:,}</td><td>{html.escape(hints.get(code, ''))}</td>"
        f"<td>{'May pass when tried again:' if code in again else 'Mend the input, then:'} "
        f"<code>--retry {html.escape(code)}</code></td></tr>"
        for code, number in counts.most_common()
    )
    return (
        f'<details class="failures"><summary>{len(failed):,} {"row" if len(failed) == 1 else "rows"} failed: '
        f"reasons and what to do</summary>"
        '<table class="codes num"><thead><tr><th>Code</th><th>Rows</th><th>Meaning</th><th>What to do</th></tr></thead>'
        f"<tbody>{lines}</tbody></table></details>"
    )


def _footer(rows: Sequence[_Row]) -> str:
    return (
        f'{len(rows):,} {"row" if len(rows) == 1 else "rows"} of <a href="results.parquet">results.parquet</a>, '
        "which holds every value shown here. Each video carries its own id, prompt, seed and settings inside."
    )
