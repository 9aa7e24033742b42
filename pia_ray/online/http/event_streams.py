"""Server-sent events: their media type, their text, and the wait for a caller that hangs up."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from starlette.types import Receive, Send

EVENT_STREAM: Final = "text/event-stream"

KEEP_ALIVE_S: Final = 15.0
"""Seconds without an event after which a stream sends a comment, because proxies close silent connections."""

HEADERS: Final = {"x-accel-buffering": "no"}
"""Headers of a stream, by which nginx sends each event at once."""


def event_text(name: str, value: Mapping[str, Any]) -> str:
    """An event as it is sent."""
    return f"event: {name}\ndata: {json.dumps(value, separators=(',', ':'))}\n\n"


async def send_text(send: Send, text: str) -> None:
    """Sends a part of the stream."""
    await send({"type": "http.response.body", "body": text.encode(), "more_body": True})


async def disconnected(receive: Receive) -> None:
    """Ends when the caller has hung up."""
    while (await receive())["type"] != "http.disconnect":
        pass
