"""The input file of a batch: a JSON object per line, each a request for a video. Pure functions."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from pia_ray.online.batches.store import BatchLineError

ENDPOINT: Final = "/v1/videos"
MAX_LINES: Final = 50_000


@dataclass(frozen=True)
class BatchLine:
    """A request of an input file."""

    index: int
    """Among the lines that hold a request, from 0."""
    custom_id: str
    body: Mapping[str, Any]


def read_lines(content: bytes) -> tuple[list[BatchLine], list[BatchLineError]]:
    """The requests of an input file, and its errors: a batch with an error does not begin."""
    lines: list[BatchLine] = []
    errors: list[BatchLineError] = []
    custom_ids: set[str] = set()
    for number, text in enumerate(content.split(b"\n"), start=1):
        if not text.strip():
            continue
        if len(lines) + len(errors) >= MAX_LINES:
            errors.append(BatchLineError(code="too_many_lines", message=f"a batch has at most {MAX_LINES:,} lines"))
            break
        found = _read_line(text, number=number, index=len(lines), custom_ids=custom_ids)
        if isinstance(found, BatchLineError):
            errors.append(found)
        else:
            lines.append(found)
    if not lines and not errors:
        errors.append(BatchLineError(code="empty_file", message="the input file has no lines"))
    return lines, errors


def _read_line(text: bytes, *, number: int, index: int, custom_ids: set[str]) -> BatchLine | BatchLineError:
    def error(code: str, message: str, param: str | None = None) -> BatchLineError:
        return BatchLineError(code=code, message=message, line=number, param=param)

    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        return error("invalid_json_line", "this line is not JSON")
    if not isinstance(record, dict):
        return error("invalid_json_line", "this line is not a JSON object")
    custom_id, body = record.get("custom_id"), record.get("body")
    if not isinstance(custom_id, str) or not 1 <= len(custom_id) <= 512:
        return error("missing_required_parameter", "custom_id must be text of 1 to 512 characters", "custom_id")
    if custom_id in custom_ids:
        return error("duplicate_custom_id", "custom_id must be another for each line", "custom_id")
    custom_ids.add(custom_id)
    if record.get("method") != "POST":
        return error("invalid_method", "method must be POST", "method")
    if record.get("url") != ENDPOINT:
        return error("invalid_url", f"url must be {ENDPOINT}", "url")
    if not isinstance(body, dict):
        return error("missing_required_parameter", "body must be a JSON object", "body")
    return BatchLine(index=index, custom_id=custom_id, body=body)
