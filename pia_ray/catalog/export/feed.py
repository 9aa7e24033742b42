"""The feed of an export: one line per video with its URLs, its facts, and the catalogue's own columns."""

from __future__ import annotations

import base64
import csv
import json
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from datetime import date, datetime, time
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, Self
from urllib.parse import quote, urlsplit

from pia_ray import storage
from pia_ray.errors import ConfigError

FeedFormat = Literal["csv", "jsonl", "both"]

FACTS: Final = ("id", "video_index", "width", "height", "fps", "duration_s")
"""Columns of the results that every line has."""

FILES: Final = ("video_file", "video_url", "poster_url", "thumbnail_url")

_CONTENT_TYPES: Final = {"csv": "text/csv; charset=utf-8", "jsonl": "application/x-ndjson"}


class Feed:
    """The lines of a feed, in files of a local folder until they are uploaded. A context manager."""

    def __init__(self, folder: Path, *, own: Sequence[str], form: FeedFormat) -> None:
        self._own = own_names(own)
        self._forms = ("csv", "jsonl") if form == "both" else (form,)
        self._paths = {each: folder / f"feed.{each}" for each in self._forms}
        self._open = ExitStack()

    def __enter__(self) -> Self:
        self._files = {
            form: self._open.enter_context(path.open("w", newline="", encoding="utf-8", errors="replace"))
            for form, path in self._paths.items()
        }
        if "csv" in self._files:
            self._csv = csv.writer(self._files["csv"])
            self._csv.writerow([*FACTS[:2], *FILES, *FACTS[2:], *self._own.values()])
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._open.close()

    def add(self, row: Mapping[str, Any], files: Mapping[str, str | None]) -> None:
        """Appends the line of one video; `files` are its FILES."""
        facts = {name: row.get(name) for name in FACTS}
        line = {**{name: facts[name] for name in FACTS[:2]}, **{name: files.get(name) for name in FILES}, **facts}
        line |= {new: _known(row.get(name)) for name, new in self._own.items()}
        if "csv" in self._files:
            self._csv.writerow([_csv_cell(value) for value in line.values()])
        if "jsonl" in self._files:
            self._files["jsonl"].write(json.dumps(line, ensure_ascii=False, default=_plain) + "\n")

    def upload(self, target: str) -> dict[str, int]:
        """The names of the closed files, with their bytes, which are written to the target, each in one step."""
        for form, path in self._paths.items():
            storage.upload_file(path, storage.join(target, path.name), content_type=_CONTENT_TYPES[form])
        return {path.name: path.stat().st_size for path in self._paths.values()}


def own_names(names: Sequence[str]) -> dict[str, str]:
    """The catalogue's own columns with their names in the feed, which are others where the feed has that column."""
    renamed = {}
    for name in names:
        new = name
        while new in (*FACTS, *FILES) or (new != name and new in names):
            new = f"manifest_{new}"
        renamed[name] = new
    return renamed


def url_base(base_url: str | None, target: str) -> str:
    """The beginning of the URLs of exported files; empty for links relative to the feed.

    Raises:
        ConfigError: the base is not the URL of a folder.
    """
    if base_url is None:
        return f"{target}/" if storage.is_s3(target) else ""
    try:
        parts = urlsplit(base_url)
    except ValueError:
        parts = urlsplit("")
    if parts.scheme not in ("http", "https") or not parts.netloc or parts.query or parts.fragment:
        raise ConfigError(f'--base-url "{base_url}" is not the URL of a folder, such as https://cdn.example/videos/')
    return f"{base_url.rstrip('/')}/"


def url_of(path: str, base: str) -> str:
    """The URL of an exported file; an s3:// URI holds the path as it is."""
    return f"{base}{path}" if base.startswith("s3://") else f"{base}{quote(path)}"


def _known(value: Any) -> Any:
    """The value, or None where it is NaN or infinite, which JSON cannot hold."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _csv_cell(value: Any) -> Any:
    if isinstance(value, dict | list):
        return json.dumps(value, ensure_ascii=False, default=_plain)
    if value is None or isinstance(value, str | int | float):
        return value
    return _plain(value)


def _plain(value: Any) -> str:
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    return base64.b64encode(value).decode("ascii") if isinstance(value, bytes) else str(value)
