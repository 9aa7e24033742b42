"""The results of an output as one page: original and video side by side, prompt, settings, failures with reasons.

The page is a single file with relative links: it works from a folder, moved or not, and from S3, and asks for nothing
else. In it a person reviews the videos, too. Makes no thumbnails and opens no video.
"""

from __future__ import annotations

import base64
import hashlib
import html
import re
from collections.abc import Sequence
from importlib.resources import files
from typing import Final

from pia_ray import ledger, storage
from pia_ray.catalog.gallery.rows import Row, rows_json, shown_rows
from pia_ray.catalog.gallery.summary import left_out, summary

NAME: Final = "index.html"

_SCRIPTS: Final = ("data", "verdicts", "cards", "list", "sheet", "review", "start")
"""The files of the script, in order; they share one scope."""


def write_gallery(output: str, *, title: str | None = None) -> str:
    """The URI of `index.html`, which is written next to the results.

    Raises:
        OutputError: there are no results yet.
        StorageError: the page could not be written.
    """
    with ledger.open_results(output) as file:
        rows = list(shown_rows(file))
        num_left_out = file.metadata.num_rows - len(rows)
    uri = storage.join(output, NAME)
    title = title or _title(output)
    page = gallery_html(rows, title=title, num_left_out=num_left_out, output_id=_output_id(output))
    storage.write_bytes(uri, page.encode("utf-8", "replace"), content_type="text/html; charset=utf-8")
    return uri


def gallery_html(rows: Sequence[Row], *, title: str, num_left_out: int = 0, output_id: str = "") -> str:
    """The page for rows of the results table, in their order. All text in them is shown as text, never as markup.

    `num_left_out` rows are not among them; the page says so. Verdicts stay in the browser under `output_id`.
    """
    folder = files("pia_ray.catalog.gallery").joinpath("page_files")
    script = "".join(folder.joinpath(f"{name}.js").read_text("utf-8") for name in _SCRIPTS)
    script = f'"use strict";\n(() => {{\n{script}}})();\n'
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    parts = {
        "TITLE": html.escape(title),
        "SCRIPT_HASH": f"sha256-{digest}",
        "STYLE": folder.joinpath("gallery.css").read_text("utf-8"),
        "SUMMARY": left_out(len(rows), num_left_out) + summary(rows),
        "FOOTER": _footer(rows),
        "ROWS": rows_json(rows, output_id=output_id),
        "SCRIPT": script,
    }
    # One pass, so that marks inside of what is filled in are left alone.
    return re.sub(r"@@([A-Z_]+)@@", lambda match: parts[match[1]], folder.joinpath("gallery.html").read_text("utf-8"))


def _title(output: str) -> str:
    if storage.is_s3(output):
        return output.rstrip("/").rsplit("/", 1)[-1]
    return storage.local_path(output).resolve().name or "Animations"


def _output_id(output: str) -> str:
    """The name under which a browser keeps the verdicts on an output, which does not tell where it is."""
    uri = output.rstrip("/") if storage.is_s3(output) else str(storage.local_path(output).resolve())
    return hashlib.sha256(uri.encode("utf-8", "surrogateescape")).hexdigest()[:16]


def _footer(rows: Sequence[Row]) -> str:
    return (
        f'{len(rows):,} {"row" if len(rows) == 1 else "rows"} of <a href="results.parquet">results.parquet</a>, '
        "which holds every value shown here. Each video carries its own id, prompt, seed and settings inside."
    )
