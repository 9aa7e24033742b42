"""`LocalRenderer`: a renderer on an animator in this process, fair by priority and arrival, with a bounded queue.

Decodes pictures and encodes videos around the animator. An engine of the endpoint is one of these.
"""

from __future__ import annotations

import asyncio
import logging
import time
import traceback
from collections.abc import AsyncGenerator, Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from pia_ray import weights
from pia_ray.animation import Animation, RowAnimator, provenance_of
from pia_ray.config.knobs import VideoFormat
from pia_ray.config.serve import ServeConfig
from pia_ray.errors import Busy, Cancelled, PiaRayError, UnexpectedError, WeightsError
from pia_ray.manifest import inputs
from pia_ray.media import image as pictures
from pia_ray.media import video
from pia_ray.online.rendering.renderer import (
    INTERACTIVE,
    Event,
    FinishedVideo,
    Load,
    ModelFacts,
    Queued,
    Rendered,
    RenderRequest,
    Step,
)
from pia_ray.online.rendering.timing import Clock, Tally
from pia_ray.pia.admission import rank
from pia_ray.types import AnimationRequest

log = logging.getLogger(__name__)


class LocalRenderer:
    """A `Renderer` on an animator in this process, which `config`'s models have been given to as its styles.

    As many requests denoise together as `config.max_batch_size` says, `config.max_waiting` more wait, and others are
    refused. Half of the waiting places are for synchronous calls alone. All methods belong to one event loop.
    """

    def __init__(self, animator: RowAnimator, config: ServeConfig) -> None:
        self._animator = animator
        self._config = config
        self._places: list[_Place] = []
        self._num_arrivals = 0
        self._tally = Tally()
        self._draining = False
        self._is_idle = asyncio.Event()
        self._is_idle.set()
        self._moved_at = time.monotonic()
        self._unmoved_s = 0.0
        """Seconds without a step until a caller gave up: where a device hangs, the next request goes on from there."""
        # Decoding and encoding: what more threads would add is memory for frames.
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="render")
        self._models: tuple[ModelFacts, ...] | None = None

    async def render(self, request: RenderRequest) -> AsyncGenerator[Event, None]:
        """As `Renderer.render`; begins when it is first iterated."""
        place = self._admit(request)
        clock = Clock(request.deadline_s)
        submitted: Future[Future[Animation]] | None = None
        animating: Future[Animation] | None = None

        def tell(event: Step) -> None:
            self._moved_at, self._unmoved_s = time.monotonic(), 0.0
            place.tell_from_thread(event)

        def tell_end(ended: Future[Animation]) -> None:
            if not ended.cancelled():
                self._moved_at, self._unmoved_s = time.monotonic(), 0.0
            place.tell_from_thread(None)

        try:
            submitted = self._threads.submit(self._submit, request, clock, tell)
            animating = await clock.within(asyncio.wrap_future(submitted))
            animating.add_done_callback(tell_end)
            while (event := await clock.within(place.events.get())) is not None:
                if isinstance(event, Cancelled):
                    raise event
                if isinstance(event, Step):
                    self._tally.count(request.id, event)
                    self._begin(place)
                yield event
            animation = animating.result()
            place.animated = True
            self._tally.end(request.id)
            self._tell_positions()
            rendered = await asyncio.wrap_future(self._threads.submit(_encode, animation, request.format))
            log.info(
                "request %s: %d frames by %s in %.1f s, %.2f s of engine",
                request.id,
                len(animation.frames),
                animation.model,
                clock.elapsed_s,
                animation.gpu_s,
            )
            yield rendered
        except PiaRayError as error:
            log.info("request %s failed after %.1f s: %s", request.id, clock.elapsed_s, error.code)
            raise
        except Exception as error:  # the row boundary: whatever it is belongs to this request alone
            log.exception("request %s failed", request.id)
            raise UnexpectedError(f"{type(error).__name__}: {error}\n{traceback.format_exc()}") from error
        finally:
            if animating is not None and not animating.done():
                self._unmoved_s = self.stalled_s
            if submitted is not None and not submitted.cancel():
                submitted.add_done_callback(_take_back)
            self._tally.end(request.id)
            self._places.remove(place)
            if not self._places:
                self._is_idle.set()
            self._tell_positions()

    @property
    def is_idle(self) -> bool:
        """Whether it has no requests."""
        return self._is_idle.is_set()

    async def drain(self, *, timeout_s: float) -> None:
        """Begins no more requests: those that wait fail with `Cancelled` now, those that denoise after that time."""
        self._draining = True
        self._cancel(place for place in self._places if not place.begun)
        with suppress(TimeoutError):
            await asyncio.wait_for(self._is_idle.wait(), timeout_s)
        self._cancel(self._places)

    def _cancel(self, places: Iterable[_Place]) -> None:
        for place in places:
            place.events.put_nowait(Cancelled("the engine is shutting down: try again"))

    async def load(self) -> Load:
        """As `Renderer.load`."""
        if self._models is None:
            self._models = await asyncio.to_thread(model_facts, self._config)
        running = sum(place.begun and not place.animated for place in self._places)
        return Load(
            num_running=running,
            num_waiting=sum(not place.begun for place in self._places),
            step_s=self._tally.step_s,
            models=self._models,
        )

    async def check_ready(self) -> None:
        """As `Renderer.check_ready`; the animator is there from the start."""

    @property
    def stalled_s(self) -> float:
        """Seconds for which the animator has done no step though it has requests; a device may hang for ever."""
        at_work = any(not place.animated for place in self._places)
        return time.monotonic() - self._moved_at if at_work else 0.0

    async def close(self) -> None:
        """Closes the animator; requests in hand fail with `Cancelled`."""
        await asyncio.to_thread(self._animator.close)
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _admit(self, request: RenderRequest) -> _Place:
        if self._draining:
            raise Cancelled("the engine is shutting down: try again")
        config = self._config
        waiting = config.max_waiting if request.priority == INTERACTIVE else config.max_waiting // 2
        if len(self._places) >= config.max_batch_size + waiting:
            after_s = self._tally.seconds_until_a_place(config.max_batch_size)
            raise Busy(f"{len(self._places)} requests are in hand: try again in about {after_s:.0f} s", after_s)
        if all(each.animated for each in self._places):
            self._moved_at = time.monotonic() - self._unmoved_s  # idle until now
        self._num_arrivals += 1
        place = _Place(rank(self._num_arrivals, request.priority), asyncio.get_running_loop())
        self._places.append(place)
        self._is_idle.clear()
        self._tell_positions()
        return place

    def _begin(self, place: _Place) -> None:
        if not place.begun:
            place.begun = True
            self._tell_positions()

    def _tell_positions(self) -> None:
        """Tells every request that waits how many must end before it, where that has changed."""
        in_line = sorted(
            (place for place in self._places if not place.animated), key=lambda place: (not place.begun, place.rank)
        )
        for ahead, place in enumerate(in_line):
            position = max(0, ahead + 1 - self._config.max_batch_size)
            if not place.begun and position != place.position:
                place.position = position
                place.events.put_nowait(Queued(position))

    def _submit(self, request: RenderRequest, clock: Clock, tell: Callable[[Step], None]) -> Future[Animation]:
        """Decodes and hands over; on a thread."""
        return self._animator.submit(
            decode(request, self._config, deadline_s=clock.left_s),
            on_step=lambda done, total: tell(Step(done, total)),
            priority=request.priority,
        )


