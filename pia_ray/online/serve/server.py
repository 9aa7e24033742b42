"""`pia-ray serve`: the endpoint on a Ray of its own on this machine, from start to the signal that ends it."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Final

import ray
import ray.exceptions
from ray import serve

from pia_ray.config.serve import ServeConfig
from pia_ray.media.marking import check_signing
from pia_ray.online.http.api_keys import KeyRing
from pia_ray.online.serve.deployments import build_endpoint, end_s
from pia_ray.online.serve.engines import MakeAnimator
from pia_ray.online.serve.ports import held_port
from pia_ray.online.serve.proxy import PROXY_CALLBACK, proxy_middlewares
from pia_ray.online.video_jobs import JobStore
from pia_ray.online.video_jobs.webhooks import Webhooks
from pia_ray.pia import make_animator
from pia_ray.ray_runtime import own_cluster, ray_errors

log = logging.getLogger(__name__)

APPLICATION: Final = "pia-ray"

ANSWER_S: Final = 2.0
"""Seconds that the ingress has to say whether it has requests, when the server is to end."""


def run_server(
    config: ServeConfig,
    *,
    ready: Callable[[str], None],
    make_animator: MakeAnimator = make_animator,
    stop: threading.Event | None = None,
) -> None:
    """Serves until SIGINT or SIGTERM, or until `stop` is set; calls `ready` with the page's address.

    Runs on a Ray cluster of its own. At the end calls that run are finished, and videos that are being made, for
    `graceful_shutdown_s`; a second signal cuts that short. Other video jobs are in storage, where the next server finds
    them.

    Raises:
        ConfigError: a setting is wrong, or the port is taken.
        OutputError: the storage cannot be written.
        WeightsError: a model cannot be found.
        JobError: Ray or the endpoint could not be started.
    """
    stop = stop or threading.Event()
    with held_port(config.host, config.port) as port:
        _check(config)
        _serve(
            _with_threads(config.model_copy(update={"port": port})), ready=ready, make_animator=make_animator, stop=stop
        )


def _serve(
    config: ServeConfig, *, ready: Callable[[str], None], make_animator: MakeAnimator, stop: threading.Event
) -> None:
    """Serves at the config's port until `stop` is set, or a signal comes."""
    # Serve's proxies are started by Ray and see this process's environment.
    os.environ[PROXY_CALLBACK] = f"{proxy_middlewares.__module__}:{proxy_middlewares.__name__}"
    # Serve kills a proxy that is not ready after 5 s, and its start fails with it (ray 2.60): imports take longer on a
    # busy machine.
    os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")
    handlers = {number: signal.signal(number, lambda *_: stop.set()) for number in _signals()}
    try:
        with own_cluster(config.max_replicas * config.cpus_per_replica):
            with ray_errors("the endpoint could not be started"):
                if config.gpus_per_replica is None:
                    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
                    config = config.model_copy(update={"gpus_per_replica": 1.0 if resources.get("GPU") else 0.0})
                endpoint = build_endpoint(config, make_animator=make_animator)
                serve.start(http_options={"host": config.host, "port": config.port, "request_timeout_s": None})
                serve.run(endpoint, name=APPLICATION, route_prefix="/")
            host = f"[{config.host}]" if ":" in config.host else config.host
            ready(f"http://{host}:{config.port}/")
            stop.wait()
            stop.clear()
            with ray_errors("the endpoint could not be ended in order"):
                _shut_down(stop, timeout_s=end_s(config))
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _check(config: ServeConfig) -> None:
    """Refuses, before Ray starts, what its replicas would refuse."""
    check_signing(config)
    KeyRing(config.api_keys, allow_anonymous=config.allow_anonymous)
    if (secret := config.webhook_secret) is not None:
        Webhooks(secret.get_secret_value())
    JobStore(config.storage).check()


def _with_threads(config: ServeConfig) -> ServeConfig:
    """On a machine of its own an engine on CPUs takes all cores there are, unless the config says how many."""
    if "cpus_per_replica" in config.model_fields_set:
        return config
    return config.model_copy(update={"cpus_per_replica": float(max(1, (os.cpu_count() or 1) // config.max_replicas))})


def _signals() -> tuple[signal.Signals, ...]:
    main = threading.current_thread() is threading.main_thread()
    return (signal.SIGINT, signal.SIGTERM) if main else ()


def _shut_down(again: threading.Event, *, timeout_s: float) -> None:
    """Lets calls and videos end that are being made; a second signal, or that time, cuts this short."""
    unfinished = _num_requests()
    # The application alone: Serve itself goes with its cluster, and complains where it is shut down before.
    serve.delete(APPLICATION, _blocking=False)
    deadline = time.monotonic() + timeout_s
    told = not unfinished
    while APPLICATION in serve.status().applications and time.monotonic() < deadline and not again.wait(0.2):
        if not told and time.monotonic() > deadline - timeout_s + 2:
            log.warning("ends when the videos that are being made have ended; a second signal ends it at once")
            told = True


def _num_requests() -> int:
    """The requests that have not ended, of one ingress; 1 where it does not answer."""
    try:
        number: int = serve.get_app_handle(APPLICATION).num_requests.remote().result(timeout_s=ANSWER_S)
    except Exception:
        log.debug("the ingress does not say what it does", exc_info=True)
        return 1
    return number
