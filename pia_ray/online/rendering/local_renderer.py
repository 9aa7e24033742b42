"""`LocalRenderer`: a renderer on an animator in this process, fair by priority and arrival, with a bounded queue.

Decodes pictures and encodes videos around the animator. An engine of the endpoint is one of these.
"""

from __future__ import annotations

import asyncio
import logging
import time
import traceback
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import aclosing, suppress
from dataclasses import dataclass, field, replace
from typing import Any, Final, ParamSpec, TypeVar

from pia_ray import weights
from pia_ray.animation import Animation, RowAnimator, provenance_of, require_safe
from pia_ray.config.knob_types import VideoFormat
from pia_ray.config.serve import ServeConfig
from pia_ray.errors import Busy, Cancelled, PiaRayError, RowError, UnexpectedError, WeightsError
from pia_ray.formatting import count_of
from pia_ray.manifest import inputs
from pia_ray.media import image as pictures
from pia_ray.media import video
from pia_ray.media.finish import encode_finished, finish, poster_of, require_finishable
from pia_ray.media.marking import at_level, require_signable, signer_of
from pia_ray.online.rendering.renderer import (
    INTERACTIVE,
    Event,
    FinishedVideo,
    Load,
    ModelFacts,
    Queued,
    Rendered,
    RenderRequest,
    StepDone,
)
from pia_ray.online.rendering.retakes import RequestTakes
from pia_ray.online.rendering.timing import Deadline, Tally
from pia_ray.pia.admission import PRIORITY_STEP, rank
from pia_ray.types import AnimationRequest

_PASSED_BY: Final = 16
"""Later requests of other owners that go before a request, for each request of its owner that waits already."""

_P = ParamSpec("_P")
_T = TypeVar("_T")
log = logging.getLogger(__name__)


