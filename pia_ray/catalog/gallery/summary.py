"""The head of a gallery: counts, times, and failures by reason."""

from __future__ import annotations

import html
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence

from pia_ray.catalog.gallery.rows import Row, hints, known, time_of
from pia_ray.formatting import duration, size
from pia_ray.result_row import SUCCEEDED


def left_out(num_rows: int, num_left_out: int) -> str:
    """A sentence on the rows that the page does not show, as HTML; empty where it shows all."""
    if not num_left_out:
        return ""
    return (
        f"<p>This page shows {num_rows:,} of {num_rows + num_left_out:,} rows, and its numbers are of these: "
        "results.parquet has all.</p>"
    )


def _sum(rows: Iterable[Row], name: str) -> float:
    return math.fsum(known(row.get(name)) or 0.0 for row in rows)


def _busy_s(rows: Sequence[Row]) -> float:
    """Seconds in which runs were at work, pauses between runs left out: each from its first row's start to its last."""
    spans: dict[str, tuple[float, float]] = {}
    for row in rows:
        if at := time_of(row):
            end = at.timestamp()
            start = end - _sum([row], "fetch_s") - _sum([row], "animate_s") - _sum([row], "publish_s")
            run = str(row.get("run_id"))
            first, last = spans.get(run, (start, end))
            spans[run] = (min(first, start), max(last, end))
    return math.fsum(last - first for first, last in spans.values())


def _with_small_units(text: str) -> str:
    return re.sub(r"[A-Za-z]+", r"<small>\g<0></small>", text)


def summary(rows: Sequence[Row]) -> str:
    """The counts of the rows as HTML."""
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


def _subtitle(rows: Sequence[Row]) -> str:
    models = dict.fromkeys(str(row["model"]) for row in rows if row.get("model"))
    times = [at for row in rows if (at := time_of(row))]
    made = f"Made with {html.escape(', '.join(models))}" if models else "Nothing here yet"
    return f"{made}, {max(times):%-d %B %Y}" if times else made


def _failures(failed: Sequence[Row]) -> str:
    if not failed:
        return ""
    counts = Counter(str(row.get("error_code") or "failed") for row in failed)
    again = {str(row.get("error_code") or "failed") for row in failed if row.get("retryable")}
    meanings = hints(counts)
    lines = "".join(
        f"<tr><td><code>{html.escape(code)}</code></td><td>{number:,}</td>"
        f"<td>{html.escape(meanings.get(code, ''))}</td>"
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
