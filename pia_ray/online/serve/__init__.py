"""Ray Serve: engines on GPUs, an HTTP ingress before them, and the server that `pia-ray serve` runs.

Owns Ray for the online wing. `serve run pia_ray.online.serve:build_app model=demo` and Serve's YAML files start here.
"""

from pia_ray.online.serve.deployments import build_app, build_endpoint
from pia_ray.online.serve.engines import EngineReplica, RayRenderer
from pia_ray.online.serve.proxy import proxy_middlewares
from pia_ray.online.serve.server import run_server

__all__ = [
    "EngineReplica",
    "RayRenderer",
    "build_app",
    "build_endpoint",
    "proxy_middlewares",
    "run_server",
]
