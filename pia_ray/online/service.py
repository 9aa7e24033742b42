"""The endpoint with its asynchronous part: the routes of video jobs, files and batches, and the work on them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

from fastapi import APIRouter, FastAPI

from pia_ray.config.serve import ServeConfig
from pia_ray.errors import NotReady, PiaRayError
from pia_ray.online.app import create_app
from pia_ray.online.batches.runner import BatchRunner
from pia_ray.online.batches.store import BatchStore
from pia_ray.online.files import FileStore
from pia_ray.online.http.limits import STATUS_COST
from pia_ray.online.rendering.renderer import Renderer
from pia_ray.online.requests.request_reader import FormReader
from pia_ray.online.routes.batches import batch_routes
from pia_ray.online.routes.files import FILE_TTL_S, file_routes
from pia_ray.online.routes.operator import operator_routes
from pia_ray.online.routes.unsupported import unsupported_routes
from pia_ray.online.routes.video_content import video_content_routes
from pia_ray.online.routes.video_events import video_event_routes
from pia_ray.online.routes.videos import video_object, video_routes
from pia_ray.online.usage import Amounts, Usage
from pia_ray.online.video_jobs import JobStore
from pia_ray.online.video_jobs.creation import JobCreator
from pia_ray.online.video_jobs.dispatcher import Dispatcher
from pia_ray.online.video_jobs.webhooks import Webhooks

SWEEP_S: Final = 3600.0

log = logging.getLogger(__name__)


def create_endpoint(
    renderer: Renderer,
    jobs: JobStore,
    config: ServeConfig,
    *,
    forms: FormReader | None = None,
    webhooks: Webhooks | None = None,
    poll_s: float = 1.0,
    replica: str = "",
) -> FastAPI:
    """The whole endpoint as an ASGI application, which works on video jobs and batches while it runs.

    `forms` and `webhooks` replace the endpoint's own reader of requests and sender of events. Storage is polled for new
    work every `poll_s`. `replica` is the name of this process in metrics. `app.state.service` is its `VideoService`.

    Raises:
        ConfigError: the file of API keys, or the secret of webhooks, is not valid.
    """
    forms = forms or FormReader(config)
    usage = Usage(config, store_clock=jobs.now)
    if webhooks is None and (secret := config.webhook_secret) is not None:
        webhooks = Webhooks(secret.get_secret_value())
    service = VideoService(renderer, jobs, config, forms=forms, webhooks=webhooks, usage=usage, poll_s=poll_s)

    app = create_app(
        renderer,
        config,
        forms=forms,
        routers=service.routers,
        lifespan=lambda _: service.at_work(),
        check_alive=service.check_alive,
        replica=replica,
        usage=usage,
    )
    app.state.service = service
    return app


class VideoService:
    """Video jobs and batches of one endpoint: the `routers` for `create_app`, and `at_work` for its lifespan."""

    def __init__(
        self,
        renderer: Renderer,
        jobs: JobStore,
        config: ServeConfig,
        *,
        forms: FormReader,
        webhooks: Webhooks | None,
        usage: Usage,
        poll_s: float = 1.0,
    ) -> None:
        self._files = FileStore(config.storage, ttl_s=FILE_TTL_S)
        self._batches = BatchStore(config.storage, ttl_s=FILE_TTL_S)
        self._usage = usage
        self._dispatcher = _dispatcher(renderer, jobs, config, webhooks=webhooks, usage=usage, poll_s=poll_s)
        self._poll_s = poll_s
        self._grace_s = config.graceful_shutdown_s
        self._working: asyncio.Task[None] | None = None
        creator = JobCreator(
            config,
            jobs=jobs,
            files=self._files,
            reader=forms,
            usage=usage,
            pace=self._dispatcher.seconds_until_one_ends,
        )
        self._runner = BatchRunner(
            self._batches,
            self._files,
            jobs=jobs,
            submit=creator.create_line,
            video_object=lambda job: video_object(job).model_dump(mode="json"),
        )
        self.routers = self._routers(jobs, config, creator=creator, forms=forms)

    @asynccontextmanager
    async def at_work(self) -> AsyncIterator[None]:
        """Runs the work while the block lasts; then videos in progress have `graceful_shutdown_s` to end."""
        working = self._working = asyncio.create_task(self.run())
        working.add_done_callback(_log_end)
        try:
            yield
        finally:
            drain = asyncio.create_task(self._drain())
            await asyncio.wait([working, drain], return_when=asyncio.FIRST_COMPLETED)
            drain.cancel()
            working.cancel()
            await asyncio.wait([working])  # its end has been logged
            self._working = None

    def check_alive(self) -> None:
        """Checks that video jobs are worked on.

        Raises:
            NotReady: a bug has ended the work; a new process continues it.
        """
        if self._working is not None and self._working.done():
            raise NotReady("a bug has ended the work on video jobs: this process has to be replaced")

    async def run(self) -> None:
        """Renders video jobs, makes jobs of the lines of batches and removes what has expired, until it is cancelled;
        then jobs that are being rendered are given back. One call at a time."""
        tasks = [
            asyncio.create_task(each)
            for each in (self._dispatcher.run(), self._runner.run(self._poll_s), self._usage.run(), self._sweep())
        ]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                if not task.cancelling():  # a second cancel would break off how they give back what they have
                    task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _routers(
        self, jobs: JobStore, config: ServeConfig, *, creator: JobCreator, forms: FormReader
    ) -> tuple[APIRouter, ...]:
        return (
            unsupported_routes(),
            video_event_routes(jobs, self._dispatcher),
            video_routes(creator=creator, jobs=jobs, reader=forms, dispatcher=self._dispatcher),
            video_content_routes(jobs),
            file_routes(self._files, config=config, usage=self._usage),
            batch_routes(self._batches, files=self._files, config=config),
            *([] if config.operator_key is None else [operator_routes(jobs, self._dispatcher)]),
        )

    async def _drain(self) -> None:
        self._runner.stop()
        await self._dispatcher.drain(timeout_s=self._grace_s)

    async def _sweep(self) -> None:
        while True:
            try:
                removed = await asyncio.to_thread(lambda: self._files.sweep() + self._batches.sweep())
            except PiaRayError as error:
                log.warning("expired files and batches are kept for now: %s", error.message)
            else:
                if removed:
                    log.info("removed %d files and batches that had expired", removed)
            await asyncio.sleep(SWEEP_S)


def _dispatcher(
    renderer: Renderer, jobs: JobStore, config: ServeConfig, *, webhooks: Webhooks | None, usage: Usage, poll_s: float
) -> Dispatcher:
    """The dispatcher with the settings of the endpoint; its attempts count in `usage`."""
    return Dispatcher(
        renderer,
        jobs,
        max_in_flight=config.max_batch_size * config.max_replicas + 1,
        max_attempts=config.max_attempts,
        job_timeout_s=config.job_timeout_s,
        webhooks=webhooks,
        poll_s=poll_s,
        count=lambda owner, gpu_s, num_bytes: usage.add(owner, Amounts(gpu_s=gpu_s, num_bytes=num_bytes)),
        weights=config.owner_weights,
        polls_per_minute=config.requests_per_minute / STATUS_COST / 2,
    )


def _log_end(working: asyncio.Task[None]) -> None:
    if not working.cancelled() and (error := working.exception()) is not None:
        log.critical("the work on video jobs has ended", exc_info=error)
