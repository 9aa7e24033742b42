"""GET /v1/videos/{id}/events: the progress of a video job as server-sent events, until it has ended.

Every event holds the whole video object, so that a caller whose connection broke connects again and has missed nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AbstractContextManager, ExitStack, aclosing
from typing import Final

from fastapi import APIRouter, Request, Response
from starlette.types import Receive, Scope, Send

from pia_ray.errors import PiaRayError
from pia_ray.online.http import error_responses, event_streams
from pia_ray.online.http.event_streams import EVENT_STREAM, KEEP_ALIVE_S
from pia_ray.online.http.limits import OpenRequests
from pia_ray.online.http.middleware import Owner, caller
from pia_ray.online.routes.videos import VideoObject, video_object
from pia_ray.online.video_jobs import JobStore
from pia_ray.online.video_jobs.dispatcher import Dispatcher

STREAMS_PER_CALLER: Final = 16
"""Streams of a caller at one ingress. Each reads its job's document every second or less often."""

STREAM_S: Final = 900.0
"""Seconds after which a stream ends also where its job has not, so that an ingress that is stopped is not held up."""

_MOST_PAUSE_S: Final = 5.0

_Read = Callable[[], Awaitable[tuple[VideoObject, float]]]
"""Reads the video object, and the seconds until it is to be read again."""


def video_event_routes(jobs: JobStore, dispatcher: Dispatcher, *, prefix: str = "/v1") -> APIRouter:
    """The route of the events of a video."""
    routes = APIRouter(prefix=f"{prefix}/videos", tags=["videos"])
    streams = OpenRequests(STREAMS_PER_CALLER)

    @routes.get(
        "/{video_id}/events",
        operation_id="stream_video_events",
        summary="The progress of a video, as server-sent events",
        response_class=Response,
        responses={200: _RESPONSE, **error_responses.responses(404)},
    )
    async def events(request: Request, owner: Owner, video_id: str) -> Response:
        """Sends the video object at once and after each change, and ends with the event completed or failed."""

        async def read() -> tuple[VideoObject, float]:
            job = await asyncio.to_thread(jobs.get, owner, video_id)
            outlook = await dispatcher.outlook(job)
            found = video_object(job, outlook, now=await asyncio.to_thread(jobs.now))
            return found, min(_MOST_PAUSE_S, outlook.poll_after_ms / 1000)

        first = await read()  # an error before the first event becomes an HTTP status
        with ExitStack() as held:
            held.enter_context(streams.hold(caller(request)))
            return _VideoEvents(read, first, held.pop_all())

    return routes


class _VideoEvents(Response):
    """The stream. `held` is left when it has ended."""

    media_type = EVENT_STREAM

    def __init__(self, read: _Read, first: tuple[VideoObject, float], held: AbstractContextManager[object]) -> None:
        super().__init__(headers=event_streams.HEADERS)
        del self.headers["content-length"]
        self._read = read
        self._first = first
        self._held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._held:
            gone = asyncio.ensure_future(event_streams.disconnected(receive))
            try:
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                async with aclosing(self._texts(gone)) as texts:
                    async for text in texts:
                        await event_streams.send_text(send, text)
                await send({"type": "http.response.body", "body": b"", "more_body": False})
            finally:
                gone.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await gone

    async def _texts(self, gone: asyncio.Future[None]) -> AsyncGenerator[str, None]:
        loop = asyncio.get_running_loop()
        found, pause_s = self._first
        began, sent_at, sent = loop.time(), loop.time(), ""
        try:
            while not gone.done():
                name = found.status if found.status in ("completed", "failed") else "progress"
                text = event_streams.event_text(name, found.model_dump(mode="json"))
                if _without_estimates(found) != sent:
                    sent, sent_at = _without_estimates(found), loop.time()
                    yield text
                elif loop.time() - sent_at >= KEEP_ALIVE_S:
                    sent_at = loop.time()
                    yield ": no change\n\n"
                if name != "progress" or loop.time() - began >= STREAM_S:
                    return
                await asyncio.wait((gone,), timeout=pause_s)
                found, pause_s = await self._read()
        except PiaRayError as error:  # it was deleted, or the store does not answer
            yield event_streams.event_text("error", error_responses.body_of(error))


def _without_estimates(found: VideoObject) -> str:
    """The video object without the estimate of its completion, which is a new one at each read."""
    return found.model_dump_json(exclude={"estimated_completion_at"})


_RESPONSE: Final = {
    "description": "Events: `progress` at once and after each change, and last `completed` or `failed`, each with the "
    f"video object; `error` where it can no longer be read. A stream ends after {STREAM_S / 60:.0f} minutes also where "
    "the job goes on: connect again.",
    "content": {
        EVENT_STREAM: {
            "schema": {"type": "string"},
            "example": 'event: progress\ndata: {"id":"video_...","status":"in_progress","progress":40}\n\n'
            'event: completed\ndata: {"id":"video_...","status":"completed","progress":100}\n\n',
        }
    },
}
