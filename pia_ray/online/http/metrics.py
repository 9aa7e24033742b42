"""The metrics of the endpoint in Prometheus' text format. Each ingress replica counts for itself."""

from __future__ import annotations

from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from pia_ray.errors import PiaRayError
from pia_ray.online.rendering.renderer import Load, Rendered

CONTENT_TYPE: Final = CONTENT_TYPE_LATEST

_METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_SECONDS: Final = (0.01, 0.05, 0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """The metrics of one process, whose name is the label `replica`. No prompt, key or id is ever a label."""

    def __init__(self, replica: str = "") -> None:
        self._replica = replica
        self._registry = registry = CollectorRegistry()
        own = ["replica"]
        self._requests = Counter(
            "pia_ray_http_requests", "HTTP requests.", [*own, "route", "method", "status"], registry=registry
        )
        self._seconds = Histogram(
            "pia_ray_http_request_seconds",
            "Time until the last byte of the answer.",
            [*own, "route"],
            buckets=_SECONDS,
            registry=registry,
        )
        self._videos = Counter(
            "pia_ray_videos", "Requested videos, by outcome.", [*own, "model", "outcome"], registry=registry
        )
        self._gpu_seconds = Counter(
            "pia_ray_gpu_seconds",
            "Engine time of finished videos, with all their takes.",
            [*own, "model"],
            registry=registry,
        )
        self._running = Gauge("pia_ray_requests_running", "Requests that denoise.", own, registry=registry)
        self._waiting = Gauge("pia_ray_requests_waiting", "Requests that wait.", own, registry=registry)
        self._step_seconds = Gauge("pia_ray_step_seconds", "Time of a denoising step, lately.", own, registry=registry)

    def answered(self, route: str, method: str, status: int, seconds: float) -> None:
        """Counts an HTTP request; `route` is the template of its path."""
        self._requests.labels(self._replica, route, method if method in _METHODS else "other", str(status)).inc()
        self._seconds.labels(self._replica, route).observe(seconds)

    def rendered(self, model: str, rendered: Rendered) -> None:
        """Counts a finished video; `model` is its name at this endpoint."""
        self._videos.labels(self._replica, model, "succeeded").inc()
        self._gpu_seconds.labels(self._replica, model).inc(rendered.video.total_gpu_s)

    def failed(self, model: str, error: PiaRayError) -> None:
        """Counts a video that failed."""
        self._videos.labels(self._replica, model, error.code).inc()

    def text(self, load: Load) -> bytes:
        """All metrics, with the present load of the engines."""
        self._running.labels(self._replica).set(load.num_running)
        self._waiting.labels(self._replica).set(load.num_waiting)
        if load.step_s is not None:
            self._step_seconds.labels(self._replica).set(load.step_s)
        return generate_latest(self._registry)
