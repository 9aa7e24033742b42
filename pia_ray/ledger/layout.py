"""The URIs of everything in an output: videos, thumbnails and the ledger's own files.

Pure functions. Of a row's id only its slug enters a path; the work key alone keeps names apart.
"""

from __future__ import annotations

import re
import unicodedata
import uuid
from typing import Final
from urllib.parse import unquote

from pia_ray import storage

SLUG_LENGTH: Final = 64
KEY_DIGITS: Final = 16
"""Hex digits of the work key in file names."""


def slug(row_id: str) -> str:
    """A file name's worth of the id: ASCII letters, digits, `-` and `_`, at most 64, never empty."""
    ascii_id = unicodedata.normalize("NFKD", row_id).encode("ascii", "ignore").decode("ascii")
    return re.sub(r"[^A-Za-z0-9_]+", "-", ascii_id)[:SLUG_LENGTH].strip("-") or "row"


def video_uri(output: str, row_id: str, *, work_key: str, ext: str) -> str:
    """The URI of the row's video."""
    return storage.join(output, "videos", work_key[:2], f"{_stem(row_id, work_key)}.{ext.removeprefix('.')}")


def thumbnail_uris(output: str, row_id: str, *, work_key: str) -> tuple[str, str]:
    """The URIs of the small pictures of the row's input and of its video."""
    folder = storage.join(output, "thumbnails", work_key[:2])
    stem = _stem(row_id, work_key)
    return storage.join(folder, f"{stem}-input.webp"), storage.join(folder, f"{stem}-video.webp")


def poster_uri(output: str, row_id: str, *, work_key: str, kind: str) -> str | None:
    """The URI of the row's poster, a file of that kind (jpg, webp); None for the kind none."""
    if kind == "none":
        return None
    return storage.join(output, "thumbnails", work_key[:2], f"{_stem(row_id, work_key)}-poster.{kind}")


def path_in_output(uri: str) -> str:
    """The path of a video or thumbnail within its output: the last three names, which every output has alike.

    So it also fits an output that was moved, or that is named differently now than when the URI was written.
    """
    path = unquote(uri[7:]) if uri.startswith("file://") else uri
    return "/".join(path.replace("\\", "/").split("/")[-3:])


def key_prefix(uri: str) -> int | None:
    """The first 64 bits of the work key in the URI of a video or picture, or None for a name that is not ours."""
    match = re.search(r"-([0-9a-f]{16})(?:-input|-video|-poster)?\.[a-z0-9]+$", uri)
    return int(match[1], 16) if match else None


def results_uri(output: str) -> str:
    """The results table."""
    return storage.join(output, "results.parquet")


def summary_uri(output: str) -> str:
    """The summary of the latest run for programs."""
    return storage.join(output, "summary.json")


def parts_uri(output: str) -> str:
    """Folder of the ledger's parts."""
    return storage.join(output, "_ledger", "parts")


def new_part_uri(output: str) -> str:
    """A name for a part that no other writer picks."""
    return storage.join(parts_uri(output), f"{uuid.uuid4().hex}.parquet")


def quarantine_uri(output: str, part_uri: str) -> str:
    """The URI to which a damaged part is moved."""
    return storage.join(output, "_ledger", "quarantine", part_uri.rpartition("/")[2])


def attempts_uri(output: str) -> str:
    """Folder of the attempt records."""
    return storage.join(output, "_ledger", "attempts")


def workers_uri(output: str) -> str:
    """Folder of the records of workers at work."""
    return storage.join(output, "_ledger", "workers")


def runs_uri(output: str) -> str:
    """Folder of the runs."""
    return storage.join(output, "_ledger", "runs")


def run_uri(output: str, run_id: str) -> str:
    """The record of one run."""
    return storage.join(runs_uri(output), run_id, "run.json")


def items_uri(output: str, run_id: str) -> str:
    """Folder of the work items that a run has planned, in manifest order."""
    return storage.join(runs_uri(output), run_id, "items")


def lease_uri(output: str, *, partition: tuple[int, int] = (1, 1)) -> str:
    """The lease of the run at work, or of the one at that partition."""
    number, of = partition
    return storage.join(output, "_ledger", "lease.json" if of == 1 else f"lease-{number}-of-{of}.json")


def _stem(row_id: str, work_key: str) -> str:
    return f"{slug(row_id)}-{work_key[:KEY_DIGITS]}"
