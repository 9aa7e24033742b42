"""Engines as Serve replicas, and the renderer through which an ingress reaches them.

An engine is a `LocalRenderer` in a process of its own. Requests, events and errors travel as values, because exceptions
change their types between Ray's processes.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, suppress
from dataclasses import replace
from typing import Any, Final

import ray.exceptions
from ray import serve
from ray.serve.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    RayServeException,
    ReplicaUnavailableError,
)
from ray.serve.handle import DeploymentHandle

from pia_ray import logs
from pia_ray.animation import RowAnimator
from pia_ray.config.knobs import DEFAULT_STYLE
from pia_ray.config.serve import ServeConfig
from pia_ray.errors import (
    Busy,
    Cancelled,
    DeviceLost,
    JobError,
    ModelUnavailable,
    NotReady,
    RowError,
    Timeout,
    UnexpectedError,
    WorkerDied,
)
from pia_ray.imports import own_process
from pia_ray.online.allocator import share_arenas
from pia_ray.online.rendering.local_renderer import LocalRenderer, model_facts
from pia_ray.online.rendering.renderer import (
    INTERACTIVE,
    Event,
    FinishedVideo,
    Load,
    ModelFacts,
    Rendered,
    RenderRequest,
    StepDone,
)
from pia_ray.online.rendering.timing import Deadline, Tally
from pia_ray.ray_runtime import end_process

log = logging.getLogger(__name__)

MakeAnimator = Callable[[ServeConfig, int], RowAnimator]
"""Makes one engine's animator from the config and the CPU threads it may use. Sent to replicas, so it must pickle."""

_LOST: Final = (
    ray.exceptions.RayActorError,
    ray.exceptions.ObjectLostError,
    ray.exceptions.WorkerCrashedError,
    ReplicaUnavailableError,
)
"""Ray's errors for a request whose engine has died."""

_AT_REST: Final = ("HEALTHY", "UPSCALING", "DOWNSCALING")
"""Serve's states of engines that start with the first request; while the first engines start, the state is UPDATING."""

ROUTER_S: Final = 1.0
"""Seconds before a call is sent again: Serve's router may still choose the dead engine before (ray 2.60)."""

STATUS_S: Final = 1.0
"""Seconds for which Serve's answer about engines is used again, because everybody may request `/readyz`."""

STOP_POLL_S: Final = 5.0
"""Seconds between an engine's checks whether Serve stops it; fewer if it has little time to end its requests."""

STATUS_TIMEOUT_S: Final = 5.0
"""Seconds to wait for Serve's answer about engines; while its controller is away, engines work without it."""


class EngineReplica:
    """One replica: warm models, and the requests that denoise together in them."""

    def __init__(self, config: ServeConfig, make_animator: MakeAnimator, cpu_threads: int) -> None:
        own_process()
        share_arenas()
        logs.set_up_worker(config.log, replica=serve.get_replica_context().replica_id.unique_id)
        self._config = config
        self._renderer = LocalRenderer(make_animator(config, cpu_threads), config)

        # Loads nothing. It reports this replica's latest models to Serve's router, so that requests for a model go to
        # it. The animator itself keeps and drops models; Serve would drop models that are in use.
        async def hold(model: str) -> str:
            return model

        self._watching: asyncio.Task[None] | None = None
        self._hold: Callable[[str], Awaitable[str]]
        self._hold = serve.multiplexed(max_num_models_per_replica=config.keep_models)(hold)

    async def render(self, request: RenderRequest) -> AsyncIterator[Event | RowError]:
        """The renderer's events; an error of the request is the last one."""
        if self._watching is None:
            self._watching = asyncio.create_task(self._drain_when_stopped())
        if (model := serve.get_multiplexed_model_id()) != "":
            await self._hold(model)
        async with aclosing(self._renderer.render(request)) as events:
            try:
                async for event in events:
                    yield event
            except RowError as error:
                yield error
            except JobError as error:
                end_process(error)

    async def check_health(self) -> None:
        """Called by Serve periodically. Ends this process if its device hangs, because only a new process helps."""
        stalled_s = self._renderer.stalled_s
        if stalled_s > self._config.stall_timeout_s:
            end_process(DeviceLost(f"no step for {stalled_s:.0f} s: the device hangs"))

    async def _drain_when_stopped(self) -> None:
        """Drains the renderer once Serve stops this replica. Serve itself calls it only after its last request."""
        replica, grace_s = serve.get_replica_context().replica_id, self._config.graceful_shutdown_s
        poll_s = min(STOP_POLL_S, grace_s / 20)
        while self._renderer.is_idle or not await asyncio.to_thread(_is_stopped, replica):
            await asyncio.sleep(poll_s)
        log.info("Serve stops this engine: its requests have %.0f s to end", grace_s)
        await self._renderer.drain(timeout_s=grace_s - 2 * poll_s)


