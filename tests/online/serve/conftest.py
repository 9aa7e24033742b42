"""The cluster with Ray Serve that the tests of this package share."""

from __future__ import annotations

import gc
import os
import socket
from collections.abc import Iterator

import pytest
import ray
from ray import serve

from pia_ray.online.serve import proxy_middlewares
from pia_ray.online.serve.proxy import PROXY_CALLBACK


@pytest.fixture(scope="package")
def address() -> Iterator[str]:
    """A cluster whose proxies are set up as those of `pia-ray serve`, and where they listen."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # As in `run_server`: a proxy that is not ready in 5 s on a busy machine would be killed.
    os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")
    os.environ[PROXY_CALLBACK] = f"pia_ray.online.serve:{proxy_middlewares.__name__}"
    try:
        ray.init(
            address="local",
            num_cpus=8,
            include_dashboard=False,
            log_to_driver=False,
            object_store_memory=200 * 2**20,
            logging_level="ERROR",
        )
    finally:
        del os.environ[PROXY_CALLBACK]
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        yield f"http://127.0.0.1:{port}"
        serve.shutdown()
    finally:
        ray.shutdown()  # whatever happened: the next tests start a cluster of their own
        gc.collect()  # here Ray's sockets may be left to it, elsewhere a warning of them is an error
