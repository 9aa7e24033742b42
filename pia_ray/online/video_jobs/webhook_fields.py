"""The fields `webhook_url` and `webhook_events` of a request for a video."""

from __future__ import annotations

import re
from typing import Any, Final, get_args

from pia_ray.config.knobs import suggest
from pia_ray.errors import BadParameter, FetchError
from pia_ray.online.public_errors import shortened
from pia_ray.online.video_jobs.document import END_EVENTS, WebhookEvent
from pia_ray.storage.https import check_url

EVENTS: Final[tuple[WebhookEvent, ...]] = get_args(WebhookEvent)

_EVENT: Final = f"({'|'.join(map(re.escape, EVENTS))})"

SHAPES: Final[dict[str, Any]] = {
    "webhook_url": {
        "type": "string",
        "format": "uri",
        "maxLength": 2000,
        "description": "An https:// URL that receives an event when the video has completed or failed, signed by the "
        "Standard Webhooks scheme.",
    },
    "webhook_events": {
        "anyOf": [
            {"type": "array", "items": {"type": "string", "enum": list(EVENTS)}, "minItems": 1},
            {
                "type": "string",
                "pattern": f"^{_EVENT}( *, *{_EVENT})*$",
                "description": "The same, separated by commas.",
            },
        ],
        "default": list(END_EVENTS),
        "example": list(EVENTS),
        "description": "The events that the webhook_url receives. `video.in_progress` is sent when the video begins, "
        "and then with its progress, every 5 s at most. It is sent once, may be lost, and never follows the event "
        "of the end.",
    },
}
"""The fields in an OpenAPI document."""


def webhook_of(given: dict[str, object], *, is_signed: bool) -> tuple[str | None, tuple[WebhookEvent, ...]]:
    """The URL of a request's webhook, if it has one, and the events for it; the fields are removed from `given`.

    `is_signed` says whether the endpoint has a secret to sign with.

    Raises:
        BadParameter: a value is not valid.
    """
    url, events = given.pop("webhook_url", None), given.pop("webhook_events", None)
    if url is None and events is not None:
        raise BadParameter("webhook_events are sent to a webhook_url: give one too", "webhook_events")
    return None if url is None else _url(url, is_signed=is_signed), END_EVENTS if events is None else _events(events)


def _url(value: object, *, is_signed: bool) -> str:
    if not is_signed:
        raise BadParameter("webhook_url: this endpoint has no secret to sign webhooks with", "webhook_url")
    if not isinstance(value, str) or len(value) > 2000:
        raise BadParameter("webhook_url must be an https:// URL of at most 2000 characters", "webhook_url")
    try:
        check_url(value)
    except FetchError as error:
        raise BadParameter(f"webhook_url: {error.message}", "webhook_url") from None
    return value


def _events(value: object) -> tuple[WebhookEvent, ...]:
    names = [name.strip() for name in value.split(",")] if isinstance(value, str) else value
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise BadParameter(f"webhook_events must be a list of {', '.join(EVENTS)}", "webhook_events")
    for name in names:
        if name not in EVENTS:
            near = suggest(shortened(name), EVENTS)
            known = "" if near else f" Events are {', '.join(EVENTS)}."
            raise BadParameter(f'webhook_events: there is no event "{shortened(name)}".{near}{known}', "webhook_events")
    return tuple(event for event in EVENTS if event in names)
