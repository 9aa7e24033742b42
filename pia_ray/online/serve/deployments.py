"""The Serve application of a `ServeConfig`: its deployments and their options."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import ray
from ray import serve
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import DeploymentSchema
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pia_ray import logs, weights
from pia_ray.config.knobs import suggest
from pia_ray.config.model import build
from pia_ray.config.serve import ServeConfig, is_loopback, load_serve
from pia_ray.errors import ConfigError
from pia_ray.media.marking import check_signing
from pia_ray.online.allocator import return_large_blocks, share_arenas
from pia_ray.online.serve.engines import EngineReplica, MakeAnimator, RayRenderer
from pia_ray.online.video_jobs import JobStore
from pia_ray.pia import make_animator

if TYPE_CHECKING:
    from pia_ray.online.service import VideoService

log = logging.getLogger(__name__)

SECRETS: Final[Mapping[str, str]] = {
    "webhook_secret": "PIA_RAY_WEBHOOK_SECRET",
    "metrics_token": "PIA_RAY_METRICS_TOKEN",
    "operator_key": "PIA_RAY_OPERATOR_KEY",
}
"""Settings that the environment of the ingress may give instead, because Ray's dashboard shows the config."""

END_S: Final = 10.0
"""Seconds beyond `graceful_shutdown_s` in which an engine or ingress gives back what it has not finished."""

INGRESS_REQUESTS: Final = 256
"""Requests at once in one ingress. Most wait for an engine; uploads are bounded by the API's own limits."""


def build_app(settings: ServeConfig | Mapping[str, Any]) -> serve.Application:
    """The endpoint as a Serve application, from a config or from plain settings of one, as YAML and `serve run` give.

    Raises:
        ConfigError: a setting is wrong.
        WeightsError: a model cannot be found.
    """
    config = settings if isinstance(settings, ServeConfig) else load_serve(None, dict(settings))
    return build_endpoint(config, make_animator=make_animator)


def build_endpoint(config: ServeConfig, *, make_animator: MakeAnimator) -> serve.Application:
    """As `build_app`, with engines on the animators of `make_animator`.

    Raises:
        ConfigError: the options for Serve are wrong, or certificate and key cannot sign.
        WeightsError: a model cannot be found.
    """
    check_signing(config)
    pinned = _pinned(config)
    ingress = serve.deployment(name="Ingress")(Ingress).options(**ingress_options(pinned))
    app: serve.Application = ingress.bind(pinned, bind_engines(pinned, make_animator=make_animator))
    return app


def bind_engines(config: ServeConfig, *, make_animator: MakeAnimator) -> serve.Application:
    """The engines alone, for another ingress: a `RayRenderer` takes its handle to them.

    Raises:
        ConfigError: the options for Serve are wrong.
    """
    options = engine_options(config)
    engines = serve.deployment(name="Engine")(EngineReplica).options(**options)
    if gpus := options["ray_actor_options"]["num_gpus"]:
        models = {name: each.on_gpu for name, each in config.models.items()}
        config = config.model_copy(update={"models": models, "gpus_per_replica": gpus})
    app: serve.Application = engines.bind(config, make_animator, max(1, int(config.cpus_per_replica)))
    return app


@serve.ingress()
class Ingress:
    """The HTTP interface. It may have any number of replicas, because all state is in storage."""

    def __init__(self, config: ServeConfig, engines: DeploymentHandle[Any]) -> None:
        share_arenas()
        return_large_blocks()
        logs.set_up_worker(config.log, replica=serve.get_replica_context().replica_id.unique_id)
        _check_host(config)
        self._config = _with_secrets(config)
        self._renderer = RayRenderer(engines, self._config)
        self._jobs = JobStore(config.storage, job_ttl_s=config.job_ttl_s, failed_job_ttl_s=config.failed_job_ttl_s)
        self._jobs.check()

    def __serve_build_asgi_app__(self) -> Any:  # the name is Serve's
        """The application, built in the replica: it holds connections, which do not pickle."""
        from pia_ray.online.service import create_endpoint  # fastapi is for the ingress

        replica = serve.get_replica_context().replica_id.unique_id
        app = create_endpoint(self._renderer, self._jobs, self._config, replica=replica)
        app.add_middleware(DropRequestId)
        self._service: VideoService = app.state.service
        return app

    async def check_health(self) -> None:
        """Called by Serve, which replaces this process if it raises."""
        self._service.check_alive()

    async def num_requests(self) -> int:
        """The calls and video jobs of this ingress whose videos are being made, or wait for it."""
        return self._renderer.num_requests


