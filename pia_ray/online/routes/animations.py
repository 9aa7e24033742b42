"""POST /v1/animations: a picture becomes a video in one call, or progress as server-sent events."""

from __future__ import annotations

import asyncio
import base64
import json
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from typing import Any, Final, Literal, cast
from urllib.parse import quote

from anyio import CancelScope
from fastapi import APIRouter, Request, Response
from pydantic import Field
from starlette.types import Receive, Scope, Send

from pia_ray.config.knob_types import VideoFormat
from pia_ray.config.serve import ServeConfig
from pia_ray.errors import Cancelled, NotAcceptable, PiaRayError, Timeout, UnexpectedError
from pia_ray.media.finish.posters import MIME as POSTER_MIME
from pia_ray.media.video import MIME
from pia_ray.online.http import error_responses, event_streams
from pia_ray.online.http.event_streams import EVENT_STREAM, KEEP_ALIVE_S
from pia_ray.online.http.metrics import Metrics
from pia_ray.online.http.middleware import Owner, caller
from pia_ray.online.http.wire_types import VideoDescription, wire_params
from pia_ray.online.rendering.renderer import Event, Queued, Rendered, Renderer, StepDone
from pia_ray.online.requests import openapi
from pia_ray.online.requests.aliases import size_text
from pia_ray.online.requests.request_reader import FormReader
from pia_ray.online.usage import Amounts, Usage

_GRACE: Final = 1.1
"""The call times out after this multiple of the engine's deadline, so that the engine's own error arrives first."""


def router(renderer: Renderer, forms: FormReader, config: ServeConfig, *, metrics: Metrics, usage: Usage) -> APIRouter:
    """The route of synchronous calls."""
    routes = APIRouter(tags=["animations"])

    @routes.post(
        "/v1/animations",
        operation_id="create_animation",
        summary="Animate a picture",
        response_class=Response,
        responses={200: openapi.ANIMATION_RESPONSE, **error_responses.responses(404, 406, 415, 502, 504, 507)},
        openapi_extra={"requestBody": openapi.request_body()},
    )
    async def create_animation(request: Request, owner: Owner) -> Response:
        """Answers with the video. `Accept` selects mp4, webm, webp or gif, or `text/event-stream` for progress."""
        accept = request.headers.get("accept")
        negotiate(accept, None)  # before the body is read
        form = await forms.parse(await forms.fields(request), owner=owner)
        stream, video_format = negotiate(accept, form.format)
        render_request = form.request(
            f"anim_{secrets.token_hex(16)}",
            deadline_s=config.sync_timeout_s,
            default_format=video_format,
            owner=caller(request),
        )
        events = _counted(
            renderer.render(render_request),
            form.model,
            metrics,
            count=lambda gpu_s: usage.add(owner, Amounts(gpu_s=gpu_s)),
        )
        connected_events = _while_connected(events, request.receive, timeout_s=_GRACE * config.sync_timeout_s)
        if stream:
            first = await _first(connected_events)
            return _EventStream(connected_events, first, render_request.id)
        async with aclosing(connected_events):
            async for event in connected_events:
                if isinstance(event, Rendered):
                    return _video(render_request.id, event)
        raise UnexpectedError("the renderer ended without a video")

    return routes


def negotiate(accept: str | None, given: VideoFormat | None) -> tuple[bool, VideoFormat]:
    """Whether to stream events, and the format of the video: the `given` one, or the most wanted accepted one.

    Raises:
        NotAcceptable: no available type is accepted.
    """
    quality = _qualities(accept or "*/*")
    formats: list[VideoFormat] = [given] if given else list(MIME)
    scored = [(_quality(quality, MIME[each]), each) for each in formats]
    best = max(scored, key=lambda pair: pair[0])  # the first of equals
    streamed = quality.get(EVENT_STREAM, 0.0)  # by its name only, because a wildcard means a video
    if streamed and streamed >= best[0]:
        return True, given or "mp4"
    if not best[0]:
        types = ", ".join(MIME[each] for each in formats)
        raise NotAcceptable(f"This call answers with {types} or {EVENT_STREAM}, none of which is accepted.")
    return False, best[1]


class AnimationObject(VideoDescription):
    """A finished animation, without its files."""

    id: str
    object: Literal["animation"] = "animation"
    model: str = Field(description="The same as `model_version`.")
    seed: str
    params: dict[str, Any]
    format: VideoFormat


def animation_object(request_id: str, rendered: Rendered) -> AnimationObject:
    """The finished animation as callers get it."""
    made = rendered.video
    return AnimationObject(
        **dict(made, params=wire_params(made.params, only_given=False)),
        id=request_id,
        model=made.model_version,
        seed=str(made.params.seed),
        format=rendered.format,
    )


def _qualities(accept: str) -> dict[str, float]:
    found: dict[str, float] = {}
    for part in accept.lower().split(",")[:50]:
        kind, *options = (piece.strip() for piece in part.split(";"))
        quality = 1.0
        for option in options:
            if option.startswith("q="):
                try:
                    quality = min(1.0, max(0.0, float(option[2:])))
                except ValueError:
                    quality = 0.0
        if kind:
            found[kind] = quality if quality == quality else 0.0  # "q=nan" parses
    return found


def _quality(qualities: dict[str, float], mime: str) -> float:
    for kind in (mime, f"{mime.partition('/')[0]}/*", "*/*"):  # the most exact one counts
        if kind in qualities:
            return qualities[kind]
    return 0.0