class RayRenderer:
    """A `Renderer` whose engines are replicas of a Serve deployment. All methods belong to one event loop.

    A synchronous call whose engine dies or shuts down is sent to another one, once, and its steps begin anew. A video
    job then fails with `WorkerDied` or `Cancelled`, and its dispatcher tries again. `load` counts the requests of this
    process only.
    """

    def __init__(self, engines: DeploymentHandle[Any], config: ServeConfig) -> None:
        self._engines: Any = engines.options(stream=True)
        self._config = config
        self._tally = Tally()
        self._num_requests = 0
        self._models: tuple[ModelFacts, ...] | None = None
        self._ready = False
        self._queried_at = float("-inf")
        self._querying: asyncio.Task[None] | None = None

    async def render(self, request: RenderRequest) -> AsyncGenerator[Event, None]:
        """As `Renderer.render`; begins when it is first iterated.

        Raises:
            WorkerDied: the engine died, and for a synchronous call another one too.
        """
        # The deadline of a job begins in the engine, so that a job may wait for one. The caller of a call waits.
        deadline = Deadline(request.deadline_s if request.priority == INTERACTIVE else None)
        tries = 2 if request.priority == INTERACTIVE else 1
        self._num_requests += 1
        try:
            while True:
                tries -= 1
                left_s = request.deadline_s if request.priority != INTERACTIVE else deadline.left_s
                try:
                    async with aclosing(self._events(replace(request, deadline_s=left_s), deadline)) as events:
                        async for event in events:
                            yield event
                            if isinstance(event, Rendered):
                                return
                    raise WorkerDied("the engine ended before the video was finished")
                except (*_LOST, WorkerDied, Cancelled) as error:
                    log.warning("request %s: its engine died or shuts down: %s", request.id, error)
                    if not tries:
                        if isinstance(error, Cancelled):
                            raise
                        raise WorkerDied("the engine died while it made this video: try again") from error
                await deadline.within(asyncio.sleep(ROUTER_S))
        finally:
            self._num_requests -= 1

    @property
    def num_requests(self) -> int:
        """The requests of this renderer that have not ended."""
        return self._num_requests

    async def load(self) -> Load:
        """As `Renderer.load`, for the requests of this renderer; starts no engine."""
        if self._models is None:
            self._models = await asyncio.to_thread(model_facts, self._config)
        running = min(self._tally.num_running, self._num_requests)
        return Load(
            num_running=running,
            num_waiting=self._num_requests - running,
            step_s=self._tally.step_s,
            models=self._models,
        )

    async def check_ready(self) -> None:
        """As `Renderer.check_ready`: an engine runs, or Serve has none on purpose and starts one for a request.

        One query of Serve runs at a time; until it is answered, the earlier answer counts.
        """
        is_querying = self._querying is not None and not self._querying.done()
        if not is_querying and time.monotonic() - self._queried_at > STATUS_S:
            self._querying = asyncio.create_task(self._query())
            await asyncio.wait([self._querying], timeout=STATUS_TIMEOUT_S)
        elif self._querying is not None and self._queried_at == float("-inf"):
            await asyncio.wait([self._querying], timeout=STATUS_TIMEOUT_S)
        if not self._ready:
            raise NotReady("no engine runs yet: models may be loading, or no node has room for one")

    async def _query(self) -> None:
        try:
            self._ready = await asyncio.to_thread(
                _takes_requests, self._engines.app_name, self._engines.deployment_name
            )
        except (ray.exceptions.RayError, RayServeException) as error:
            log.warning("whether engines run is unknown: %s", error)
        finally:
            self._queried_at = time.monotonic()

    async def _events(self, request: RenderRequest, deadline: Deadline) -> AsyncGenerator[Event, None]:
        """The events of one engine."""
        stream = self._handle(request.params.style).render.remote(request)
        try:
            while (event := await deadline.within(_next(stream))) is not None:
                if isinstance(event, RowError):
                    raise event
                if isinstance(event, StepDone):
                    self._tally.count(request.id, event)
                if isinstance(event, Rendered):  # an engine of an earlier version leaves fields out, as in an upgrade
                    event = replace(event, video=FinishedVideo.model_validate(dict(event.video)))
                yield event
        except (GeneratorExit, asyncio.CancelledError, Timeout):
            with suppress(ray.exceptions.RayError, RayServeException):  # it may have failed in the meantime
                stream.cancel()
            raise
        except BackPressureError as error:
            after_s = self._tally.seconds_until_free(self._config.max_batch_size, request.owner)
            raise Busy(f"too many requests wait: try again in about {after_s:.0f} s", after_s) from error
        except DeploymentUnavailableError as error:
            raise ModelUnavailable("the engines could not be started: see the logs of their replicas") from error
        except ray.exceptions.TaskCancelledError as error:
            raise Cancelled("the engine is shutting down: try again") from error
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, _LOST):
                raise error.cause from error
            raise UnexpectedError(f"the engine failed: {error}") from error
        finally:
            self._tally.end(request.id)

    def _handle(self, style: str) -> Any:
        if len(self._config.models) == 1 or self._config.max_replicas == 1:
            return self._engines  # there is one model or one engine, and routing by model takes time
        model = self._config.default_model if style == DEFAULT_STYLE else style
        return self._engines.options(multiplexed_model_id=model)


def _takes_requests(application: str, deployment: str) -> bool:
    """Whether an engine runs, or none is wanted before a request. Blocks, because it queries Serve's controller."""
    found = serve.status().applications.get(application)
    engines = None if found is None else found.deployments.get(deployment)
    if engines is None:
        return False
    num_running = sum(num for state, num in engines.replica_states.items() if state == "RUNNING")
    return num_running > 0 or engines.status in _AT_REST


def _is_stopped(replica: Any) -> bool:
    """Whether Serve has begun to stop this replica; False while its controller, which it queries, is away. Blocks."""
    deployment = replica.deployment_id
    client = serve.context._get_global_client()  # no public call gives the state of one replica (ray 2.60)
    if client is None:
        return False
    try:
        details = client.get_serve_details()  # in the shape of Serve's REST API, which is public
    except (ray.exceptions.RayError, RayServeException) as error:
        log.debug("whether Serve stops this engine is unknown: %s", error)
        return False
    application = details["applications"].get(deployment.app_name, {})
    replicas = application.get("deployments", {}).get(deployment.name, {}).get("replicas", ())
    states = [each["state"] for each in replicas if each["replica_id"] == replica.unique_id]
    return application.get("status") == "DELETING" or states == ["STOPPING"]


async def _next(stream: Any) -> Event | RowError | None:
    try:
        event: Event | RowError = await anext(stream)
    except StopAsyncIteration:
        return None
    return event
