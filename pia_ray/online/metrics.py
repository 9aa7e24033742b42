"""What the endpoint counts, in Prometheus' text format. Each ingress replica counts for itself."""

from __future__ import annotations

from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from pia_ray.errors import PiaRayError
from pia_ray.online.render import Load, Rendered

CONTENT_TYPE: Final = CONTENT_TYPE_LATEST

_METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_SECONDS: Final = (0.01, 0.05, 0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """The counters of one process. No prompt, key or id is ever a label."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "pia_ray_http_requests", "HTTP requests.", ["route", "method", "status"], registry=self._registry
        )
        self._seconds = Histogram(
            "pia_ray_http_request_seconds",
            "Time until the last byte of the answer.",
            ["route"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._videos = Counter(
            "pia_ray_videos", "Videos asked for, by how they ended.", ["model", "outcome"], registry=self._registry
        )
        self._gpu_seconds = Counter(
            "pia_ray_gpu_seconds", "Engine time of finished videos.", ["model"], registry=self._registry
        )
        self._running = Gauge("pia_ray_requests_running", "Requests that denoise.", registry=self._registry)
        self._waiting = Gauge("pia_ray_requests_waiting", "Requests that wait.", registry=self._registry)
        self._step_seconds = Gauge("pia_ray_step_seconds", "Time of a denoising step, lately.", registry=self._registry)

    def answered(self, route: str, method: str, status: int, seconds: float) -> None:
        """Counts an HTTP request; `route` is the template of its path."""
        self._requests.labels(route, method if method in _METHODS else "other", str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def rendered(self, model: str, rendered: Rendered) -> None:
        """Counts a finished video; `model` is its name at this endpoint."""
        self._videos.labels(model, "succeeded").inc()
        self._gpu_seconds.labels(model).inc(rendered.gpu_s)

    def failed(self, model: str, error: PiaRayError) -> None:
        """Counts a video that came to nothing."""
        self._videos.labels(model, error.code).inc()

    def text(self, load: Load) -> bytes:
        """All of it, with what the engines have in hand now."""
        self._running.set(load.num_running)
        self._waiting.set(load.num_waiting)
        if load.step_s is not None:
            self._step_seconds.set(load.step_s)
        return generate_latest(self._registry)