def decode(request: RenderRequest, config: ServeConfig, *, deadline_s: float | None) -> AnimationRequest:
    """What an animator is asked for this request.

    Raises:
        RowError: a file cannot be used, or the format cannot hold what is asked for.
    """
    params = request.params
    video.require_encodable(request.format, width=params.width or 8, height=params.height or 8, fps=params.fps)
    limits = {"max_bytes": config.max_image_bytes, "max_pixels": config.max_image_pixels}
    picture = pictures.decode(request.image, background=config.background, **limits).rgb
    brings: dict[str, Any] = dict(inputs.decode_references(request.inputs, background=config.background, **limits))
    return AnimationRequest(picture, params, id=request.id, deadline_s=deadline_s, **brings)


def model_facts(config: ServeConfig) -> tuple[ModelFacts, ...]:
    """The models of an endpoint, the default one first. May look at their files, so it blocks."""
    names = sorted(config.models, key=lambda name: name != config.default_model)
    return tuple(
        ModelFacts(
            name=name,
            version=_version(config, name),
            description=config.models[name].description,
            default=name == config.default_model,
        )
        for name in names
    )


@dataclass(eq=False)
class _Place:
    """A request in hand."""

    rank: int
    loop: asyncio.AbstractEventLoop
    events: asyncio.Queue[Event | Cancelled | None] = field(default_factory=asyncio.Queue)
    """None comes last, when the animation is there or has failed."""
    position: int = 0
    begun: bool = False
    animated: bool = False

    def tell_from_thread(self, event: Event | None) -> None:
        try:
            self.loop.call_soon_threadsafe(self.events.put_nowait, event)
        except RuntimeError:
            log.debug("an event came after the event loop had ended")


def _encode(animation: Animation, video_format: VideoFormat) -> Rendered:
    fps = animation.params.fps
    encoded = video.encode(animation.frames, fps=fps, format=video_format, provenance=provenance_of(animation))
    video.verify(encoded)
    made = FinishedVideo(
        num_frames=encoded.num_frames,
        width=encoded.width,
        height=encoded.height,
        fps=encoded.fps,
        size_bytes=encoded.size_bytes,
        sha256=encoded.sha256,
        params=animation.params,
        model_version=animation.model,
        gpu_s=animation.gpu_s,
        animate_s=animation.animate_s,
        motion=animation.motion,
    )
    return Rendered(
        video=made,
        content=encoded.content,
        format=encoded.format,
        thumbnail=video.thumbnail(animation.frames, fps=fps),
        spritesheet=video.spritesheet(animation.frames),
    )


def _take_back(submitted: Future[Future[Animation]]) -> None:
    """Ends an animation that nobody waits for any more, also one that is only being handed over."""
    if not submitted.cancelled() and submitted.exception() is None:
        submitted.result().cancel()


def _version(config: ServeConfig, name: str) -> str:
    try:
        return weights.version(config.models[name])
    except WeightsError:
        return name