class DropRequestId:
    """Removes our request id from answers. Serve's proxy adds the same one, and clients would join the two."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one ASGI connection."""

        async def send_without(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [pair for pair in message["headers"] if pair[0].lower() != b"x-request-id"]
            await send(message)

        await self._app(scope, receive, send_without if scope["type"] == "http" else send)


def engine_options(config: ServeConfig) -> dict[str, Any]:
    """Serve's options of the engines.

    Raises:
        ConfigError: `deployment_config` has an unknown option.
    """
    rows = config.max_batch_size
    options: dict[str, Any] = {
        # Engines themselves refuse requests above rows + max_waiting, at once and by priority. With a lower bound of
        # Serve's the others would queue before the engine, without regard to priority.
        "max_ongoing_requests": 2 * (rows + config.max_waiting),
        # Of each ingress, while there is no engine: the number that one engine accepts.
        "max_queued_requests": rows + config.max_waiting,
        # Engines give back what they have not finished after `graceful_shutdown_s`, and then end by themselves.
        "graceful_shutdown_timeout_s": config.graceful_shutdown_s + END_S,
        "health_check_timeout_s": 120.0,  # a model that loads or a busy host may hold the event loop
        "ray_actor_options": {"num_cpus": config.cpus_per_replica, "num_gpus": _gpus(config)},
    }
    if "num_replicas" not in config.deployment_config:
        options["autoscaling_config"] = {
            "min_replicas": config.min_replicas,
            "max_replicas": config.max_replicas,
            "target_ongoing_requests": config.target_ongoing_requests or rows,
            "upscale_delay_s": config.upscale_delay_s,
            "downscale_delay_s": config.downscale_delay_s,
            "look_back_period_s": max(12.0, min(30.0, config.upscale_delay_s)),  # metrics come every 10 s
        }
    return _merged(options, config.deployment_config, "deployment_config")


def ingress_options(config: ServeConfig) -> dict[str, Any]:
    """Serve's options of the HTTP ingress.

    Raises:
        ConfigError: `ingress_deployment_config` has an unknown option.
    """
    options = {
        "num_replicas": 1,
        "max_ongoing_requests": INGRESS_REQUESTS,
        "max_queued_requests": INGRESS_REQUESTS,
        "backpressure_config": {"status_code": 429, "retry_after_s": 1},
        # First calls end, then the videos that this ingress has rendered.
        "graceful_shutdown_timeout_s": end_s(config),
        "health_check_timeout_s": 60.0,
        "ray_actor_options": {"num_cpus": 0.1},
    }
    return _merged(options, config.ingress_deployment_config, "ingress_deployment_config")


def end_s(config: ServeConfig) -> float:
    """Seconds that an ingress may take to end, of which it gives video jobs back in the last ones."""
    return config.sync_timeout_s + config.graceful_shutdown_s + END_S


def _pinned(config: ServeConfig) -> ServeConfig:
    """The config for replicas: branches as commits, and absolute paths, because replicas have other working folders."""
    changes: dict[str, Any] = {"models": {name: weights.pin(model) for name, model in config.models.items()}}
    if "://" not in config.storage:
        changes["storage"] = str(Path(config.storage).resolve())
    if isinstance(config.api_keys, str):
        changes["api_keys"] = str(Path(config.api_keys).resolve())
    for name in ("c2pa_certificate", "c2pa_key"):
        if (uri := getattr(config, name)) is not None and "://" not in uri:
            changes[name] = str(Path(uri).resolve())
    return config.model_copy(update=changes)


def _merged(options: dict[str, Any], given: Mapping[str, Any], setting: str) -> dict[str, Any]:
    known = [name for name in DeploymentSchema.model_fields if name != "name"]
    for name, value in given.items():
        if name not in known:
            # Serve accepts any name silently in an application that is built from a file.
            raise ConfigError(f'{setting}: Ray Serve has no option "{name}".{suggest(name, known)}')
        before = options.get(name)
        options[name] = {**before, **value} if isinstance(before, dict) and isinstance(value, Mapping) else value
    return options


def _gpus(config: ServeConfig) -> float:
    if config.gpus_per_replica is not None:
        return config.gpus_per_replica
    if not ray.is_initialized():
        return 0.0
    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    if not resources.get("GPU"):
        log.warning(
            "the cluster has no GPU now: engines run on CPUs; where GPU nodes come on demand set gpus_per_replica: 1"
        )
        return 0.0
    return 1.0


def _check_host(config: ServeConfig) -> None:
    """Refuses an open endpoint on a cluster whose proxies, which our config does not set, listen on all addresses.

    Raises:
        ConfigError: they do, and the config has neither `api_keys` nor `allow_anonymous`.
    """
    if config.needs_key or config.allow_anonymous:
        return
    client = serve.context._get_global_client()  # no public call gives it (ray 2.60)
    host = client.http_config.host if client is not None else None
    if host and not is_loopback(host):
        raise ConfigError(
            f"Serve listens on {host}: give api_keys, say allow_anonymous: true if everybody who reaches it may use "
            "it, or set http_options.host of Serve to 127.0.0.1"
        )


def _with_secrets(config: ServeConfig) -> ServeConfig:
    given = {
        setting: os.environ[name]
        for setting, name in SECRETS.items()
        if getattr(config, setting) is None and os.environ.get(name)
    }
    # `build` names the setting that is wrong, and does not quote it.
    return build(ServeConfig, {**dict(config), **given}) if given else config
