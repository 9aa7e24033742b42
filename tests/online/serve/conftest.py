"""The cluster with Ray Serve that the tests of this package share."""

from __future__ import annotations

import gc
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray import serve

from pia_ray.online.serve import proxy_middlewares
from pia_ray.online.serve.proxy import PROXY_CALLBACK
from tests.ray_head import WITHOUT_METRICS, without_monitors


@pytest.fixture(scope="package")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A cluster whose proxies are set up as those of `pia-ray serve`, and where they listen."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # As in `run_server`: a proxy that is not ready in 5 s on a busy machine would be killed.
    os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")
    with without_monitors(), pytest.MonkeyPatch.context() as environment:
        environment.setenv(PROXY_CALLBACK, f"pia_ray.online.serve:{proxy_middlewares.__name__}")
        environment.setenv("PYTHONPATH", str(without_pandas(tmp_path_factory.mktemp("path"))), prepend=os.pathsep)
        for name, value in WITHOUT_METRICS.items():
            environment.setenv(name, value)
        environment.setenv("RAY_SERVE_CONTROL_LOOP_INTERVAL_S", "0.2")  # half of what the controller does idle
        ray.init(
            address="local",
            num_cpus=8,
            include_dashboard=False,
            log_to_driver=False,
            object_store_memory=200 * 2**20,
            logging_level="ERROR",
        )
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        yield f"http://127.0.0.1:{port}"
        serve.shutdown()
    finally:
        ray.shutdown()  # whatever happened: the next tests start a cluster of their own
        gc.collect()  # here Ray's sockets may be left to it, elsewhere a warning of them is an error


def without_pandas(folder: Path) -> Path:
    """A folder for PYTHONPATH in which there is no pandas.

    Serve imports it where it can, for data frames in requests: a fifth of what a process of an endpoint does to start.
    """
    (folder / "pandas.py").write_text("raise ImportError('tests of the endpoint have none')")
    return folder