async def _counted(
    events: AsyncIterator[Event], model: str, metrics: Metrics, *, count: Callable[[float], None]
) -> AsyncGenerator[Event, None]:
    """The events, counted in the metrics. `count` gets the engine seconds at the end, whatever the end is."""
    gpu_s = 0.0
    async with aclosing(cast(AsyncGenerator[Event, None], events)):
        try:
            async for event in events:
                if isinstance(event, Rendered):
                    metrics.rendered(model, event)
                    gpu_s = event.video.total_gpu_s
                elif isinstance(event, StepDone):
                    gpu_s = event.gpu_s
                yield event
        except PiaRayError as error:
            metrics.failed(model, error)
            raise
        except (asyncio.CancelledError, GeneratorExit):
            metrics.failed(model, Cancelled())
            raise
        finally:
            count(gpu_s)


async def _while_connected(
    events: AsyncGenerator[Event, None], receive: Receive, *, timeout_s: float
) -> AsyncGenerator[Event | None, None]:
    """The events while the caller is connected; None after each `KEEP_ALIVE_S` without one.

    The end of this generator cancels the rendering.

    Raises:
        Cancelled: the caller has hung up.
        Timeout: it takes longer than `timeout_s`.
        RowError, JobError: the renderer's own errors.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout_s
    gone = asyncio.ensure_future(event_streams.disconnected(receive))
    upcoming: asyncio.Future[Event | None] | None = None
    try:
        while True:
            upcoming = upcoming or asyncio.ensure_future(_next(events))
            left = deadline - loop.time()
            either: set[asyncio.Future[Any]] = {gone, upcoming}
            patience = max(0.0, min(KEEP_ALIVE_S, left))
            await asyncio.wait(either, timeout=patience, return_when=asyncio.FIRST_COMPLETED)
            if upcoming.done():
                event, upcoming = upcoming.result(), None
                if event is None:
                    return
                yield event
            elif gone.done():
                raise Cancelled("The caller has hung up.")
            elif left <= 0:
                raise Timeout(f"The video was not finished within {timeout_s / _GRACE:g} seconds.")
            else:
                yield None
    finally:
        with CancelScope(shield=True):  # the engine must be free of the request, also where this task is cancelled
            tasks: set[asyncio.Future[Any]] = {gone} if upcoming is None else {gone, upcoming}
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            await events.aclose()


async def _next(events: AsyncGenerator[Event, None]) -> Event | None:
    return await anext(events, None)


async def _first(connected_events: AsyncGenerator[Event | None, None]) -> Event | None:
    """The first event: a refusal that comes before it becomes an HTTP status, not an event of the stream."""
    try:
        return await anext(connected_events)
    except BaseException:
        await connected_events.aclose()
        raise


def _video(request_id: str, rendered: Rendered) -> Response:
    made = animation_object(request_id, rendered)
    # Prompts are left out: ten thousand characters do not fit into a header.
    knobs = {name: value for name, value in made.params.items() if name not in ("prompt", "negative_prompt")}
    headers = {
        "content-disposition": f'inline; filename="{request_id}.{made.format}"',
        "etag": f'"{made.sha256}"',
        "x-animation-id": request_id,
        "x-animation-model": quote(made.model, safe=" /:@+,"),  # headers are ASCII
        "x-animation-seed": made.seed,
        "x-animation-params": json.dumps(knobs, separators=(",", ":")),
        "x-animation-frames": str(made.num_frames),
        "x-animation-size": size_text(made.width, made.height),
        "x-animation-gpu-seconds": f"{made.gpu_s:.3f}",
        "x-animation-motion": f"{made.motion:.4f}",
        "x-animation-judgement": json.dumps(rendered.video.judgement, separators=(",", ":")),
    }
    if rendered.video.takes is not None:  # the list itself might not fit into a header
        headers["x-animation-accepted"] = str(rendered.video.accepted).lower()
        headers["x-animation-take"] = str(rendered.video.take)
        headers["x-animation-takes"] = str(len(rendered.video.takes))
    return Response(rendered.content, media_type=MIME[made.format], headers=headers)


class _EventStream(Response):
    """A stream of events. It cancels the rendering when the caller has gone."""

    media_type = EVENT_STREAM

    def __init__(self, events: AsyncGenerator[Event | None, None], first: Event | None, request_id: str) -> None:
        super().__init__(headers={"x-animation-id": request_id, **event_streams.HEADERS})
        del self.headers["content-length"]
        self._events = events
        self._first = first
        self._request_id = request_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._events):
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            try:
                await self._send(send, self._first)
                async for event in self._events:
                    await self._send(send, event)
            except PiaRayError as error:
                await event_streams.send_text(send, event_streams.event_text("error", error_responses.body_of(error)))
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send(self, send: Send, event: Event | None) -> None:
        match event:
            case None:
                await event_streams.send_text(send, ": still rendering\n\n")
            case Queued(position):
                await event_streams.send_text(send, event_streams.event_text("queued", {"position": position}))
            case StepDone(done, total):
                await event_streams.send_text(send, event_streams.event_text("step", {"done": done, "total": total}))
            case Rendered():
                files = {
                    "video": _data_url(MIME[event.format], event.content),
                    "thumbnail": _data_url("image/webp", event.thumbnail),
                }
                if event.poster is not None:
                    files["poster"] = _data_url(POSTER_MIME[event.video.params.poster], event.poster)
                described = animation_object(self._request_id, event).model_dump(mode="json")
                await event_streams.send_text(send, event_streams.event_text("completed", {**described, **files}))


def _data_url(mime: str, content: bytes) -> str:
    return f"data:{mime};base64,{base64.b64encode(content).decode()}"
