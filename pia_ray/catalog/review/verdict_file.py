"""`read_review`, the lines of a review.csv, as the gallery writes it or a person by hand."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from pia_ray.errors import ConfigError, ManifestUnavailable, StorageError
from pia_ray.result_row import APPROVED, REJECTED
from pia_ray.storage import sources

REQUIRED: Final = ("id", "video_index", "verdict")
OPTIONAL: Final = ("note", "work_key", "take")
MAX_BYTES: Final = 256 * 2**20

_KEY: Final = re.compile(r"[0-9a-f]{64}")
_COUNT: Final = re.compile(r"\d{1,9}")


@dataclass(frozen=True)
class Verdict:
    """One line of a review: a person's verdict on a video."""

    line: int
    """Number of its first line in the file, from 1."""
    id: str
    video_index: int
    verdict: str
    """`approved` or `rejected`."""
    note: str = ""
    work_key: str | None = None
    take: int | None = None
    """The take that was seen; None for the one that is there when the review is applied."""

    @property
    def video(self) -> str:
        """The video in words, for messages."""
        return self.id + (f" (video {self.video_index})" if self.video_index else "")


def read_review(uri: str) -> tuple[Verdict, ...]:
    """The verdicts of a review, in order; lines without one are left out.

    Raises:
        ConfigError: the file cannot be read, or a line is wrong; names line and field.
        ManifestUnavailable: its store stayed away.
    """
    try:
        content = sources.read_bytes(uri, max_bytes=MAX_BYTES)
    except StorageError as error:
        kind = ManifestUnavailable if error.retryable else ConfigError
        raise kind(f"review: {uri} cannot be read: {error.message}") from None
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"review: {uri} is not UTF-8 in line {line}: save it as CSV in UTF-8") from None
    return parse_review(text, name=uri)


def parse_review(text: str, *, name: str) -> tuple[Verdict, ...]:
    """As `read_review`, of the text of the file.

    Raises:
        ConfigError: a line is wrong.
    """
    try:
        found = list(_lines(text, name))
    except csv.Error as error:
        raise ConfigError(f"review: {name} is not a valid CSV file: {error}") from None
    first: dict[tuple[object, ...], Verdict] = {}
    for verdict in found:
        known = first.setdefault((verdict.id, verdict.video_index, verdict.work_key, verdict.take), verdict)
        if known is not verdict:
            what = "the same" if known.verdict == verdict.verdict else "another"
            raise ConfigError(
                f"review: {name} line {verdict.line}, verdict: {verdict.video} has {what} verdict in line {known.line} "
                "already; keep one of the two lines"
            )
    return tuple(found)


def _lines(text: str, name: str) -> Iterator[Verdict]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=_delimiter(text), strict=True)
    header = [cell.strip().lower() for cell in next(reader, [])]
    missing = [column for column in REQUIRED if column not in header]
    if missing:
        raise ConfigError(
            f"review: {name} has no column {', '.join(missing)} in line 1; it needs {', '.join(REQUIRED)}, and may "
            f"have {', '.join(OPTIONAL)}"
        )
    twins = [column for column in (*REQUIRED, *OPTIONAL) if header.count(column) > 1]
    if twins:
        raise ConfigError(f"review: {name} has the column {twins[0]} twice in line 1; keep one")
    begin = reader.line_num + 1
    for cells in reader:
        line, begin = begin, reader.line_num + 1
        values = dict(zip(header, cells, strict=False))
        if any(cell.strip() for cell in cells) and (verdict := _verdict(values, line, name)) is not None:
            yield verdict


def _delimiter(text: str) -> str:
    """The character between cells: of comma, semicolon and tab the one that the header has."""
    header = text.partition("\n")[0]
    return max(",;\t", key=header.count)


def _verdict(values: Mapping[str, str], line: int, name: str) -> Verdict | None:
    """The verdict of a line; None where its cell is empty, because the video has not been reviewed.

    Raises:
        ConfigError: a cell is wrong.
    """

    def wrong(field: str, need: str) -> ConfigError:
        return ConfigError(f"review: {name} line {line}, {field}: must be {need} (got {values.get(field, '')!r})")

    word = values.get("verdict", "").strip().lower()
    if not word:
        return None
    if word not in (APPROVED, REJECTED):
        raise wrong("verdict", f"{APPROVED} or {REJECTED}, or empty for a video without a verdict")
    if not values["id"]:
        raise wrong("id", "the id of a row")
    index, take = values.get("video_index", "").strip(), values.get("take", "").strip()
    if not _COUNT.fullmatch(index):
        raise wrong("video_index", "a whole number from 0")
    if take and not _COUNT.fullmatch(take):
        raise wrong("take", "a whole number from 0, or empty")
    key = values.get("work_key", "").strip().lower()
    if key and not _KEY.fullmatch(key):
        raise wrong("work_key", "the 64 hex digits of the results, or empty")
    return Verdict(
        line=line,
        id=values["id"],
        video_index=int(index),
        verdict=word,
        note=values.get("note", "").strip(),
        work_key=key or None,
        take=int(take) if take else None,
    )