class LocalRenderer:
    """A `Renderer` on an animator in this process, whose styles are the models of `config`.

    `config.max_batch_size` requests denoise together, `config.max_waiting` more wait, and further ones are refused.
    Only synchronous calls may fill the second half of those that wait. All methods belong to one event loop.
    """

    def __init__(self, animator: RowAnimator, config: ServeConfig) -> None:
        self._animator = animator
        self._config = config
        self._admitted: list[_Admitted] = []
        self._num_arrivals = 0
        self._tally = Tally()
        self._weights = config.owner_weights
        self._draining = False
        self._is_idle = asyncio.Event()
        self._is_idle.set()
        self._stepped_at = time.monotonic()
        self._stalled_before_s = 0.0
        """Seconds without a step before a caller gave up: where a device hangs, the next request counts on from it."""
        # For decoding and encoding. More threads would need memory for more frames.
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="render")
        self._models: tuple[ModelFacts, ...] | None = None

    async def render(self, request: RenderRequest) -> AsyncGenerator[Event, None]:
        """As `Renderer.render`; begins when it is first iterated."""
        admitted = self._admit(request)
        deadline = Deadline(request.deadline_s)
        takes = RequestTakes(request, deadline)
        try:
            while not takes.is_complete:
                async with aclosing(self._take(*takes.begin(), admitted)) as events:
                    try:
                        async for event in events:
                            if isinstance(event, Animation):
                                require_safe(event, self._config)
                                await self._in_thread(takes.add, event)
                            else:
                                yield takes.counted(event) if isinstance(event, StepDone) else event
                    except RowError as error:
                        takes.add_failure(error)
            animation, facts = takes.best()
            admitted.animated = True
            self._tally.end(request.id)
            self._queue_positions()
            rendered = await self._in_thread(_encode, animation, request.format, facts, self._config)
            _log_rendered(request, rendered, deadline)
            yield rendered
        except PiaRayError as error:
            log.info("request %s failed after %.1f s: %s", request.id, deadline.elapsed_s, error.code)
            raise
        except Exception as error:  # the row boundary: it belongs to this request alone
            log.exception("request %s failed", request.id)
            raise UnexpectedError(f"{type(error).__name__}: {error}\n{traceback.format_exc()}") from error
        finally:
            self._tally.end(request.id)
            self._admitted.remove(admitted)
            if not self._admitted:
                self._is_idle.set()
            self._queue_positions()

    async def _take(
        self, request: RenderRequest, deadline: Deadline, admitted: _Admitted
    ) -> AsyncGenerator[Event | Animation, None]:
        """The events of one take of an admitted request, and its animation, which is the last of them."""
        submitted: Future[Future[Animation]] | None = None
        animating: Future[Animation] | None = None

        def on_step(event: StepDone) -> None:
            self._stepped_at, self._stalled_before_s = time.monotonic(), 0.0
            admitted.put_from_thread(event)

        def on_end(ended: Future[Animation]) -> None:
            if not ended.cancelled():
                self._stepped_at, self._stalled_before_s = time.monotonic(), 0.0
            admitted.put_from_thread(None)

        try:
            submitted = self._threads.submit(self._submit, request, deadline, on_step, admitted.priority)
            animating = await deadline.within(asyncio.wrap_future(submitted))
            animating.add_done_callback(on_end)
            while (event := await deadline.within(admitted.events.get())) is not None:
                if isinstance(event, Cancelled):
                    raise event
                if isinstance(event, StepDone):
                    event = replace(event, gpu_s=self._tally.count(request.id, event))
                    self._begin(admitted)
                yield event
            yield animating.result()
        finally:
            if animating is not None and not animating.done():
                self._stalled_before_s = self.stalled_s
            if submitted is not None and not submitted.cancel():
                submitted.add_done_callback(_take_back)

    @property
    def is_idle(self) -> bool:
        """Whether it has no requests."""
        return self._is_idle.is_set()

    async def drain(self, *, timeout_s: float) -> None:
        """Begins no more requests: those that wait fail with `Cancelled` now, those that denoise after that time."""
        self._draining = True
        self._cancel(admitted for admitted in self._admitted if not admitted.begun)
        with suppress(TimeoutError):
            await asyncio.wait_for(self._is_idle.wait(), timeout_s)
        self._cancel(self._admitted)

    def _cancel(self, requests: Iterable[_Admitted]) -> None:
        for admitted in requests:
            admitted.events.put_nowait(Cancelled("the engine is shutting down: try again"))

    async def load(self) -> Load:
        """As `Renderer.load`."""
        if self._models is None:
            self._models = await asyncio.to_thread(model_facts, self._config)
        running = sum(admitted.begun and not admitted.animated for admitted in self._admitted)
        return Load(
            num_running=running,
            num_waiting=sum(not admitted.begun for admitted in self._admitted),
            step_s=self._tally.step_s,
            models=self._models,
        )

    async def check_ready(self) -> None:
        """As `Renderer.check_ready`: the animator is always ready."""

    @property
    def stalled_s(self) -> float:
        """Seconds since the animator's latest step; 0 while it has no requests. A device may hang for ever."""
        has_requests = any(not admitted.animated for admitted in self._admitted)
        return time.monotonic() - self._stepped_at if has_requests else 0.0

    async def close(self) -> None:
        """Closes the animator; its requests fail with `Cancelled`."""
        await asyncio.to_thread(self._animator.close)
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _admit(self, request: RenderRequest) -> _Admitted:
        if self._draining:
            raise Cancelled("the engine is shutting down: try again")
        config = self._config
        waiting = config.max_waiting if request.priority == INTERACTIVE else config.max_waiting // 2
        own = [each for each in self._admitted if each.owner == request.owner != "" and not each.begun]
        if own and request.priority == INTERACTIVE:
            waiting -= config.max_waiting // 4  # the last places are for owners that wait for nothing else
        if len(self._admitted) >= config.max_batch_size + waiting:
            after_s = self._tally.seconds_until_free(config.max_batch_size, request.owner)
            raise Busy(
                f"{count_of(len(self._admitted), 'request')} queued or running: try again in about {after_s:.0f} s",
                after_s,
            )
        if all(each.animated for each in self._admitted):
            self._stepped_at = time.monotonic() - self._stalled_before_s  # idle until now
        self._num_arrivals += 1
        priority = self._fair_priority(request, [each for each in own if int(each.priority) == request.priority])
        admitted = _Admitted(
            rank(self._num_arrivals, priority), asyncio.get_running_loop(), priority=priority, owner=request.owner
        )
        self._admitted.append(admitted)
        self._is_idle.clear()
        self._queue_positions()
        return admitted

    def _fair_priority(self, request: RenderRequest, own: Sequence[_Admitted]) -> float:
        """The priority of a request whose owner has these waiting: later requests of other owners go before it.

        It stays below the next priority, and no request goes before an earlier one of its owner.
        """
        passed_by = min(PRIORITY_STEP - 1, round(_PASSED_BY * len(own) / self._weights.get(request.owner, 1.0)))
        last = max((each.rank for each in own), default=0.0) - rank(self._num_arrivals, request.priority)
        return request.priority + max(float(passed_by), last) / PRIORITY_STEP

    def _begin(self, admitted: _Admitted) -> None:
        if not admitted.begun:
            admitted.begun = True
            self._queue_positions()

    def _queue_positions(self) -> None:
        """Reports its position to every waiting request whose position has changed."""
        queue = sorted(
            (admitted for admitted in self._admitted if not admitted.animated),
            key=lambda admitted: (not admitted.begun, admitted.rank),
        )
        for ahead, admitted in enumerate(queue):
            position = max(0, ahead + 1 - self._config.max_batch_size)
            if not admitted.begun and position != admitted.position:
                admitted.position = position
                admitted.events.put_nowait(Queued(position))

    async def _in_thread(self, call: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        return await asyncio.wrap_future(self._threads.submit(call, *args, **kwargs))

    def _submit(
        self, request: RenderRequest, deadline: Deadline, on_step: Callable[[StepDone], None], priority: float
    ) -> Future[Animation]:
        """The submitted request, decoded; on a thread."""
        return self._animator.submit(
            decode(request, self._config, deadline_s=deadline.left_s),
            on_step=lambda done, total: on_step(StepDone(done, total)),
            priority=priority,
        )


def decode(request: RenderRequest, config: ServeConfig, *, deadline_s: float | None) -> AnimationRequest:
    """The animator's request.

    Raises:
        RowError: a file cannot be used, or the format cannot hold the size or frame rate.
    """
    params = request.params
    require_finishable(request.format, params)
    if config.c2pa_certificate is not None:
        require_signable(request.format)
    limits = {"max_bytes": config.max_image_bytes, "max_pixels": config.max_image_pixels}
    picture = pictures.decode(request.image, background=config.background, **limits).rgb
    references: dict[str, Any] = dict(inputs.decode_references(request.inputs, background=config.background, **limits))
    return AnimationRequest(picture, params, id=request.id, deadline_s=deadline_s, **references)


def model_facts(config: ServeConfig) -> tuple[ModelFacts, ...]:
    """The models of an endpoint, the default one first. Blocks, because it may read their files."""
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
class _Admitted:
    """A request that waits, denoises or is encoded."""

    rank: float
    loop: asyncio.AbstractEventLoop
    priority: float
    owner: str
    events: asyncio.Queue[Event | Cancelled | None] = field(default_factory=asyncio.Queue)
    """None comes last, when the animation has ended or failed."""
    position: int = 0
    begun: bool = False
    animated: bool = False

    def put_from_thread(self, event: Event | None) -> None:
        try:
            self.loop.call_soon_threadsafe(self.events.put_nowait, event)
        except RuntimeError:
            log.debug("an event came after the event loop had ended")


def _encode(
    animation: Animation, video_format: VideoFormat, judged: Mapping[str, Any], config: ServeConfig
) -> Rendered:
    """The video of the animation with its pictures; `judged` are the fields of an animation that has been judged."""
    finished = finish(animation.frames, animation.params, upscale=animation.upscale)
    provenance = at_level(provenance_of(animation), config.provenance)
    encoded = encode_finished(finished, video_format, provenance=provenance)
    if (signer := signer_of(config)) is not None:
        assert animation.image is not None
        encoded = signer.sign(encoded, picture=pictures.thumbnail(animation.image), model=animation.model)
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
        **(judged or animation.judge().as_dict()),
        nsfw=animation.nsfw,
    )
    return Rendered(
        video=made,
        content=encoded.content,
        format=encoded.format,
        thumbnail=video.thumbnail(finished.preview, fps=animation.params.fps),
        spritesheet=video.spritesheet(finished.preview),
        poster=poster_of(finished, animation.params, judged=animation.frames, image=animation.image),
    )


def _log_rendered(request: RenderRequest, rendered: Rendered, deadline: Deadline) -> None:
    log.info(
        "request %s: %d frames by %s in %.1f s, %.2f s of engine",
        request.id,
        rendered.video.num_frames,
        rendered.video.model_version,
        deadline.elapsed_s,
        rendered.video.total_gpu_s,
    )


def _take_back(submitted: Future[Future[Animation]]) -> None:
    """Cancels the animation of a request whose caller has gone, also while it is being submitted."""
    if not submitted.cancelled() and submitted.exception() is None:
        submitted.result().cancel()


def _version(config: ServeConfig, name: str) -> str:
    try:
        return weights.version(config.models[name])
    except WeightsError:
        return name
